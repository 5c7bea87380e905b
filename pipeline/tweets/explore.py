"""A look at a table of tweets: balance, gaps, what keyword and location give away, numbers, near-duplicates."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from device.text import NUMBERS
from pipeline.tweets.data import Conflicts, Tweet, conflicts, near_duplicates

N_TOP = 20
N_EXAMPLES = 10

FIELDS: dict[str, Callable[[Tweet], str]] = {
    "keyword": lambda tweet: unquote(tweet.keyword).strip(),
    "location": lambda tweet: " ".join(tweet.location.split()),
}
"""Columns whose values are counted, case ignored."""


@dataclass(frozen=True)
class Bias:
    """One value of a column and the disasters among its rows, with Wilson's 95% interval; None without labels."""

    value: str
    n: int
    n_disasters: int | None
    low: float = 0.0
    high: float = 1.0

    @property
    def share(self) -> float | None:
        return None if self.n_disasters is None else self.n_disasters / self.n


@dataclass(frozen=True)
class Feature:
    """A number of NUMBERS for every tweet, by class. auc: how often a disaster has more of it than another tweet, ties
    counting half (Mann-Whitney); 0.5 says nothing, None without both labels."""

    name: str
    values: dict[str, npt.NDArray[np.float64]]
    auc: float | None


@dataclass(frozen=True)
class Example:
    """A group of near-duplicates by its first text."""

    text: str
    n: int
    n_disasters: int | None


@dataclass(frozen=True)
class Exploration:
    """n_by_class: rows of "no disaster" and "disaster", or of "unlabelled"; n_missing: rows without the field."""

    name: str
    n: int
    n_by_class: dict[str, int]
    n_missing: dict[str, int]
    bias: dict[str, list[Bias]]
    n_values: dict[str, int]
    features: list[Feature]
    duplicates: Conflicts
    examples: list[Example]


def explore(name: str, tweets: Sequence[Tweet]) -> Exploration:
    """Everything the page shows. The tweets are all labelled or none is, as read_tweets sees to."""
    masks = class_masks(tweets)
    groups = near_duplicates([tweet.text for tweet in tweets])
    values = {field: _by_value(tweets, of) for field, of in FIELDS.items()}
    return Exploration(
        name=name,
        n=len(tweets),
        n_by_class={label: int(mask.sum()) for label, mask in masks.items()},
        n_missing={
            field: sum(not getattr(t, field).strip() for t in tweets) for field in ("keyword", "location", "text")
        },
        bias={field: [_bias(*item) for item in _largest(found, N_TOP)] for field, found in values.items()},
        n_values={field: len(found) for field, found in values.items()},
        features=[_feature(name, tweets, masks) for name in NUMBERS],
        duplicates=conflicts(tweets, groups),
        examples=_examples(tweets, groups),
    )


def class_masks(tweets: Sequence[Tweet]) -> dict[str, npt.NDArray[np.bool_]]:
    if any(tweet.target is None for tweet in tweets):
        return {"unlabelled": np.ones(len(tweets), bool)}
    labels = np.array([tweet.target for tweet in tweets])
    return {"no disaster": labels == 0, "disaster": labels == 1}


def _by_value(tweets: Sequence[Tweet], of: Callable[[Tweet], str]) -> dict[str, list[Tweet]]:
    """Tweets by a field's value in its commonest spelling; empty values are left out."""
    found: dict[str, list[Tweet]] = defaultdict(list)
    for tweet in tweets:
        if value := of(tweet):
            found[value.casefold()].append(tweet)
    return {Counter(map(of, members)).most_common(1)[0][0]: members for members in found.values()}


def _largest(found: dict[str, list[Tweet]], n: int) -> list[tuple[str, list[Tweet]]]:
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))[:n]


def _disasters(tweets: Sequence[Tweet]) -> int | None:
    labels = [tweet.target for tweet in tweets if tweet.target is not None]
    return sum(labels) if len(labels) == len(tweets) else None


def _bias(value: str, tweets: Sequence[Tweet]) -> Bias:
    from scipy.stats import binomtest

    n_disasters = _disasters(tweets)
    if n_disasters is None:
        return Bias(value, len(tweets), None)
    interval = binomtest(n_disasters, len(tweets)).proportion_ci(0.95, method="wilson")
    return Bias(value, len(tweets), n_disasters, float(interval.low), float(interval.high))


def _feature(name: str, tweets: Sequence[Tweet], masks: dict[str, npt.NDArray[np.bool_]]) -> Feature:
    from sklearn.metrics import roc_auc_score

    values = np.array([NUMBERS[name](tweet.text) for tweet in tweets])
    disaster = masks.get("disaster")
    both = disaster is not None and 0 < disaster.sum() < len(tweets)
    auc = float(roc_auc_score(disaster, values)) if both else None
    return Feature(name, {label: values[mask] for label, mask in masks.items()}, auc)


def _examples(tweets: Sequence[Tweet], groups: npt.NDArray[np.int64]) -> list[Example]:
    """The largest groups with both labels; without labels the largest."""
    members: dict[int, list[Tweet]] = defaultdict(list)
    for tweet, group in zip(tweets, groups.tolist(), strict=True):
        members[group].append(tweet)
    repeated = [Example(m[0].text, len(m), _disasters(m)) for m in members.values() if len(m) > 1]
    shown = [e for e in repeated if e.n_disasters is None or 0 < e.n_disasters < e.n]
    return sorted(shown, key=lambda e: -e.n)[:N_EXAMPLES]


def summary(found: Exploration) -> str:
    """A few lines for a terminal."""
    lines = [f"{found.name}: {found.n:,} tweets"]
    lines += [f"  {label}: {n:,} ({n / found.n:.1%})" for label, n in found.n_by_class.items()]
    missing = ", ".join(f"{field} {n:,} ({n / found.n:.1%})" for field, n in found.n_missing.items())
    lines.append(f"  missing: {missing}")
    for field, biases in found.bias.items():
        lines.append(f"  {field}: {found.n_values[field]:,} values{_extremes(biases)}")
    for feature in found.features:
        means = ", ".join(f"{label} {v.mean():.2f}" for label, v in feature.values.items() if len(v))
        lines.append(
            f"  {feature.name}: mean {means}" + (f"; AUC {feature.auc:.3f}" if feature.auc is not None else "")
        )
    lines.append(f"  {repeated(found)}")
    return "\n".join(lines)


def repeated(found: Exploration) -> str:
    """What there is of near-duplicates; labels can only differ where there are any."""
    counts = found.duplicates
    if "unlabelled" in found.n_by_class:
        return f"{counts.n_rows} rows in {counts.n_groups} groups of near-duplicates"
    return str(counts)


def _extremes(biases: Sequence[Bias]) -> str:
    known = sorted(((b.share, b) for b in biases if b.share is not None), key=lambda pair: pair[0])
    if not known:
        return ""
    (low, least), (high, most) = known[0], known[-1]
    return f"; of the {len(biases)} commonest {least.value!r} {low:.0%} disasters, {most.value!r} {high:.0%}"
