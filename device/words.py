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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from device.records import Record, SlimpiError, read_record
from device.schema import WORDS
from device.text import NUMBERS, STEPS, clean, split_words

PADDING, UNKNOWN = 0, 1


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
        keywords = [plain_keyword(keyword) for keyword in self.keywords]
        for name, entries in (("vocabulary", self.vocabulary[UNKNOWN + 1 :]), ("keywords", keywords)):
            if twice := next((entry for entry, n in Counter(entries).items() if n > 1), None):
                raise ValueError(f"`{name}` has {twice[:40]!r} twice: which row is meant?")


def plain_keyword(keyword: str) -> str:
    """Kaggle's keywords are percent-encoded, `car%20crash`; a user may write `car crash`."""
    return unquote(keyword).strip()


def read_spec(folder: Path) -> WordSpec:
    return read_record(folder / WORDS, WordSpec)


@dataclass(frozen=True)
class ReadText:
    """A text, cleaned and split once, whatever a graph then asks of it."""

    reader: WordReader
    text: Text

    @cached_property
    def words(self) -> list[str]:
        return self.reader.words(self.text.text)

    @cached_property
    def terms(self) -> Counter[int]:
        return self.reader.count_terms(self.words)


class WordReader:
    """Texts to the inputs of the module's docstring."""

    def __init__(self, spec: WordSpec) -> None:
        self.spec = spec
        self._ids = {word: i for i, word in enumerate(spec.vocabulary) if i > UNKNOWN}
        self._keywords = {plain_keyword(word): i for i, word in enumerate(spec.keywords, start=1)}
        self._stopwords = frozenset(spec.stopwords)

    def words(self, text: str) -> list[str]:
        """The cleaned words of a text, at most max_words."""
        return split_words(clean(text, self.spec.steps), self._stopwords)[: self.spec.max_words]

    def terms(self, text: str) -> Counter[int]:
        """Counts of the vocabulary's n-grams; others are left out."""
        return self.count_terms(self.words(text))

    def count_terms(self, words: Sequence[str]) -> Counter[int]:
        """`terms` of words that are cleaned and cut already."""
        spans = range(1, self.spec.ngrams + 1)
        grams = (" ".join(words[i : i + n]) for n in spans for i in range(len(words) - n + 1))
        return Counter(self._ids[gram] for gram in grams if gram in self._ids)

    def read(self, texts: Sequence[Text]) -> list[ReadText]:
        return [ReadText(self, text) for text in texts]

    def feeds(self, texts: Sequence[Text], inputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """The named inputs of one batch. SlimpiError for a name not in INPUTS."""
        return self.feeds_of(self.read(texts), inputs)

    def feeds_of(self, batch: Sequence[ReadText], inputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """`feeds` of texts that are read already."""
        if unknown := set(inputs) - INPUTS.keys():
            raise SlimpiError(f"the model wants unknown inputs {sorted(unknown)}. Known: {', '.join(INPUTS)}.")
        return {name: INPUTS[name](self, batch) for name in inputs}

    def word_ids(self, batch: Sequence[ReadText]) -> npt.NDArray[np.int64]:
        return _padded([[self._ids.get(word, UNKNOWN) for word in read.words] for read in batch], np.int64)

    def keyword_ids(self, batch: Sequence[ReadText]) -> npt.NDArray[np.int64]:
        return np.array([self._keywords.get(plain_keyword(read.text.keyword), 0) for read in batch], np.int64)

    def numbers(self, batch: Sequence[ReadText]) -> npt.NDArray[np.float32]:
        rows = [[NUMBERS[name](read.text.text) for name in self.spec.numbers] for read in batch]
        return np.array(rows, np.float32).reshape(len(batch), len(self.spec.numbers))

    def term_ids(self, batch: Sequence[ReadText]) -> npt.NDArray[np.int64]:
        return _padded([list(read.terms) for read in batch], np.int64)

    def term_counts(self, batch: Sequence[ReadText]) -> npt.NDArray[np.float32]:
        return _padded([list(read.terms.values()) for read in batch], np.float32)


INPUTS: dict[str, Callable[[WordReader, Sequence[ReadText]], npt.NDArray[Any]]] = {
    "word_ids": WordReader.word_ids,
    "keyword_ids": WordReader.keyword_ids,
    "numbers": WordReader.numbers,
    "term_ids": WordReader.term_ids,
    "term_counts": WordReader.term_counts,
}


def _padded(rows: Sequence[Sequence[float]], dtype: Any) -> npt.NDArray[Any]:
    """(rows, longest), zeros behind; one column at least, so that an empty text is one padding."""
    out: npt.NDArray[Any] = np.zeros((len(rows), max([1, *map(len, rows)])), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
