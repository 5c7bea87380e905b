"""The project's own texts: well-formed, balanced, and no leak between what calibrates and what measures."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "pipeline" / "data"
COLUMNS = ["id", "keyword", "location", "text", "target"]
ROWS = {"train": 240, "test": 160}
# Bytes: about 12 chunks of 512 tokens at the 4 bytes a token of English prose.
PROSE_BYTES = {"calibration": (22_000, 26_000), "test": (26_000, 30_000)}
RUN_WORDS = 8
NEAR_DUPLICATE = 0.6
LONGEST_REAL_HANDLE = 15


def read_tweets(split: str) -> list[dict[str, str]]:
    with (DATA / f"tweets_{split}.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle, strict=True))


def read_prose(part: str) -> str:
    return (DATA / f"prose_{part}.txt").read_text(encoding="utf-8")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str, n: int = RUN_WORDS) -> set[tuple[str, ...]]:
    """Every n consecutive words, case and punctuation aside."""
    found = words(text)
    return set(zip(*(found[i:] for i in range(n)), strict=False))


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def near_duplicates(texts: list[str]) -> list[tuple[str, str]]:
    bags = [(text, set(words(text))) for text in texts]
    return [(a, b) for (a, x), (b, y) in itertools.combinations(bags, 2) if jaccard(x, y) >= NEAR_DUPLICATE]


def test_near_duplicates_and_runs_are_found() -> None:
    """The checks below can fail."""
    assert near_duplicates(["The barn is on fire!", "the barn is on FIRE", "the barn is red"]) == [
        ("The barn is on fire!", "the barn is on FIRE")
    ]
    assert runs("a b, c", 2) == {("a", "b"), ("b", "c")}
    assert runs("a b", 3) == set()


@pytest.mark.parametrize("split", ROWS)
def test_tweets_have_the_kaggle_layout(split: str) -> None:
    rows = read_tweets(split)
    assert len(rows) == ROWS[split]
    for row in rows:
        assert list(row) == COLUMNS
        assert None not in row.values()
        assert int(row["id"]) > 0
        assert row["target"] in {"0", "1"}
        assert 10 <= len(row["text"]) <= 280
        assert row["text"] == row["text"].strip()


@pytest.mark.parametrize("split", ROWS)
def test_tweets_are_balanced_and_noisy(split: str) -> None:
    rows = read_tweets(split)
    positives = sum(row["target"] == "1" for row in rows)
    assert 0.41 <= positives / len(rows) <= 0.45
    texts = [row["text"] for row in rows]
    for needle in ("\n", ",", '"', "&amp;", "RT @", "#", "https://t.co/"):
        assert any(needle in text for text in texts), f"no tweet with {needle!r}"
    assert any(not text.isascii() for text in texts)
    for column in ("keyword", "location"):
        empty = sum(not row[column] for row in rows)
        assert 0.05 <= empty / len(rows) <= 0.5, column


def test_tweets_ids_are_unique() -> None:
    ids = [row["id"] for split in ROWS for row in read_tweets(split)]
    assert len(set(ids)) == len(ids)


def test_tweets_have_no_near_duplicates() -> None:
    assert near_duplicates([row["text"] for split in ROWS for row in read_tweets(split)]) == []


def test_tweets_name_no_real_account_or_link() -> None:
    for split, row in ((name, row) for name in ROWS for row in read_tweets(name)):
        for handle in re.findall(r"@(\w+)", row["text"]):
            assert len(handle) > LONGEST_REAL_HANDLE, (split, row["id"], handle)
        for link in re.findall(r"\S*(?:http|www)\S*", row["text"]):
            assert re.fullmatch(r"https://t\.co/[A-Za-z]{10}", link), (split, row["id"], link)


@pytest.mark.parametrize("part", PROSE_BYTES)
def test_prose_size_and_characters(part: str) -> None:
    text = read_prose(part)
    low, high = PROSE_BYTES[part]
    assert low <= len(text.encode()) <= high
    assert 0 < sum(not c.isascii() for c in text) < 0.001 * len(text)
    assert {c for c in text if not c.isprintable()} == {"\n"}
    # Repetition would make perplexity look better than it is.
    assert len(runs(text)) >= 0.995 * (len(words(text)) - RUN_WORDS + 1)


def test_prose_parts_share_no_run_of_words() -> None:
    assert runs(read_prose("calibration")) & runs(read_prose("test")) == set()


def test_nothing_is_shared_with_the_real_data(data_dir: Path) -> None:
    """The demo's texts are our own, and calibrating on them leaks nothing into WikiText-2 test."""
    real = runs((data_dir / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8"))
    for part in PROSE_BYTES:
        assert runs(read_prose(part)) & real == set(), part
    ours = {" ".join(words(row["text"])) for split in ROWS for row in read_tweets(split)}
    with (data_dir / "tweets" / "train.csv").open(newline="", encoding="utf-8") as handle:
        theirs = {" ".join(words(row["text"])) for row in csv.DictReader(handle)}
    assert ours & theirs == set()
