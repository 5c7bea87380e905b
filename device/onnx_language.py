"""Causal language models in ONNX Runtime on the CPU, with what the tasks ask of `llama.LlamaModel`.

The graph (pipeline/export/onnx_language.py writes it): input_ids and position_ids int64 (1, n), attention_mask int64
(1, past + n), first_logit int64 (1,), past_key_values.I.key and .value float32 (1, heads, past, head size); logits
float32 (1, n - first_logit, n_vocab), present.I.key and .value. Its metadata names the vocabulary's habits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from device.llama import N_UBATCH
from device.records import Record, SlimpiError
from device.runtimes import Logits, OnnxSession, Tokens

HABITS = "slimpi.vocabulary"
"""Key of the graph's metadata that holds a Habits record in JSON."""


class Habits(Record, frozen=True, kw_only=True):
    """What the tokenizer puts around a text, and the cache's shape for no token yet: (heads, head size)."""

    n_vocab: int
    add_bos: bool
    add_eos: bool
    bos: int
    cache: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Tokens at the sequence's next positions; logits of those from `first` on."""

    tokens: Tokens
    first: int


class OnnxLanguageModel:
    """One model and one sequence of it. SlimpiError for a file that ONNX Runtime refuses or that is no such graph."""

    def __init__(self, path: Path, threads: int) -> None:
        from tokenizers import Tokenizer

        self._path, self._session = path, OnnxSession(path, threads)
        try:
            self._habits = msgspec.json.decode(self._session.metadata[HABITS], type=Habits)
            text = path.with_name("tokenizer.json").read_text(encoding="utf-8")
        except (KeyError, OSError, ValueError) as error:
            raise SlimpiError(
                f"{path} is no language model of slimpi's: {error!r}. Build the artifact again."
            ) from error
        self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True  # what looks like one in a text is text
        self._past = sorted(name for name in self._session.inputs if name.startswith("past_key_values."))
        self._present = [name.replace("past_key_values.", "present.") for name in self._past]
        self.n_vocab, self.bos = self._habits.n_vocab, self._habits.bos
        self.add_bos, self.add_eos = self._habits.add_bos, self._habits.add_eos
        self._n_ctx = 0
        self.reset()

    def __enter__(self) -> OnnxLanguageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.clear()
        self._session.close()

    def open_context(self, n_ctx: int, n_outputs: int = 0, rewinds: bool = False) -> None:
        """An empty sequence of at most n_ctx tokens. The rest is llama.cpp's: here logits take what is asked for, and
        the cache holds every position."""
        self._n_ctx = n_ctx
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        heads, size = self._habits.cache
        empty = np.zeros((1, heads, 0, size), np.float32)
        self._cache = {name: self._session.value(empty) for name in self._past}
        self._n_past, self._last = 0, np.zeros(0, np.float32)

    def tokenize(self, text: bytes) -> Tokens:
        """Tokens of UTF-8 text, with BOS as the vocabulary says; special tokens in it are plain text."""
        ids = self._tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids
        return np.array(([self.bos] if self.add_bos else []) + ids, np.int32)

    def logits(self, tokens: Tokens, first: int) -> Iterator[tuple[int, Logits]]:
        """Evaluate one fresh sequence; (position, rows (n, n_vocab)) of positions >= first, in pieces."""
        self.reset()
        yield from self.extend(tokens, first)

    def extend(self, tokens: Tokens, first: int) -> Iterator[tuple[int, Logits]]:
        """The same at the sequence's next positions; `first` and the positions yielded count from there."""
        for start in range(0, len(tokens), N_UBATCH):
            piece = tokens[start : start + N_UBATCH]
            skip = min(max(first - start, 0), len(piece))
            rows = self._evaluate(Batch(piece, skip))
            if len(rows):
                yield start + skip, rows

    def rewind(self, n_tokens: int) -> bool:
        """Forget what comes after the sequence's first n_tokens, which it can always do."""
        for name, value in self._cache.items():
            self._cache[name] = self._session.value(np.ascontiguousarray(value.numpy()[:, :, :n_tokens]))
        self._n_past = min(self._n_past, n_tokens)
        return True

    def random_batches(self, n_tokens: int, size: int, seed: int) -> list[Any]:
        """Batches of `size` random tokens, BOS first as the vocabulary says: llama-bench's input."""
        tokens = np.random.default_rng(seed).integers(0, self.n_vocab, n_tokens, dtype=np.int32)
        if self.add_bos:
            tokens[0] = self.bos
        return [Batch(piece, len(piece) - 1) for piece in np.split(tokens, range(size, n_tokens, size))]

    def run(self, batches: Sequence[Any]) -> None:
        """Evaluate batch after batch at the next positions."""
        for batch in batches:
            self._last = self._evaluate(batch)[-1]

    def next_token(self) -> int:
        """The most likely token after the last position."""
        return int(self._last.argmax())

    def _evaluate(self, batch: Batch) -> Logits:
        n, past = len(batch.tokens), self._n_past
        if past + n > self._n_ctx:
            raise SlimpiError(f"{past + n} tokens exceed the context of {self._n_ctx} of {self._path}. Use a larger.")
        arrays: dict[str, Any] = {
            "input_ids": batch.tokens[None].astype(np.int64),
            "attention_mask": np.ones((1, past + n), np.int64),
            "position_ids": np.arange(past, past + n, dtype=np.int64)[None],
            "first_logit": np.array([batch.first], np.int64),
        }
        feeds = {name: self._session.value(array) for name, array in arrays.items() if name in self._session.inputs}
        logits, *present = self._session.run_values(feeds | self._cache, ["logits", *self._present])
        self._cache = dict(zip(self._past, present, strict=True))
        self._n_past = past + n
        rows: Logits = logits.numpy()[0]
        return rows
