"""Word vectors: every file layout read back, bad files told, and the table that a classifier embeds with."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from gensim.models import KeyedVectors
from hypothesis import given
from hypothesis import strategies as st

from device.records import SlimpiError
from pipeline.tweets.embeddings import NAMED, Vectors, embedding_table, read_vectors, train_vectors
from pipeline.tweets.vector_files import LAYOUTS, murmur_hash_64a, spacy_hash
from tests.real_models import CACHE

WORDS = ["the", "Fire", "fire", "São", "agent", "🔥", "earthquake"]
MATRIX = np.random.default_rng(0).standard_normal((len(WORDS), 5)).astype(np.float32)


def keyed() -> KeyedVectors:
    vectors = KeyedVectors(MATRIX.shape[1])
    vectors.add_vectors(WORDS, MATRIX)
    return vectors


def write_glove(folder: Path) -> Path:
    lines = (" ".join([word, *map(repr, row.tolist())]) + "\n" for word, row in zip(WORDS, MATRIX, strict=True))
    path = folder / "glove.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_gzip(folder: Path) -> Path:
    path = folder / "glove.txt.gz"
    path.write_bytes(gzip.compress(write_glove(folder).read_bytes()))
    return path


def write_word2vec_text(folder: Path) -> Path:
    keyed().save_word2vec_format(str(folder / "w2v.vec"), binary=False)
    return folder / "w2v.vec"


def write_word2vec_binary(folder: Path) -> Path:
    keyed().save_word2vec_format(str(folder / "w2v.bin"), binary=True)
    return folder / "w2v.bin"


def write_word2vec_original(folder: Path) -> Path:
    """As the C program writes: a line feed after every vector."""
    data = f"{len(WORDS)} {MATRIX.shape[1]}\n".encode()
    for word, row in zip(WORDS, MATRIX, strict=True):
        data += word.encode() + b" " + row.tobytes() + b"\n"
    (folder / "c.bin").write_bytes(data)
    return folder / "c.bin"


def write_spacy(folder: Path) -> Path:
    """As spaCy: rows in another order than the strings, a symbol without its string."""
    vocab = folder / "vocab"
    vocab.mkdir()
    with (vocab / "vectors").open("wb") as out:
        np.save(out, MATRIX)
    (vocab / "key2row").write_bytes(msgspec.msgpack.encode({spacy_hash(w): i for i, w in enumerate(WORDS)}))
    (vocab / "strings.json").write_bytes(msgspec.json.encode(sorted({*WORDS, "no vector"} - {"agent"})))
    return vocab


def write_array(folder: Path) -> Path:
    place = folder / "array"
    place.mkdir()
    np.save(place / "v.npy", MATRIX)
    pyarrow.parquet.write_table(pyarrow.table({"index": WORDS}), place / "index.parquet")
    return place


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "glove": ("text", write_glove),
    "glove, gzip": ("text", write_gzip),
    "word2vec text": ("text", write_word2vec_text),
    "word2vec binary": ("binary", write_word2vec_binary),
    "word2vec of the C program": ("binary", write_word2vec_original),
    "spacy": ("spacy", write_spacy),
    "array": ("array", write_array),
}


def test_every_layout_has_a_writer() -> None:
    assert {layout for layout, _ in WRITERS.values()} == LAYOUTS.keys()


@pytest.mark.parametrize("case", WRITERS)
def test_every_layout_is_read_back(case: str, tmp_path: Path) -> None:
    path = WRITERS[case][1](tmp_path)
    vectors = read_vectors(str(path), tmp_path)
    assert vectors.rows.keys() == set(WORDS)
    assert vectors.name == path.name
    for word, row in zip(WORDS, MATRIX, strict=True):
        np.testing.assert_allclose(vectors.matrix[vectors.rows[word]], row, rtol=1e-6)


@pytest.mark.parametrize("case", WRITERS)
def test_only_some_words(case: str, tmp_path: Path) -> None:
    """A word and its lower-case form are kept, nothing else."""
    path = WRITERS[case][1](tmp_path)
    vectors = read_vectors(f"path:{path}", tmp_path, only=["FIRE", "São", "agent", "unheard of"])
    assert vectors.rows.keys() == {"fire", "São", "agent"}
    np.testing.assert_allclose(vectors.matrix[vectors.row("FIRE") or 0], MATRIX[2], rtol=1e-6)


@pytest.mark.parametrize("case", WRITERS)
def test_a_file_cut_short_is_told(case: str, tmp_path: Path) -> None:
    path = WRITERS[case][1](tmp_path)
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(SlimpiError, match=r"cut short|line \d|not a NumPy|vocabulary of spaCy|Parquet|Check"):
            read_vectors(str(path), tmp_path)
        file.write_bytes(whole)


BAD_FILES = {
    "no kind": ("v.json", b"{}", r"v\.json is no kind of vectors that is known: .*word2vec \.bin"),
    "empty text": ("v.txt", b"", r"no vector for any"),
    "empty binary": ("v.bin", b"", r"is empty"),
    "prose": ("v.txt", b"once upon a time\nthere\n", r"line 1: not a UTF-8 word and its vector: could not convert"),
    "one word": ("v.txt", b"once\n", r"line 1: .* 0 numbers instead of 1"),
    "a short line": ("v.txt", b"a 1 2\nb 1\n", r"line 2: .* 1 numbers instead of 2"),
    "latin-1": ("v.txt", b"caf\xe9 1 2\n", r"line 1: not a UTF-8 word"),
    "not finite": ("v.txt", b"a 1 2\nb nan 2\n", r"the vector of 'b' is not finite"),
    "a huge header": ("v.bin", b"9999999999 300\na 0000", r"or is cut short: b'9999999999 300"),
    "no header": ("v.bin", b"\0" * 200, r"does not begin with word2vec's"),
    "damaged gzip": ("v.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0zzzzzzzz", r"cut short or damaged|Not a gzipped"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_told(case: str, tmp_path: Path) -> None:
    name, data, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SlimpiError, match=message):
        read_vectors(str(tmp_path / name), tmp_path)


def test_bad_folders_are_told(tmp_path: Path) -> None:
    array, spacy = write_array(tmp_path), write_spacy(tmp_path)
    np.save(array / "v.npy", MATRIX[1:])
    with pytest.raises(SlimpiError, match=r"index\.parquet names 7 words, v\.npy has 6 rows"):
        read_vectors(str(array), tmp_path)
    with (array / "v.npy").open("wb") as out:
        np.save(out, np.array([{}], object), allow_pickle=True)
    with pytest.raises(SlimpiError, match=r"v\.npy is not a NumPy array: Object arrays cannot be loaded"):
        read_vectors(str(array), tmp_path)
    (array / "v.npy").write_bytes(pickle.dumps(print))
    with pytest.raises(SlimpiError, match="is not a NumPy array"):
        read_vectors(str(array), tmp_path)
    np.save(array / "v.npy", MATRIX.astype(int))
    with pytest.raises(SlimpiError, match=r"of int64, expected \(words, size\) of floats"):
        read_vectors(str(array), tmp_path)
    with (spacy / "vectors").open("wb") as out:
        np.save(out, MATRIX[:2])
    with pytest.raises(SlimpiError, match="rows beyond the 2 of its matrix"):
        read_vectors(str(spacy), tmp_path)
    with pytest.raises(SlimpiError, match="does not exist"):
        read_vectors(str(tmp_path / "absent.txt"), tmp_path)


def test_hashes_that_spacy_documents() -> None:
    """spaCy's documentation of StringStore gives the first two; the third is a symbol."""
    assert spacy_hash("coffee") == 3197928453018144401
    assert spacy_hash("apple") == 8566208034543834098
    assert spacy_hash("agent") == 401


@given(st.binary(max_size=40), st.integers(0, 2**64 - 1))
def test_murmur_hash_is_64_bits_and_sees_every_byte(data: bytes, seed: int) -> None:
    value = murmur_hash_64a(data, seed)
    assert 0 <= value < 2**64
    assert value != murmur_hash_64a(data + b"\0", seed)
    for i in range(len(data)):
        assert value != murmur_hash_64a(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], seed)


def test_embedding_table() -> None:
    vectors = Vectors("v", {"fire": 1, "Fire": 0, "rain": 2}, np.array([[1, 0], [2, 0], [9, 0]], np.float32))
    vocabulary = ["", "<UNK>", "Fire", "FIRE", "unknown", "rain"]
    table, coverage = embedding_table(vectors, vocabulary, 7, [0, 5, 10, 1, 3, 1])
    assert table.dtype == np.float32
    assert table[[0, 2, 3, 5]].tolist() == [[0, 0], [1, 0], [2, 0], [9, 0]]
    assert table[1, 0] != table[4, 0]
    assert table[4, 1] == 0, "a dimension that never varies stays"
    assert (coverage.n_found, coverage.n_words, coverage.n_found_tokens, coverage.n_tokens) == (3, 4, 12, 20)
    assert str(coverage) == "3 of 4 words (75.0%), 60.0% of tokens"
    assert np.array_equal(table, embedding_table(vectors, vocabulary, 7)[0])
    assert not np.array_equal(table, embedding_table(vectors, vocabulary, 8)[0])
    with pytest.raises(ValueError, match="2 counts for 6 words"):
        embedding_table(vectors, vocabulary, 7, [1, 2])


def test_random_rows_are_spread_as_the_vectors() -> None:
    rng = np.random.default_rng(1)
    matrix = (rng.standard_normal((500, 3)) * [1, 5, 0.1] + [0, 3, -1]).astype(np.float32)
    table, coverage = embedding_table(Vectors("v", {"x": 0}, matrix), [f"w{i}" for i in range(4000)], 0)
    np.testing.assert_allclose(table[1:].mean(0), matrix.mean(0), atol=0.3)
    np.testing.assert_allclose(table[1:].std(0), matrix.std(0), rtol=0.1)
    assert coverage.n_found == 0


def test_vectors_of_the_tweets_themselves() -> None:
    """Words that are interchangeable end up close, and the same on every run."""
    rng = np.random.default_rng(2)
    kinds = [[f"{kind}{i}" for i in range(30)] for kind in ("fire", "cake")]
    sentences = [[*rng.choice(words, 8, replace=False), "."] for words in kinds for _ in range(400)] + [["rare"]]
    vectors = train_vectors(sentences, size=12, seed=1, epochs=10)
    assert vectors.matrix.shape == (61, 12)
    assert "rare" not in vectors.rows
    unit = vectors.matrix / np.linalg.norm(vectors.matrix, axis=1, keepdims=True)
    fire, cake = (unit[[vectors.rows[word] for word in words]] for words in kinds)
    assert (fire @ fire.T).mean() > (fire @ cake.T).mean() + 0.3
    assert np.array_equal(vectors.matrix, train_vectors(sentences, size=12, seed=1, epochs=10).matrix)
    with pytest.raises(SlimpiError, match=r"no Word2Vec of 1 texts"):
        train_vectors([["once"]])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_named_vectors(name: str) -> None:
    """From their packages: words of one kind are closer than others."""
    words = ["fire", "flames", "banana", "agent", "the"]
    vectors = read_vectors(name, CACHE, only=words)
    unit = vectors.matrix / np.linalg.norm(vectors.matrix, axis=1, keepdims=True)
    fire, flames, banana, _, _ = (unit[vectors.rows[word]] for word in words)
    assert fire @ flames > fire @ banana + 0.2
