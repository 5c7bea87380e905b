"""The file layouts word vectors come in. Every reader takes the words to keep, None for all."""

from __future__ import annotations

import gzip
import mmap
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from device.records import SlimpiError

Rows = tuple[dict[str, int], npt.NDArray[np.float32]]
Wanted = Collection[str] | None

_MAX_SIZE = 10_000


@dataclass(frozen=True)
class Layout:
    what: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, Wanted], Rows]


def _gathered(path: Path, found: Iterator[tuple[str, npt.NDArray[np.float32]]], wanted: Wanted) -> Rows:
    """Of a word given twice the first, more frequent one counts."""
    rows: dict[str, int] = {}
    kept = []
    for word, vector in found:
        if word not in rows and (wanted is None or word in wanted):
            rows[word] = len(rows)
            kept.append(vector)
    if not kept:
        raise SlimpiError(f"{path} has no vector for any of the words. Is it of the right language and case?")
    return rows, np.array(kept, np.float32)


def read_text(path: Path, wanted: Wanted) -> Rows:
    """GloVe: `word v1 ... vd` a line, and word2vec's text, whose first line is `n d`."""
    return _gathered(path, _text_lines(path, wanted), wanted)


def _text_lines(path: Path, wanted: Wanted) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    size = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in _numbered(path, lines):
            if number == 1 and len(header := line.split()) == 2 and all(part.isdigit() for part in header):
                size = int(header[1])
                continue
            size = size or len(line.split()) - 1
            word, *values = line.rstrip().rsplit(b" ", size)  # GloVe 840B has words with blanks in them
            try:
                text = word.decode()
                if wanted is None or text in wanted:
                    vector = np.array([float(value) for value in values], np.float32)
                    if size < 1 or len(vector) != size:
                        raise ValueError(f"{len(vector)} numbers instead of {max(size, 1)}")
                    yield text, vector
            except ValueError as error:  # UnicodeDecodeError is one
                raise SlimpiError(
                    f"{path}, line {number}: not a UTF-8 word and its vector: {error}. Use GloVe's or word2vec's text."
                ) from error


def _numbered(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    try:
        yield from enumerate(lines, start=1)
    except (EOFError, zlib.error) as error:
        raise SlimpiError(f"{path} is cut short or damaged: {error}. Copy it again.") from error


def read_binary(path: Path, wanted: Wanted) -> Rows:
    """word2vec's binary: the line `n d`, then n times a word, a blank, d float32 and maybe a line feed."""
    if not path.stat().st_size:
        raise SlimpiError(f"{path} is empty. Check the file.")
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = data[: max(0, data.find(b"\n", 0, 64))].split()
        n, size = map(int, header) if len(header) == 2 and all(part.isdigit() for part in header) else (0, 0)
        if n < 1 or not 1 <= size <= _MAX_SIZE or n * (4 * size + 1) > len(data):
            raise SlimpiError(
                f"{path} does not begin with word2vec's `words size`, or is cut short: {bytes(data[:24])!r}. "
                "Check the file."
            )
        return _gathered(path, _binary_words(path, data, n, size), wanted)


def _binary_words(path: Path, data: mmap.mmap, n: int, size: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    at = data.find(b"\n") + 1
    for number in range(n):
        blank = data.find(b" ", at)
        if blank < 0 or blank + 1 + 4 * size > len(data):
            raise SlimpiError(f"{path} is cut short: it ends in word {number + 1} of {n}. Copy it again.")
        # A word that is not UTF-8 cannot be looked up; the published Google News file has some.
        word = data[at:blank].lstrip(b"\n").decode(errors="replace")
        at = blank + 1 + 4 * size
        yield word, np.frombuffer(data[blank + 1 : at], "<f4")


def read_spacy(folder: Path, wanted: Wanted) -> Rows:
    """A spaCy pipeline's `vocab` folder: `vectors` (.npy), `key2row` (msgpack: hash of a word -> row), strings.json."""
    matrix = _load_array(folder / "vectors")
    try:
        rows_by_hash = msgspec.msgpack.decode((folder / "key2row").read_bytes(), type=dict[int, int])
        words = wanted
        if words is None:  # no symbol's name is in strings.json
            words = [*msgspec.json.decode((folder / "strings.json").read_bytes(), type=list[str]), *_SYMBOLS]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SlimpiError(f"{folder} is not a vocabulary of spaCy 3: {error}. Check the folder.") from error
    found = ((word, rows_by_hash.get(spacy_hash(word), -1)) for word in words)
    rows = {word: row for word, row in found if row >= 0}
    if not rows or max(rows.values()) >= len(matrix):
        raise SlimpiError(f"{folder}: no word found, or rows beyond the {len(matrix)} of its matrix. Check the folder.")
    return rows, matrix


_MASK = 2**64 - 1
_FIRST_SYMBOL = 398
_SYMBOLS = """
acomp advcl advmod agent amod appos attr aux auxpass cc ccomp complm conj cop csubj csubjpass dep det dobj expl hmod
hyph infmod intj iobj mark meta neg nmod nn npadvmod nsubj nsubjpass num number oprd obj obl parataxis partmod pcomp
pobj poss possessive preconj prep prt punct quantmod relcl rcmod root xcomp acl
""".split()  # noqa: SIM905 - readable
_SYMBOL_IDS = {name: number for number, name in enumerate(_SYMBOLS, start=_FIRST_SYMBOL)}


def spacy_hash(word: str) -> int:
    """spaCy's key of a string (StringStore): MurmurHash64A of its UTF-8 with seed 1, but the number of the symbol for
    what names one in spacy/symbols.pxd (3.8; the lower-case ones here)."""
    return _SYMBOL_IDS.get(word) or murmur_hash_64a(word.encode(errors="surrogatepass"), 1)


def murmur_hash_64a(data: bytes, seed: int) -> int:
    """Austin Appleby's MurmurHash2, the variant for 64-bit machines."""
    m, r = 0xC6A4A7935BD1E995, 47
    h = seed ^ len(data) * m & _MASK
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):
        k = int.from_bytes(data[i : i + 8], "little") * m & _MASK
        h = (h ^ (k ^ k >> r) * m & _MASK) * m & _MASK
    if tail := data[whole:]:
        h = (h ^ int.from_bytes(tail, "little")) * m & _MASK
    h = (h ^ h >> r) * m & _MASK
    return h ^ h >> r


def read_array(folder: Path, wanted: Wanted) -> Rows:
    """A folder with one .npy (n, d) and one .parquet, whose first column holds the n words in the same order."""
    import pyarrow
    import pyarrow.parquet

    (array,), (index,) = folder.glob("*.npy"), folder.glob("*.parquet")
    matrix = _load_array(array)
    try:
        words = [str(word) for word in pyarrow.parquet.ParquetFile(index).read().column(0).to_pylist()]
    except pyarrow.ArrowException as error:
        raise SlimpiError(f"cannot read {index} as Parquet: {error}. Check the file.") from error
    if len(words) != len(matrix):
        raise SlimpiError(
            f"{index.name} names {len(words)} words, {array.name} has {len(matrix)} rows. They must agree."
        )
    return _gathered(folder, zip(words, matrix, strict=True), wanted)


def _load_array(path: Path) -> npt.NDArray[np.float32]:
    try:
        with path.open("rb") as handle:  # np.load(path) would append .npy
            matrix: npt.NDArray[Any] = np.load(handle, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SlimpiError(f"{path} is not a NumPy array: {error}. Check the file.") from error
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating) or not matrix.size:
        raise SlimpiError(f"{path} has shape {matrix.shape} of {matrix.dtype}, expected (words, size) of floats.")
    return matrix.astype(np.float32, copy=False)


def _is_array_folder(path: Path) -> bool:
    return path.is_dir() and len(list(path.glob("*.npy"))) == len(list(path.glob("*.parquet"))) == 1


LAYOUTS = {
    "spacy": Layout(
        "a spaCy vocab folder with `vectors` and `key2row`", lambda p: (p / "key2row").is_file(), read_spacy
    ),
    "array": Layout("a folder with one .npy and one .parquet of its words", _is_array_folder, read_array),
    "binary": Layout("word2vec .bin", lambda p: p.is_file() and p.suffix == ".bin", read_binary),
    "text": Layout(
        "GloVe or word2vec text (.txt, .vec, either with .gz)",
        lambda p: p.is_file() and p.name.removesuffix(".gz").endswith((".txt", ".vec")),
        read_text,
    ),
}
