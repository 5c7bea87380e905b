"""What each cleaning step and extra feature is worth: TF-IDF and logistic regression with it switched off or on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import msgspec
import numpy as np
import numpy.typing as npt

from device import text
from device.records import SlimpiError, sha256_file, write_atomic
from device.text import NUMBERS, STEPS, split_words
from pipeline.progress import Tick, quiet
from pipeline.tweets import cleaning, duplicates
from pipeline.tweets.cleaning import clean
from pipeline.tweets.data import Split, Tweet, folds, near_duplicates, read_tweets, targets

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

C = 3.0
N_GRAMS = (1, 2)
REFERENCE = "all steps"
FIELD_STEPS = ("unescape", "punctuation", "lower")


@dataclass(frozen=True)
class Variant:
    """What the classifier reads. keyword: the whole of it as one word more; location: its words, marked as such."""

    steps: tuple[str, ...] = tuple(STEPS)
    stopwords: bool = True
    keyword: bool = False
    location: bool = False
    numbers: tuple[str, ...] = ()


def _without(step: str) -> Variant:
    return Variant(steps=tuple(s for s in STEPS if s != step))


VARIANTS: dict[str, Variant] = {
    REFERENCE: Variant(),
    **{f"without {step}": _without(step) for step in STEPS},
    "without stopwords": Variant(stopwords=False),
    "none of them": Variant(steps=(), stopwords=False),
    "segment (host only)": Variant(steps=("unescape", "urls", "mentions", "segment", *list(STEPS)[3:])),
    "and keyword": Variant(keyword=True),
    "and location": Variant(location=True),
    "and numbers": Variant(numbers=tuple(NUMBERS)),
}
"""Rows of the table. `without stopwords` is without the step that drops them."""


class Row(msgspec.Struct, frozen=True):
    """accuracy, f1 (of disasters): out-of-fold, mean and standard deviation over seeds of the folds. difference: of
    accuracy to the reference, in points, with its 95% interval; `interval` says what that covers."""

    name: str
    accuracy: float
    accuracy_sd: float
    f1: float
    f1_sd: float
    difference_points: float
    low_points: float
    high_points: float


class Ablation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conditions and rows; as JSON the results file."""

    benchmark: str = "tweets_ablation"
    provenance: str = "host"
    classifier: str = (
        f"TF-IDF (sublinear, n-grams of {N_GRAMS[0]} to {N_GRAMS[1]} words), logistic regression, C = {C:g}"
    )
    interval: str = "95%, paired over tweets, clustered by groups of near-duplicates; not over training sets"
    corpus: str
    corpus_sha256: str
    code_sha256: str
    n_rows: int
    n_groups: int
    n_folds: int
    seeds: list[int]
    cpu: str = ""
    start_time: str = ""
    rows: list[Row] = msgspec.field(default_factory=list)


def documents(tweets: Sequence[Tweet], variant: Variant) -> list[list[str]]:
    """The words of each tweet, cleaned, with those of the marked fields behind."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    stopwords = ENGLISH_STOP_WORDS if variant.stopwords else frozenset[str]()
    found = []
    for tweet in tweets:
        words = split_words(clean(tweet.text, variant.steps), stopwords)
        if variant.keyword and tweet.keyword:
            words.append(f"keyword={unquote(tweet.keyword).lower()}")
        if variant.location:
            words += [f"location={word}" for word in clean(tweet.location, FIELD_STEPS).split()]
        found.append(words)
    return found


def predictions(
    words: Sequence[Sequence[str]], numbers: FloatArray, labels: IntArray, parts: Sequence[Split]
) -> IntArray:
    """(n,) out-of-fold labels from the words of each tweet and its numbers (n, k), k may be 0.

    Vocabulary, idf and the scale of numbers are learnt from the training rows only.
    """
    from scipy.sparse import csr_array, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    predicted = np.full(len(words), -1, np.int64)
    for part in parts:
        terms = TfidfVectorizer(analyzer=_n_grams, sublinear_tf=True)
        sides = [terms.fit_transform([words[i] for i in part.train]), terms.transform([words[i] for i in part.test])]
        if numbers.shape[1]:
            scaler = StandardScaler().fit(numbers[part.train])
            # A tweet's term vector has norm 1: numbers of variance 1 would drown it.
            scaled = [scaler.transform(numbers[rows]) / 10 for rows in (part.train, part.test)]
            sides = [hstack([a, csr_array(b)]).tocsr() for a, b in zip(sides, scaled, strict=True)]
        model = LogisticRegression(C=C, max_iter=1000).fit(sides[0], labels[part.train])
        predicted[part.test] = model.predict(sides[1])
    return predicted


def _n_grams(words: Sequence[str]) -> list[str]:
    spans = range(N_GRAMS[0], N_GRAMS[1] + 1)
    return [" ".join(words[i : i + n]) for n in spans for i in range(len(words) - n + 1)]


def clustered_difference(
    ours: FloatArray, reference: FloatArray, groups: npt.NDArray[np.int64]
) -> tuple[float, float, float]:
    """(mean, low, high) of the paired difference (n,), 95%.

    Rows of a group are not independent: the variance is that of the groups' sums (Liang and Zeger 1986, with the factor
    G / (G - 1)), Student's t has G - 1 degrees of freedom.
    """
    from scipy.stats import t

    d = ours - reference
    mean = float(d.mean())
    sums = np.bincount(groups, weights=d - mean)
    n_groups = len(sums)
    se = math.sqrt(n_groups / (n_groups - 1) * float(sums @ sums)) / len(d)
    half = float(t.ppf(0.975, n_groups - 1)) * se
    return mean, mean - half, mean + half


def ablate(
    table: Path,
    out: Path,
    seeds: Sequence[int],
    n_folds: int = 5,
    cpu: str = "",
    start_time: str = "",
    tick: Tick = quiet,
) -> Ablation:
    """Every row of VARIANTS over the same folds, written to `out` after each; rows that `out` holds from the same
    table, code, classifier, folds and seeds are kept. SlimpiError for a bad table, or an `out` that is no such file.
    """
    tweets = read_tweets(table)
    labels, groups = targets(tweets), near_duplicates([tweet.text for tweet in tweets])
    result = Ablation(
        corpus=table.name, corpus_sha256=sha256_file(table), code_sha256=_code_sha256(), n_rows=len(tweets),
        n_groups=len(set(groups.tolist())), n_folds=n_folds, seeds=list(seeds), cpu=cpu, start_time=start_time,
    )  # fmt: skip
    result = _resumed(result, out)
    parts = [folds(tweets, n_folds, seed) for seed in seeds]
    done = {row.name: row for row in result.rows}
    reference = _predicted(tweets, VARIANTS[REFERENCE], labels, parts)
    rows: list[Row] = []
    for name, variant in VARIANTS.items():
        tick(len(rows), len(VARIANTS), name)
        if name not in done:
            predicted = reference if name == REFERENCE else _predicted(tweets, variant, labels, parts)
            done[name] = _row(name, predicted, reference, labels, groups)
        rows.append(done[name])
        write_atomic(
            out, msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(result, rows=rows)), indent=1)
        )
    return msgspec.structs.replace(result, rows=rows)


def _code_sha256() -> str:
    """Of what cleans, groups and classifies."""
    files = (Path(str(module.__file__)) for module in (text, cleaning, duplicates))
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*files, Path(__file__)))).hexdigest()


def _resumed(fresh: Ablation, out: Path) -> Ablation:
    """What `out` holds if it was measured under the same conditions, on whatever machine: fits are deterministic."""
    if not out.exists():
        return fresh
    try:
        found = msgspec.json.decode(out.read_bytes(), type=Ablation)
    except (OSError, msgspec.DecodeError) as error:
        raise SlimpiError(f"{out} is not a result of this benchmark: {error}. Move it away.") from error
    same = {"rows": [], "cpu": "", "start_time": ""}
    alike = msgspec.structs.replace(found, **same) == msgspec.structs.replace(fresh, **same)
    return found if alike else fresh


def _predicted(
    tweets: Sequence[Tweet], variant: Variant, labels: IntArray, parts: Sequence[Sequence[Split]]
) -> IntArray:
    """(seeds, n) out-of-fold labels."""
    words = documents(tweets, variant)
    if not any(words):
        raise SlimpiError("no tweet has a word left after cleaning. Use a table of texts.")
    numbers = np.array([[NUMBERS[name](tweet.text) for name in variant.numbers] for tweet in tweets])
    return np.array([predictions(words, numbers, labels, each) for each in parts])


def _row(name: str, predicted: IntArray, reference: IntArray, labels: IntArray, groups: IntArray) -> Row:
    from sklearn.metrics import f1_score

    hits, reference_hits = predicted == labels, reference == labels
    accuracy, f1 = hits.mean(1), [f1_score(labels, each) for each in predicted]
    difference = clustered_difference(hits.mean(0), reference_hits.mean(0), groups)
    return Row(name, *_mean_sd(accuracy), *_mean_sd(f1), *(100 * value for value in difference))


def _mean_sd(values: Sequence[float] | FloatArray) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def as_markdown(ablation: Ablation) -> str:
    """The table of the docs."""
    lines = ["| variant | accuracy % | F1 % | difference, points [95%] |", "|---|---|---|---|"]
    for r in ablation.rows:
        scores = f"{100 * r.accuracy:.2f} ± {100 * r.accuracy_sd:.2f} | {100 * r.f1:.2f} ± {100 * r.f1_sd:.2f}"
        paired = f"{r.difference_points:+.2f} [{r.low_points:+.2f}, {r.high_points:+.2f}]"
        lines.append(f"| {r.name} | {scores} | {paired if r.name != REFERENCE else ''} |")
    return "\n".join(lines)
