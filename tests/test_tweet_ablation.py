"""Host-only cleaning, and the table that says what each step is worth."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tweets_ablation

from device.records import SlimpiError
from device.text import STEPS
from device.text import clean as device_clean
from device.words import read_spec
from pipeline.tweets import ablation
from pipeline.tweets.ablation import (
    REFERENCE,
    VARIANTS,
    Ablation,
    Row,
    Variant,
    ablate,
    as_markdown,
    clustered_difference,
    documents,
    predictions,
)
from pipeline.tweets.cleaning import ALL_STEPS, HOST_STEPS, clean, segment_hashtags
from pipeline.tweets.data import Split, Tweet


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#californiawildfire now", " california wildfire  now"),
        ("#PRAYFORMH370", "#PRAYFORMH370"),
        ("#CALIFORNIAWILDFIRE", " CALIFORNIA WILDFIRE "),
        ("#CaliforniaWildFire", "#CaliforniaWildFire"),
        ("#são #火事 no#tag #", "#são #火事 no#tag #"),
        ("#earthquake", " earthquake "),
        ("", ""),
    ],
)
def test_segmented_hashtags(text: str, expected: str) -> None:
    assert segment_hashtags(text) == expected


def test_host_steps_are_none_of_the_devices() -> None:
    assert not HOST_STEPS.keys() & STEPS.keys()
    assert clean("#bigfire  http://x.y", [*HOST_STEPS, *STEPS]) == "big fire"
    assert clean("A #BigFire &amp; co", list(STEPS)) == device_clean("A #BigFire &amp; co", list(STEPS))
    with pytest.raises(SlimpiError, match="unknown cleaning step 'polish'"):
        clean("x", ["polish"])


@pytest.mark.parametrize("step", HOST_STEPS)
def test_a_step_the_device_lacks_is_refused(step: str, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps({"steps": ["urls", step], "vocabulary": ["", "<UNK>"]}))
    with pytest.raises(SlimpiError, match=rf"unknown step or number '{step}'; known: unescape, urls"):
        read_spec(tmp_path)


def test_every_step_has_its_row() -> None:
    """Switched off if the device has it, on if only the host does; the order of the others stays."""
    for step in STEPS:
        kept = VARIANTS[f"without {step}"].steps
        assert kept == tuple(s for s in STEPS if s != step)
    for step in HOST_STEPS:
        (variant,) = (v for name, v in VARIANTS.items() if name.startswith(step))
        assert step in variant.steps
        assert tuple(s for s in variant.steps if s in STEPS) == tuple(STEPS)
    assert all(set(v.steps) <= ALL_STEPS.keys() for v in VARIANTS.values())


def test_documents() -> None:
    tweet = Tweet("1", "body%20bag", "Paris, France", "The #BigFire in @x at http://t.co", 1)
    assert documents([tweet], Variant()) == [["big"]], "fire is one of scikit-learn's stop words"
    assert documents([tweet], Variant(stopwords=False)) == [["the", "big", "fire", "in", "at"]]
    assert documents([tweet], Variant((), False))[0][:3] == ["The", "#", "BigFire"]
    more = documents([tweet], Variant(keyword=True, location=True))[0]
    assert more[1:] == ["keyword=body bag", "location=paris", "location=france"]


def test_clustered_interval() -> None:
    """With groups of one it is Student's paired interval; copies of a row in one group add nothing."""
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 60)).astype(float)
    expected = ttest_rel(a, b).confidence_interval(0.95)
    mean, low, high = clustered_difference(a, b, np.arange(60))
    assert (mean, low, high) == pytest.approx((np.mean(a - b), expected.low, expected.high))
    tripled = clustered_difference(np.repeat(a, 3), np.repeat(b, 3), np.repeat(np.arange(60), 3))
    assert tripled == pytest.approx((mean, low, high))


def test_predictions_learn_from_training_rows_only() -> None:
    """Changing a test row changes the prediction of that row alone; the numbers are used."""
    rng = np.random.default_rng(1)
    labels = np.arange(40) % 2
    words = [["bad" if label else "good", f"w{rng.integers(9)}"] for label in labels]
    parts = [Split(np.arange(20), np.arange(20, 40)), Split(np.arange(20, 40), np.arange(20))]
    none = np.zeros((40, 0))
    assert (predictions(words, none, labels, parts) == labels).all()
    changed = [*words[:-1], ["good", "new"]]
    assert np.flatnonzero(predictions(changed, none, labels, parts[:1])[20:] != labels[20:]).tolist() == [19]
    blank = [["x"]] * 40
    assert (predictions(blank, labels[:, None] * 30.0, labels, parts) == labels).all()


def write_tweets(path: Path) -> Path:
    """The words of a tweet tell its label, if it is put into lower case."""
    rng = np.random.default_rng(2)
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "keyword", "location", "text", "target"])
        for i in range(60):
            word = "smoke" if i % 2 else "cake"
            odd = "".join(c.upper() if rng.random() < 0.5 else c for c in word)
            rest = " ".join(f"w{w}" for w in rng.integers(0, 500, 6))
            writer.writerow([i, "", "", f"{odd} {rest}", i % 2])
    return path


def test_ablation_of_a_small_table_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, out = write_tweets(tmp_path / "t.csv"), tmp_path / "out.json"
    few = {name: VARIANTS[name] for name in (REFERENCE, "without lower", "without urls")}
    monkeypatch.setattr(ablation, "VARIANTS", few)
    result = ablate(table, out, range(2), n_folds=3)
    assert msgspec.json.decode(out.read_bytes(), type=Ablation) == result
    reference, lower, urls = result.rows
    assert reference.difference_points == reference.low_points == reference.high_points == 0
    assert reference.accuracy > 0.95
    assert lower.high_points < 0
    assert lower.difference_points == pytest.approx(100 * (lower.accuracy - reference.accuracy))
    assert urls.difference_points == 0, "there is no address to drop"
    assert "| without lower | " in as_markdown(result)

    marked = msgspec.structs.replace(result, rows=[*result.rows[:1], msgspec.structs.replace(lower, f1=0.123)])
    out.write_bytes(msgspec.json.encode(marked))
    assert ablate(table, out, range(2), n_folds=3).rows == [reference, marked.rows[1], urls], "rows that are there stay"
    assert ablate(table, out, [0], n_folds=3).rows[1].f1 != 0.123, "other seeds, other rows"
    out.write_text("{}")
    with pytest.raises(SlimpiError, match="is not a result of this benchmark"):
        ablate(table, out, [0])


def test_tweets_without_words_are_told(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text,target\n" + "".join(f"http://t.co/{i},{i % 2}\n" for i in range(20)))
    with pytest.raises(SlimpiError, match="no tweet has a word left after cleaning"):
        ablate(table, tmp_path / "out.json", [0], n_folds=2)
    assert not (tmp_path / "out.json").exists()


def test_the_benchmarks_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path))
    monkeypatch.setattr(ablation, "VARIANTS", {REFERENCE: Variant()})
    rows = str(write_tweets(tmp_path / "t.csv"))
    assert tweets_ablation.main(["--rows", rows, "--seeds", "1", "--machine", "here"]) == 0
    out = tmp_path / "benchmarks" / "results" / "here" / "tweets_ablation.json"
    result = msgspec.json.decode(out.read_bytes(), type=Ablation)
    assert (result.n_rows, result.n_folds, result.seeds, len(result.rows)) == (60, 5, [0], 1)
    assert as_markdown(result) in capsys.readouterr().out
    assert tweets_ablation.main(["--rows", "absent.csv", "--machine", "here"]) == 1
    assert "tweets_ablation: cannot read absent.csv" in capsys.readouterr().err


def test_markdown() -> None:
    row = Row("without urls", 0.78, 0.001, 0.7, 0.002, -1.25, -1.5, -1.0)
    text = as_markdown(
        Ablation(corpus="t", corpus_sha256="0", code_sha256="0", n_rows=1, n_groups=1, n_folds=5, seeds=[0], rows=[row])
    )
    assert text.splitlines()[-1] == "| without urls | 78.00 ± 0.10 | 70.00 ± 0.20 | -1.25 [-1.50, -1.00] |"


def test_the_docs_give_the_results() -> None:
    repo = Path(__file__).parent.parent
    (out,) = (repo / "benchmarks" / "results").glob("*/tweets_ablation.json")
    result = msgspec.json.decode(out.read_bytes(), type=Ablation)
    assert [row.name for row in result.rows] == list(VARIANTS)
    assert as_markdown(result) in (repo / "docs" / "tweets.md").read_text(encoding="utf-8")
