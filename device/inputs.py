"""Datasets as the tasks read them: whole texts, and tables with a header line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TextIO

from device.records import SlimpiError
from device.schema import Dataset, Job
from device.words import Text

TEXT_COLUMNS = ("text", "sentence")


def read_text(job: Job, dataset: Dataset) -> bytes:
    """The bytes of a UTF-8 text, line ends untouched."""
    path = Path(job.data_dir) / dataset.file.path
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SlimpiError(f"cannot read {path} as UTF-8 text: {error}. Send another file.") from error
    return data


def read_columns(job: Job, dataset: Dataset, columns: list[str], limit: int = 0) -> list[list[str]]:
    """The named columns of the first `limit` rows (0 = all) of a .tsv (no quoting) or CSV file with a header."""
    path = Path(job.data_dir) / dataset.file.path
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = _reader(path, handle)
            found = list(reader.fieldnames or [])
            for column in columns:
                if column not in found:
                    raise SlimpiError(f"{path} has no column {column!r}; it has {found}. Name one of these.")
            for number, row in enumerate(reader, start=1):
                rows.append([_cell(path, number, row, column) for column in columns])
                if number == limit:
                    break
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlimpiError(f"cannot read {path} as a table: {error}. Send a UTF-8 CSV with a header line.") from error
    if not rows:
        raise SlimpiError(f"{path} has a header but no rows. Send one with data.")
    return rows


def read_texts(job: Job, dataset: Dataset, count: int, keyword_column: str = "") -> list[Text]:
    """The first `count` texts of a table (column `text` or `sentence`) or of a plain file, one a line, which has no
    keywords."""
    path = Path(job.data_dir) / dataset.file.path
    if path.suffix in (".csv", ".tsv"):
        columns = [_text_column(path), *([keyword_column] if keyword_column else [])]
        texts = [Text(*row) for row in read_columns(job, dataset, columns, limit=count)]
    else:
        lines = read_text(job, dataset).decode("utf-8").splitlines()
        texts = [Text(line) for line in lines if line.strip()][:count]
    if len(texts) < count:
        raise SlimpiError(f"{path} has {len(texts)} texts, {count} are asked for. Ask for fewer or send more.")
    return texts


def _reader(path: Path, handle: TextIO) -> csv.DictReader[str]:
    if path.suffix == ".tsv":
        return csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.DictReader(handle, strict=True)


def _cell(path: Path, number: int, row: dict[str, str], column: str) -> str:
    value = row[column]
    if value is None:
        raise SlimpiError(f"{path} row {number} is too short: it has no {column!r}. Mend the row or remove it.")
    return value


def _text_column(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            names = list(_reader(path, handle).fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlimpiError(f"cannot read {path} as a table: {error}. Send a UTF-8 CSV with a header line.") from error
    for name in TEXT_COLUMNS:
        if name in names:
            return name
    raise SlimpiError(f"{path} has columns {names}, none of them {' or '.join(TEXT_COLUMNS)}. Rename one.")
