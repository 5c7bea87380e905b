"""Tables of tweets: what is read, what is refused, and splits that no near-duplicate straddles."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.records import SlimpiError
from pipeline.tweets.data import (
    READERS,
    Columns,
    Conflicts,
    Tweet,
    conflicts,
    find_table,
    folds,
    read_tweets,
    split,
    targets,
    write_submission,
)
from pipeline.tweets.duplicates import MIN_JACCARD, near_duplicates, normalise, similar_pairs

HEADER = ["id", "keyword", "location", "text", "target"]
ROWS = [
    ["1", "", "", 'Quotes "in", and a comma', "1"],
    ["4", "body%20bag", " Paris, France ", "two\nlines", "0"],
    ["5", "", "", "", "0"],
    ["7", "", "", "🔥 emoji and ümlaut", "1"],
]


def write_table(path: Path, rows: list[list[str]], header: list[str] | None = None) -> Path:
    """The rows in the layout the ending names; a .tsv has no quotes."""
    header = HEADER if header is None else header
    if path.suffix == ".parquet":
        columns = zip(*rows, strict=True) if rows else [[] for _ in header]
        pyarrow.parquet.write_table(pyarrow.table(dict(zip(header, map(list, columns), strict=True))), path)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows([header, *rows])
    return path


def tweet(text: str, target: int | None = 0, number: int = 0) -> Tweet:
    return Tweet(str(number), "", "", text, target)


def many(n: int = 200, n_words: int = 8) -> list[Tweet]:
    """Distinct texts, two in five of them disasters."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 10_000, n_words)) for _ in range(n)]
    return [tweet(text, int(i % 5 < 2), i) for i, text in enumerate(texts)]


@pytest.mark.parametrize("ending", READERS)
def test_every_kind_of_table_is_read_as_it_stands(ending: str, tmp_path: Path) -> None:
    rows = ROWS if ending != ".tsv" else [[cell.replace("\n", " ") for cell in row] for row in ROWS]
    read = read_tweets(write_table(tmp_path / f"t{ending}", rows))
    assert [t.text for t in read] == [row[3] for row in rows]
    assert read[1] == Tweet("4", "body%20bag", "Paris, France", rows[1][3], 0)
    assert targets(read).tolist() == [1, 0, 0, 1]


def test_columns_by_name_in_any_order(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", [["yes", "fire", "1"], ["no", "rain", "0"]], ["other", "body", "label"])
    assert read_tweets(path, Columns(text="body", target="label")) == [
        Tweet("1", "", "", "fire", 1),
        Tweet("2", "", "", "rain", 0),
    ]
    assert read_tweets(path, Columns(text="body"))[0].target is None


@pytest.mark.parametrize("column", [[1, 0], [1.0, 0.0], [True, False], ["1", "0"]], ids=str)
def test_labels_of_any_parquet_type(column: list[object], tmp_path: Path) -> None:
    table = pyarrow.table({"id": [10, 11], "text": ["a", None], "target": column})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert read_tweets(tmp_path / "t.parquet") == [Tweet("10", "", "", "a", 1), Tweet("11", "", "", "", 0)]


BAD_TABLES = {
    "nothing": ("t.csv", b"", r"has no rows under its header"),
    "only a header": ("t.csv", b"id,text\n", r"has no rows under its header"),
    "latin-1": ("t.csv", b"text\ncaf\xe9\n", r"t\.csv is not UTF-8: byte 0xe9 at 8\. Convert it"),
    "no text column": ("t.csv", b"id,body\n1,a\n", r"no column `text`; it has \['id', 'body'\]"),
    "a column twice": ("t.csv", b"text,text\n1,a\n", r"2 columns `text`"),
    "label 2": ("t.csv", b"text,target\na,0\nb,2\n", r"row 2: target '2' is neither 0 nor 1"),
    "label in words": ("t.csv", b"text,target\na,yes\n", r"target 'yes' is neither"),
    "some labels": ("t.csv", b"text,target\na,0\nb,\n", r"1 of 2 rows have no target, the first is row 2"),
    "an id twice": ("t.csv", b"id,text\n7,a\n8,b\n7,c\n", r"id '7' is given 2 times"),
    "a cell too many": ("t.csv", b"id,text\n1,a,b\n", r"line 2: 3 cells, but the header names 2"),
    "an open quote": ("t.csv", b'id,text\n1,"a\n2,b\n', r"line 3: unexpected end of data\. Check the quotes"),
    "another ending": ("t.json", b"{}", r"unknown kind of table '\.json'\. Use one of \.csv, \.tsv, \.parquet"),
    "no Parquet": ("t.parquet", b"PAR1 not really", r"cannot read .* as Parquet"),
    "a long cell": ("t.csv", b"text\n" + b"a" * 200_000, r"line 2: field larger than field limit"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_told(case: str, tmp_path: Path) -> None:
    name, data, message = BAD_TABLES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SlimpiError, match=message):
        read_tweets(tmp_path / name)


def test_a_named_column_must_be_there(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", ROWS)
    with pytest.raises(SlimpiError, match=r"no column `label`"):
        read_tweets(path, Columns(target="label"))
    with pytest.raises(SlimpiError, match=r"cannot read .*absent\.csv: No such file"):
        read_tweets(tmp_path / "absent.csv")


def test_a_long_tweet_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbftext,target\r\n" + b"fire " * 2000 + b",1\r\n\r\n")
    (read,) = read_tweets(path)
    assert len(read.text) == 10_000
    assert read.target == 1


def test_tables_by_spec(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMPI_DATA", str(data_dir))
    assert find_table("data:tweets/train.csv", Path()) == find_table("tweets-train", Path())
    assert len(read_tweets(find_table("tweets-test", Path()))) == 3263
    assert find_table("some/file.csv", Path()) == Path("some/file.csv")


def test_a_table_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "train.parquet", ROWS)
    calls = []

    def download(repo: str, file: str, repo_type: str) -> str:
        calls.append((repo, file, repo_type))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(read_tweets(find_table("hf:org/tweets/data/train.parquet", tmp_path))) == 4
    assert calls == [("org/tweets", "data/train.parquet", "dataset")]


words = st.lists(st.sampled_from("abcdefg"), max_size=8)


@given(st.lists(words, max_size=14))
@settings(max_examples=150, deadline=None)
def test_near_duplicates_equal_all_pairs(texts: list[list[str]]) -> None:
    """The naive twin compares all pairs and merges groups until nothing changes."""
    sets = [set(text) for text in texts]
    twin = list(range(len(texts)))
    for _ in texts:
        for i, j in combinations(range(len(texts)), 2):
            same = texts[i] == texts[j]
            if same or Fraction(len(sets[i] & sets[j]), max(1, len(sets[i] | sets[j]))) >= MIN_JACCARD:
                twin = [twin[i] if group == twin[j] else group for group in twin]
    numbers: dict[int, int] = {}
    expected = [numbers.setdefault(group, len(numbers)) for group in twin]
    assert near_duplicates([" ".join(text) for text in texts]).tolist() == expected


@given(st.lists(st.frozensets(st.integers(0, 9).map(str), min_size=1), max_size=12), st.fractions(0, 1))
@settings(max_examples=150, deadline=None)
def test_similar_pairs_equal_all_pairs(sets: list[frozenset[str]], minimum: Fraction) -> None:
    minimum = max(minimum, Fraction(1, 100))  # at 0 the empty intersections would count, which share no element
    found = [tuple(sorted(pair)) for pair in similar_pairs(sets, minimum)]
    pairs = combinations(range(len(sets)), 2)
    expected = [(i, j) for i, j in pairs if Fraction(len(sets[i] & sets[j]), len(sets[i] | sets[j])) >= minimum]
    assert sorted(found) == expected


def test_what_makes_a_near_duplicate() -> None:
    texts = [
        "Forest fire near La Ronge Sask. Canada",
        "RT @cbc: FOREST FIRE near La Ronge, Sask. Canada http://t.co/xyz",
        "Forest fire near La Ronge Sask. Canada - via @bbc news",
        "I love fruits",
        "http://t.co/a",
        "http://t.co/b",
        "http://t.co/a",
        "",
        "",
    ]
    assert near_duplicates(texts).tolist() == [0, 0, 0, 1, 2, 3, 2, 4, 4]
    assert normalise(texts[1]) == "rt forest fire near la ronge sask canada"
    assert near_duplicates([]).tolist() == []


@pytest.mark.parametrize("share", [0.2, 0.25, 0.7])
def test_split_keeps_share_labels_and_groups(share: float) -> None:
    tweets = many()
    tweets += [replace(t, text=f"RT {t.text}", id=f"copy{t.id}") for t in tweets[:60]]
    parts = split(tweets, share, seed=3)
    assert sorted([*parts.train, *parts.test]) == list(range(len(tweets)))
    assert abs(len(parts.test) / len(tweets) - share) < 0.02
    labels, groups = targets(tweets), near_duplicates([t.text for t in tweets])
    assert abs(labels[parts.test].mean() - labels.mean()) < 0.02
    assert len(set(groups)) == 200
    assert not set(groups[parts.train]) & set(groups[parts.test])
    again, other = split(tweets, share, seed=3), split(tweets, share, seed=4)
    assert np.array_equal(parts.test, again.test)
    assert not np.array_equal(parts.test, other.test)


def test_folds_test_every_tweet_once() -> None:
    tweets = many(100)
    parts = folds(tweets, 4, seed=1)
    assert Counter(int(i) for part in parts for i in part.test) == Counter(range(100))
    for part in parts:
        assert sorted([*part.train, *part.test]) == list(range(100))


def test_splits_that_cannot_be() -> None:
    tweets = many(50)
    with pytest.raises(SlimpiError, match="the tweets have no target"):
        folds([replace(t, target=None) for t in tweets])
    with pytest.raises(SlimpiError, match=r"21 folds of 50 tweets: the rarer label has 20 different texts"):
        folds(tweets, 21)
    with pytest.raises(SlimpiError, match="the rarer label has 0 different"):
        folds([replace(t, target=1) for t in tweets])
    for share in (0, 1, 0.001, float("nan")):
        with pytest.raises(SlimpiError, match="leaves one side empty"):
            split(tweets, share)


def test_conflicts_are_counted() -> None:
    tweets = [tweet("a b c", 0), tweet("a b c", 1), tweet("A b c!", 0), tweet("x y z", 1), tweet("x y z", 1)]
    groups = near_duplicates([t.text for t in tweets])
    assert conflicts([*tweets, tweet("other")], np.append(groups, 9)) == Conflicts(2, 5, 1, 3)
    assert "1 groups (3 rows) with both labels" in str(conflicts(tweets, groups))


def test_submission(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.csv"
    write_submission(path, ["0", "x,y"], np.array([1, 0]))
    assert path.read_text() == 'id,target\n0,1\n"x,y",0\n'
    with pytest.raises(ValueError, match="shorter"):
        write_submission(tmp_path / "bad.csv", ["0", "2"], [1])
    assert not (tmp_path / "bad.csv").exists()


def test_real_tweets(data_dir: Path) -> None:
    """The numbers the docs give."""
    tweets = read_tweets(data_dir / "tweets" / "train.csv")
    assert Counter(t.target for t in tweets) == {0: 4342, 1: 3271}
    groups = near_duplicates([t.text for t in tweets])
    assert conflicts(tweets, groups) == Conflicts(476, 1822, 129, 600)


@pytest.mark.slow
def test_real_folds(data_dir: Path) -> None:
    tweets = read_tweets(data_dir / "tweets" / "train.csv")
    parts, groups = folds(tweets), near_duplicates([t.text for t in tweets])
    assert {len(part.test) for part in parts} == {1522, 1523, 1524}
    assert all(not set(groups[part.train]) & set(groups[part.test]) for part in parts)
