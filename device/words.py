"""Inputs of classifiers that read words rather than a tokenizer's pieces: words.json beside the model says how.

Inputs a graph may ask for, by name, n = texts of the batch:
  word_ids     int64 (n, words)   rows of the vocabulary, padded with 0 to the longest of the batch, never empty
  keyword_ids  int64 (n,)         1 + index into `keywords`, 0 = none or unknown
  numbers      float32 (n, k)     NUMBERS of the raw text, unscaled: scaling is part of the graph
  term_ids     int64 (n, terms)   distinct n-grams of the vocabulary, padded with 0
  term_counts  float32 (n, terms) how often each occurs, 0 for padding
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from device.schema import Record, SlimpiError, read_record
from device.text import NUMBERS, STEPS, clean, split_words

PADDING, UNKNOWN = 0, 1
SPEC = "words.json"


class Text(msgspec.Struct, frozen=True):
    """What is classified: a tweet, and its keyword where the table has one."""

    text: str
    keyword: str = ""


class WordSpec(Record, frozen=True, kw_only=True):
    """words.json. `vocabulary`: id i is its i-th entry; the first two are padding and <UNK>.

    max_words: words beyond are cut. ngrams: longest n-gram of term_ids, its words joined by a space.
    """

    steps: list[str]
    vocabulary: list[str]
    max_words: Annotated[int, Meta(ge=1, le=100_000)] = 64
    stopwords: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    ngrams: Annotated[int, Meta(ge=1, le=5)] = 1

    def __post_init__(self) -> None:
        if wrong := [s for s in self.steps if s not in STEPS] + [n for n in self.numbers if n not in NUMBERS]:
            raise ValueError(f"unknown step or number {wrong[0]!r}; known: {', '.join([*STEPS, *NUMBERS])}")
        if len(self.vocabulary) < 2:
            raise ValueError("the vocabulary needs padding and <UNK> at least")


def read_spec(folder: Path) -> WordSpec:
    return read_record(folder / SPEC, WordSpec)


class WordReader:
    """Texts to the inputs of the module's docstring."""

    def __init__(self, spec: WordSpec) -> None:
        self.spec = spec
        self._ids = {word: i for i, word in enumerate(spec.vocabulary) if i > UNKNOWN}
        self._keywords = {word: i for i, word in enumerate(spec.keywords, start=1)}
        self._stopwords = frozenset(spec.stopwords)

    def words(self, text: str) -> list[str]:
        """The cleaned words of a text, at most max_words."""
        return split_words(clean(text, self.spec.steps), self._stopwords)[: self.spec.max_words]

    def feeds(self, texts: Sequence[Text], inputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """The named inputs of one batch. SlimpiError for a name not in INPUTS."""
        if unknown := set(inputs) - INPUTS.keys():
            raise SlimpiError(f"the model wants unknown inputs {sorted(unknown)}. Known: {', '.join(INPUTS)}.")
        return {name: INPUTS[name](self, texts) for name in inputs}

    def word_ids(self, texts: Sequence[Text]) -> npt.NDArray[np.int64]:
        return _padded([[self._ids.get(w, UNKNOWN) for w in self.words(t.text)] for t in texts], np.int64)

    def keyword_ids(self, texts: Sequence[Text]) -> npt.NDArray[np.int64]:
        return np.array([self._keywords.get(t.keyword.strip(), 0) for t in texts], np.int64)

    def numbers(self, texts: Sequence[Text]) -> npt.NDArray[np.float32]:
        rows = [[NUMBERS[name](t.text) for name in self.spec.numbers] for t in texts]
        return np.array(rows, np.float32).reshape(len(texts), len(self.spec.numbers))

    def terms(self, text: str) -> Counter[int]:
        """Counts of the vocabulary's n-grams; others are left out."""
        words = self.words(text)
        spans = range(1, self.spec.ngrams + 1)
        grams = [" ".join(words[i : i + n]) for n in spans for i in range(len(words) - n + 1)]
        return Counter(self._ids[gram] for gram in grams if gram in self._ids)

    def term_ids(self, texts: Sequence[Text]) -> npt.NDArray[np.int64]:
        return _padded([list(self.terms(t.text)) for t in texts], np.int64)

    def term_counts(self, texts: Sequence[Text]) -> npt.NDArray[np.float32]:
        return _padded([list(self.terms(t.text).values()) for t in texts], np.float32)


INPUTS: dict[str, Callable[[WordReader, Sequence[Text]], npt.NDArray[Any]]] = {
    "word_ids": WordReader.word_ids,
    "keyword_ids": WordReader.keyword_ids,
    "numbers": WordReader.numbers,
    "term_ids": WordReader.term_ids,
    "term_counts": WordReader.term_counts,
}


def _padded(rows: Sequence[Sequence[float]], dtype: Any) -> npt.NDArray[Any]:
    """(rows, longest), zeros behind; one column at least, so that an empty text is one padding."""
    out: npt.NDArray[Any] = np.zeros((len(rows), max(1, *(len(row) for row in rows))), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
