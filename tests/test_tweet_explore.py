"""slimpi tweets explore and predict: the figures, the page's safety, and submissions of real artifacts."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fakes import TWEETS, artifact, write_word_classifier
from typer.testing import CliRunner

from device.classifier import OnnxClassifier
from device.records import SlimpiError, encode
from device.text import NUMBERS
from device.words import Text
from pipeline.cli import app
from pipeline.tweets.data import Tweet
from pipeline.tweets.explore import Bias, Example, explore, summary
from pipeline.tweets.explore_page import page

HOSTILE = "</script><script>alert(1)</script><b>&amp;"
COPY = "the same text about a flood again"


def tweets() -> list[Tweet]:
    rows = [
        ("Fire!", "body%20bag", "Paris", 1),
        (COPY, "body%20bag", "paris", 1),
        (f"{COPY} http://t.co/x", "", "Paris", 0),
        ("a quiet day at the sea", "calm", HOSTILE, 0),
        (HOSTILE, "Calm", "", 0),
        ("", "", "", 0),
    ]
    return [Tweet(str(i), keyword, location, text, target) for i, (text, keyword, location, target) in enumerate(rows)]


def unlabelled() -> list[Tweet]:
    return [Tweet(t.id, t.keyword, t.location, t.text, None) for t in tweets()]


def test_figures() -> None:
    found = explore("t", tweets())
    assert found.n_by_class == {"no disaster": 4, "disaster": 2}
    assert found.n_missing == {"keyword": 2, "location": 2, "text": 1}
    assert [(b.value, b.n, b.n_disasters) for b in found.bias["location"]] == [("Paris", 3, 2), (HOSTILE, 1, 0)]
    assert [(b.value, b.n, b.n_disasters) for b in found.bias["keyword"]] == [("body bag", 2, 2), ("calm", 2, 0)]
    assert (found.duplicates.n_groups, found.duplicates.n_conflicting_rows) == (1, 2)
    assert found.examples == [Example(COPY, 2, 1)]
    assert [f.name for f in found.features] == list(NUMBERS)
    assert all(sum(map(len, f.values.values())) == 6 for f in found.features)


def test_interval_is_wilsons() -> None:
    """Wilson 1927, by its formula for 2 of 3."""
    paris = explore("t", tweets()).bias["location"][0]
    n, p, z = 3, 2 / 3, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert paris.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert paris.high == pytest.approx((centre + half) / (1 + z * z / n))
    assert paris.share == pytest.approx(p)
    assert Bias("x", 3, None).share is None


def test_auc_is_the_share_of_pairs() -> None:
    for feature in explore("t", tweets()).features:
        no, yes = feature.values["no disaster"], feature.values["disaster"]
        pairs = [(y > n) + 0.5 * (y == n) for y in yes for n in no]
        assert feature.auc == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("rows", [tweets, unlabelled, lambda: tweets()[:1], lambda: unlabelled()[5:]])
def test_page_is_self_contained_and_safe(rows: object) -> None:
    """Nothing is fetched, no text of the table becomes markup, every figure is there."""
    found = explore(f"{HOSTILE}.csv", rows())  # type: ignore[operator]
    html = page(found)
    outside = html[: html.index("<script")] + html[html.rindex("</script>") :]
    assert "alert(1)</script>" not in html
    assert "<b>" not in outside
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", html)
    n_figures = 2 + sum(bool(found.bias[field]) for field in found.bias)
    assert html.count("Plotly.newPlot(") - html.count(".Plotly.newPlot(") >= n_figures
    for text in (html, summary(found)):
        assert all(name in text for name in NUMBERS)


def test_unlabelled_tables_have_no_shares() -> None:
    found = explore("t", unlabelled())
    text = summary(found)
    assert "unlabelled: 6 (100.0%)" in text
    assert "2 rows in 1 groups of near-duplicates" in text
    assert "AUC" not in text
    assert "both labels" not in text + page(found)


def table(path: Path, labelled: bool = True) -> Path:
    header = ["id", "keyword", "text", *(["target"] if labelled else [])]
    rows = [
        [i, "fire" if i % 2 else "", text, label][: len(header)] for i, (text, label) in enumerate(TWEETS, start=10)
    ]
    with path.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([header, *rows])
    return path


def run(*arguments: object) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(app, ["tweets", *map(str, arguments)])
    return done.exit_code, done.output, done.exception


def test_explore_command(tmp_path: Path) -> None:
    code, output, _ = run("explore", table(tmp_path / "t.csv"), "--out", tmp_path / "new" / "page.html")
    assert code == 0
    assert "t.csv: 7 tweets" in output
    assert "t.csv: 7 tweets" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


@pytest.fixture
def word_artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "word-classifier"
    folder.mkdir()
    write_word_classifier(folder)
    (folder / "manifest.json").write_bytes(encode(artifact(folder, "onnx")))
    return folder


def test_predict_command(word_artifact: Path, tmp_path: Path) -> None:
    """The submission holds what the artifact says of each text and keyword, and the scores are of these rows."""
    with OnnxClassifier(word_artifact, artifact(word_artifact, "onnx"), 1) as model:
        texts = [Text(text, "fire" if i % 2 else "") for i, (text, _) in enumerate(TWEETS, start=10)]
        expected = [int(model.logits([text])[0].argmax()) for text in texts]
    assert len(set(expected)) == 2, "a model that says one thing proves nothing"
    code, output, _ = run("predict", word_artifact, table(tmp_path / "t.csv"), "--submission", tmp_path / "s.csv")
    assert code == 0
    rows = list(csv.DictReader((tmp_path / "s.csv").open(encoding="utf-8")))
    assert [(row["id"], int(row["target"])) for row in rows] == list(
        zip(map(str, range(10, 17)), expected, strict=True)
    )
    hits = np.mean([label == guess for (_, label), guess in zip(TWEETS, expected, strict=True)])
    assert f"accuracy {hits:.4f}" in output
    code, output, _ = run(
        "predict", word_artifact, table(tmp_path / "u.csv", labelled=False), "--submission", tmp_path / "u"
    )
    assert code == 0
    assert f"{sum(expected)} of 7 are disasters (the table has no labels)" in output
    assert (tmp_path / "u").read_bytes() == (tmp_path / "s.csv").read_bytes()


def test_predict_answers_odd_tweets(word_artifact: Path, tmp_path: Path) -> None:
    """Empty, blank, of 10,000 characters, emoji, a line feed within: each row gets its answer."""
    odd = ["", "  ", "fire " * 2_000, "🔥🔥", "two\nlines", '"quoted", and more']
    with (tmp_path / "odd.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["id", "text"], *enumerate(odd)])
    code, _, _ = run("predict", word_artifact, tmp_path / "odd.csv", "--submission", tmp_path / "s.csv")
    assert code == 0
    rows = list(csv.DictReader((tmp_path / "s.csv").open(encoding="utf-8")))
    assert [row["id"] for row in rows] == [str(i) for i in range(len(odd))]
    assert {row["target"] for row in rows} <= {"0", "1"}


def test_predict_refuses_and_writes_nothing(word_artifact: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "s.csv", table(tmp_path / "t.csv")
    manifest = json.loads((word_artifact / "manifest.json").read_bytes())
    (word_artifact / "manifest.json").write_text(json.dumps(manifest | {"labels": ["a", "b", "c"]}))
    _, _, error = run("predict", word_artifact, rows, "--submission", out)
    assert isinstance(error, SlimpiError)
    assert "tells 3 labels apart" in str(error)
    (word_artifact / "manifest.json").write_text(json.dumps(manifest))
    (word_artifact / "model.onnx").write_bytes(b"damaged")
    _, _, error = run("predict", word_artifact, rows, "--submission", out)
    assert isinstance(error, SlimpiError)
    assert not out.exists()
