"""What all classifiers share: how texts are cleaned, the vocabulary, and what a trained one can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from device.text import STEPS as TEXT_STEPS
from device.words import Text, WordReader, WordSpec
from pipeline.export.onnx_graph import Graph
from pipeline.progress import Tick
from pipeline.tweets.data import Tweet
from pipeline.tweets.settings import Settings

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

STEPS = ["unescape", "urls", "mentions", "hashtags", "elongated", "lower"]
PADDING_WORD, UNKNOWN_WORD = "<PAD>", "<UNK>"


class WordSettings(Settings, frozen=True, kw_only=True):
    """How a text becomes words. steps: of device.text.STEPS, in order; min_count: rarer words are unknown."""

    steps: list[str] = msgspec.field(default_factory=lambda: list(STEPS))
    max_words: int = 48
    min_count: int = 1

    def __post_init__(self) -> None:
        if wrong := [step for step in self.steps if step not in TEXT_STEPS]:
            raise ValueError(f"unknown step {wrong[0]!r}; the device knows {', '.join(TEXT_STEPS)}")


class Trained(Protocol):
    """A trained classifier before calibration.

    spec: what words.json says, None if it reads none; tokenizer: the text of tokenizer.json, "" if it reads none.
    """

    @property
    def spec(self) -> WordSpec | None: ...

    @property
    def tokenizer(self) -> str: ...

    @property
    def max_tokens(self) -> int: ...

    def log_odds(self, tweets: Sequence[Tweet]) -> FloatArray:
        """(n,): log p(1) / p(0), uncalibrated."""

    def add_to(self, graph: Graph) -> str:
        """Append the computation of the log-odds (n, 1) to a graph; its name there."""


@dataclass(frozen=True)
class Job:
    """What a classifier is trained from: labelled tweets, others that tell when to stop (validation), the folder of its
    encoder if it has one, where word vectors are kept (cache), and where long work is kept to go on from (work)."""

    tweets: Sequence[Tweet]
    validation: Sequence[Tweet]
    source: Path | None
    cache: Path
    work: Path
    seed: int
    progress: Tick


@dataclass(frozen=True)
class Classifier:
    """One entry of CLASSIFIERS. settings: the type of its settings table; needs_source: whether it has an encoder;
    layered: whether it is one encoder, whose middle layer can tell distances between texts."""

    settings: type[Settings]
    train: Callable[[Job, Any], Trained]
    needs_source: bool = True
    layered: bool = False


def texts(tweets: Sequence[Tweet]) -> list[Text]:
    return [Text(tweet.text, tweet.keyword) for tweet in tweets]


def labels(tweets: Sequence[Tweet]) -> IntArray:
    return np.array([tweet.target for tweet in tweets], np.int64)


def count_words(settings: WordSettings, tweets: Sequence[Tweet]) -> Counter[str]:
    """How often each cleaned word occurs."""
    reader = WordReader(
        WordSpec(steps=settings.steps, vocabulary=[PADDING_WORD, UNKNOWN_WORD], max_words=settings.max_words)
    )
    return Counter(word for tweet in tweets for word in reader.words(tweet.text))


def vocabulary(counts: Counter[str], min_count: int, others: Sequence[str] = ()) -> list[str]:
    """Padding, <UNK>, then the words that occur often enough, most frequent first, then others not among them."""
    own = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count]
    return list(dict.fromkeys([PADDING_WORD, UNKNOWN_WORD, *own, *others]))
