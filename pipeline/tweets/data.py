"""Tables of tweets: reading, splitting without near-duplicates on both sides, and the submission that is written."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from device.records import SlimpiError, write_atomic
from pipeline.sources import DATASETS, dataset
from pipeline.tweets.duplicates import near_duplicates

IntArray = npt.NDArray[np.int64]

_SPECS = ("demo:", "path:", "data:", "hf:")
_MOST_PARTS = 20
_SHOWN = 40


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns, Kaggle's by default. Only `text` must be there: of the others an absent one is
    taken for empty if its name here is the default, and an error if it was given by the user."""

    id: str = "id"
    keyword: str = "keyword"
    location: str = "location"
    text: str = "text"
    target: str = "target"


@dataclass(frozen=True)
class Tweet:
    """One row, as it stands in the table: nothing is cleaned. id: the row's number where the table has none."""

    id: str
    keyword: str
    location: str
    text: str
    target: int | None


@dataclass(frozen=True)
class Split:
    """Indices of tweets, ascending; together they are all, and no near-duplicates are on both sides."""

    train: IntArray
    test: IntArray


def find_table(spec: str, cache: Path) -> Path:
    """The file of a table: its path, or a dataset spec of pipeline.sources (data:, hf:, demo:, tweets-train)."""
    return dataset(spec, cache) if spec in DATASETS or spec.startswith(_SPECS) else Path(spec).expanduser()


def read_tweets(path: Path, columns: Columns = Columns()) -> list[Tweet]:
    """The rows of a .csv (quoted as Excel and Kaggle do), .tsv (never quoted, as GLUE's) or .parquet.

    SlimpiError for another ending, text that is not UTF-8, missing columns, rows of another width, a target that
    is neither 0 nor 1, some rows with and some without, an id given twice, and a table without rows. An empty text
    stays.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise SlimpiError(f"{path}: unknown kind of table {path.suffix!r}. Use one of {', '.join(READERS)}.")
    try:
        header, rows = read(path)
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise SlimpiError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}. "
            "Convert it, such as with `iconv -f latin1 -t utf-8`."
        ) from error
    if not rows:
        raise SlimpiError(f"{path} has no rows under its header. Use a table with at least one.")
    place = _places(path, header, columns)
    tweets = [_tweet(path, number, row, place) for number, row in enumerate(rows, start=1)]
    _check(path, tweets)
    return tweets


def _places(path: Path, header: Sequence[str], columns: Columns) -> dict[str, int]:
    """{field of Tweet: index of its column}, without the fields the table lacks."""
    place = {}
    for field, default in vars(Columns()).items():
        name = getattr(columns, field)
        if header.count(name) > 1:
            raise SlimpiError(f"{path} has {header.count(name)} columns `{name}`. Rename all but one.")
        if name in header:
            place[field] = header.index(name)
        elif field == "text" or name != default:
            raise SlimpiError(f"{path} has no column `{name}`; it has {list(header)}. Name one of these as {field}.")
    return place


def _tweet(path: Path, number: int, row: Sequence[Any], place: Mapping[str, int]) -> Tweet:
    cells = {field: _cell(row[index]) for field, index in place.items()}
    target = cells.get("target", "").strip()
    if target not in ("", "0", "1"):
        raise SlimpiError(
            f"{path}, row {number}: target {target[:_SHOWN]!r} is neither 0 nor 1. "
            "Correct it, or name the column that holds the labels."
        )
    return Tweet(
        id=cells.get("id", str(number)).strip(),
        keyword=cells.get("keyword", "").strip(),
        location=cells.get("location", "").strip(),
        text=cells["text"],
        target=int(target) if target else None,
    )


def _cell(value: Any) -> str:
    """A cell of any column type as CSV would hold it: 1.0 (a label column that had gaps) and true are 1."""
    if isinstance(value, (bool, float)) and value in (0, 1):
        value = int(value)
    return "" if value is None or value != value else str(value)


def _check(path: Path, tweets: Sequence[Tweet]) -> None:
    ids = Counter(tweet.id for tweet in tweets)
    twice, count = ids.most_common(1)[0]
    if count > 1:
        raise SlimpiError(f"{path}: id {twice[:_SHOWN]!r} is given {count} times. Every row needs its own.")
    without = [number for number, tweet in enumerate(tweets, start=1) if tweet.target is None]
    if 0 < len(without) < len(tweets):
        raise SlimpiError(
            f"{path}: {len(without)} of {len(tweets)} rows have no target, the first is row {without[0]}. "
            "Label all rows or none."
        )


Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


def _read_csv(path: Path) -> Table:
    return _read_text(path, {"strict": True})


def _read_tsv(path: Path) -> Table:
    return _read_text(path, {"delimiter": "\t", "quoting": csv.QUOTE_NONE})


def _read_text(path: Path, dialect: Mapping[str, Any]) -> Table:
    reader = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), **dialect)
    try:
        header = next(reader, [])
        rows = []
        for row in reader:
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise SlimpiError(
                    f"{path}, line {reader.line_num}: {len(row)} cells, but the header names {len(header)}. "
                    "Correct the line; a text with separators needs quotes in a .csv."
                )
            rows.append(row)
    except csv.Error as error:
        raise SlimpiError(f"{path}, line {reader.line_num}: {error}. Check the quotes.") from error
    return header, rows


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise SlimpiError(f"cannot read {path} as Parquet: {error}. Check the file.") from error
    return table.column_names, list(zip(*(column.to_pylist() for column in table.columns), strict=True))


READERS = {".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet}


def targets(tweets: Sequence[Tweet]) -> IntArray:
    """(n,) labels 0 and 1. SlimpiError if the tweets have none."""
    if any(tweet.target is None for tweet in tweets):
        raise SlimpiError("the tweets have no target. Use a labelled table, or name its label column.")
    return np.array([tweet.target for tweet in tweets], np.int64)


def split(tweets: Sequence[Tweet], test_share: float = 0.2, seed: int = 0) -> Split:
    """One stratified split in which near-duplicate groups stay together. `test_share` is kept to the nearest k/n,
    n <= 20, of the rows. SlimpiError as `folds`, or for a share that leaves one side empty."""
    share = Fraction(test_share).limit_denominator(_MOST_PARTS) if 0 < test_share < 1 else Fraction(0)
    if not 0 < share < 1:
        raise SlimpiError(f"a test share of {test_share} leaves one side empty. Use 0.05 to 0.95, such as 0.2.")
    parts = folds(tweets, share.denominator, seed)
    test = np.sort(np.concatenate([part.test for part in parts[: share.numerator]]))
    return Split(np.setdiff1d(np.arange(len(tweets)), test), test)


def folds(tweets: Sequence[Tweet], n_folds: int = 5, seed: int = 0) -> list[Split]:
    """Stratified k folds in which near-duplicate groups stay together; every tweet is tested once.

    SlimpiError without labels, or with fewer groups of a label than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labels, groups = targets(tweets), near_duplicates([tweet.text for tweet in tweets])
    n_groups = min(len(set(groups[labels == label])) for label in (0, 1))
    if not 2 <= n_folds <= n_groups:
        raise SlimpiError(
            f"{n_folds} folds of {len(tweets)} tweets: the rarer label has {n_groups} different texts, and each fold "
            "needs one. Use fewer folds (at least 2) or more rows."
        )
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return [Split(train, test) for train, test in splitter.split(labels, labels, groups)]


@dataclass(frozen=True)
class Conflicts:
    """Near-duplicates in a labelled table. Conflicting: a group whose rows do not all have the same label."""

    n_groups: int
    n_rows: int
    n_conflicting_groups: int
    n_conflicting_rows: int

    def __str__(self) -> str:
        return (
            f"{self.n_rows} rows in {self.n_groups} groups of near-duplicates; "
            f"{self.n_conflicting_groups} groups ({self.n_conflicting_rows} rows) with both labels"
        )


def conflicts(tweets: Sequence[Tweet], groups: IntArray) -> Conflicts:
    """Counts over the groups (n,) of two and more rows; tweets without a label conflict with none."""
    members: dict[int, list[int | None]] = {}
    for tweet, group in zip(tweets, groups.tolist(), strict=True):
        members.setdefault(group, []).append(tweet.target)
    repeated = [labels for labels in members.values() if len(labels) > 1]
    mixed = [labels for labels in repeated if {0, 1} <= set(labels)]
    return Conflicts(len(repeated), sum(map(len, repeated)), len(mixed), sum(map(len, mixed)))


def write_submission(path: Path, ids: Iterable[str], targets: Iterable[int]) -> None:
    """Kaggle's `id,target`, one row a tweet. ValueError if the lengths differ."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("id", "target"))
    writer.writerows((identity, int(target)) for identity, target in zip(ids, targets, strict=True))
    write_atomic(path, out.getvalue().encode())
