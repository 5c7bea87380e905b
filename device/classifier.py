"""Text classifiers in ONNX Runtime. A graph's input names say what it reads: a tokenizer's pieces, words, or both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.records import SlimpiError
from device.runtimes import Logits, OnnxSession, one_line
from device.schema import DISTANCE, TOKENIZER, WORDS, Artifact
from device.words import INPUTS, ReadText, Text, WordReader, read_spec

PADDING_TOKENS = ("[PAD]", "<pad>")
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# A batch ends where a text would be padded by more than this part of its own length, and more than one position.
MAX_PADDING = 0.125


@dataclass(frozen=True)
class Encoded:
    """A text as the graph reads it. `length`: positions it takes before any padding, which is what its time goes by."""

    tokens: tuple[list[int], list[int]] | None
    words: ReadText | None

    @property
    def length(self) -> int:
        n_words = len(self.words.words) if self.words else 0
        return max(1, n_words + (len(self.tokens[0]) if self.tokens else 0))


class OnnxClassifier:
    """A text classifier with the tokenizer or the words of its artifact, whichever its graph asks for.

    Texts are cut at max_tokens or max_words and padded only to the longest of their batch, so a single text never is.
    Only files that the manifest lists are read: those are checked by hash.
    """

    def __init__(self, folder: Path, artifact: Artifact, threads: int) -> None:
        path = folder / artifact.entry
        self._session = OnnxSession(path, threads)
        self._token_inputs = [name for name in self._session.inputs if name in TOKEN_INPUTS]
        self._word_inputs = [name for name in self._session.inputs if name in INPUTS]
        unknown = set(self._session.inputs) - set(TOKEN_INPUTS) - INPUTS.keys()
        if unknown or not self._session.inputs:
            raise SlimpiError(
                f"{path} wants unknown inputs {sorted(unknown)}. Export it as a text classifier: it may ask for "
                f"{', '.join((*TOKEN_INPUTS, *INPUTS))}."
            )
        listed = {file.path for file in artifact.files}
        for name, wanted in ((TOKENIZER, self._token_inputs), (WORDS, self._word_inputs)):
            if wanted and name not in listed:
                raise SlimpiError(f"{path} reads {wanted[0]}, but {artifact.id} has no {name}. Build it again.")
        self._tokenizer = _Tokenizer(folder / TOKENIZER, artifact.max_tokens) if self._token_inputs else None
        self._reader = WordReader(read_spec(folder)) if self._word_inputs else None
        self.n_labels = self.logits([Text("a")]).shape[1]
        if artifact.labels and len(artifact.labels) != self.n_labels:
            raise SlimpiError(
                f"{path} gives {self.n_labels} logits but its manifest names {len(artifact.labels)} labels. "
                "Build the artifact again."
            )

    @property
    def reads_keywords(self) -> bool:
        return "keyword_ids" in self._word_inputs

    def __enter__(self) -> OnnxClassifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def logits(self, texts: Sequence[Text]) -> Logits:
        """Read and classify one batch: (len(texts), n_labels) float32."""
        return self.run(self.encode(texts))

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """What the graph will be fed of each text, not padded yet."""
        tokens = self._tokenizer.encode([text.text for text in texts]) if self._tokenizer else [None] * len(texts)
        words = self._reader.read(texts) if self._reader else [None] * len(texts)
        return [Encoded(*pair) for pair in zip(tokens, words, strict=True)]

    def judge(self, text: Text) -> tuple[Logits, float | None]:
        """One text's logits (n_labels,) and, where the graph tells it, its distance from those it learned from."""
        outputs = [DISTANCE] if DISTANCE in self._session.outputs else []
        logits, found = self._run(self.encode([text]), outputs)
        return logits[0], float(found[0].item()) if found else None

    def run(self, batch: Sequence[Encoded]) -> Logits:
        """Classify one batch of encoded texts, padded to its longest: (len(batch), n_labels) float32, all finite."""
        return self._run(batch, [])[0]

    def _run(self, batch: Sequence[Encoded], outputs: list[str]) -> tuple[Logits, list[Any]]:
        feeds: dict[str, NDArray[Any]] = {}
        if self._tokenizer:
            feeds |= self._tokenizer.feeds([text.tokens for text in batch if text.tokens], self._token_inputs)
        if self._reader:
            feeds |= self._reader.feeds_of([text.words for text in batch if text.words], self._word_inputs)
        logits, others = self._session.run_beside(feeds, len(batch), outputs)
        for name, found in zip(("logits", *outputs), (logits, *others), strict=True):
            if not np.isfinite(found).all():
                raise SlimpiError(
                    f"the model gives {name} that are not finite: it is broken. Build the artifact again."
                )
        return logits, others

    def logits_in_batches(self, texts: Sequence[Text], batch_size: int) -> tuple[Logits, float]:
        """Classify many texts in batches of like length: logits in the order of the texts, and the share of all
        positions that is padding."""
        encoded = self.encode(texts)
        lengths = [text.length for text in encoded]
        logits = np.empty((len(texts), self.n_labels), np.float32)
        n_positions = 0
        for chosen in batches(lengths, batch_size):
            logits[chosen] = self.run([encoded[i] for i in chosen])
            n_positions += len(chosen) * lengths[chosen[-1]]
        return logits, 1.0 - sum(lengths) / max(1, n_positions)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of the texts in batches, shortest first; within one, none is padded by more than MAX_PADDING of its
    length (or one position)."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or lengths[i] > _longest_beside(lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _longest_beside(shortest: int) -> int:
    return max(shortest + 1, int(shortest * (1 + MAX_PADDING)))


class _Tokenizer:
    """tokenizer.json: texts to pieces, cut at max_tokens; padding is left to `feeds`."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        try:
            text = path.read_text(encoding="utf-8")
            configured = json.loads(text)["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SlimpiError(f"{path} is not a tokenizer: {one_line(error)}. Build the artifact again.") from error
        self._tokenizer = Tokenizer.from_str(text)
        padding = self._tokenizer.padding or {}
        known = [padding.get("pad_id"), *map(self._tokenizer.token_to_id, PADDING_TOKENS)]
        pad_ids = [int(pad_id) for pad_id in known if pad_id is not None]
        if not pad_ids:
            raise SlimpiError(f"{path} ({configured.get('type')}) has no padding token. Add [PAD] or <pad> to it.")
        self._pad_id = pad_ids[0]
        self._pad_type_id = padding.get("pad_type_id", 0)
        self._pad_left = padding.get("direction", "right") == "left"
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    def encode(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Ids and type ids of each text; of an empty one, where nothing is put around it, a padding that counts."""
        found = [self._tokenizer.encode(texts[0])] if len(texts) == 1 else self._tokenizer.encode_batch(texts)
        return [(e.ids, e.type_ids) if e.ids else ([self._pad_id], [self._pad_type_id]) for e in found]

    def feeds(self, rows: Sequence[tuple[list[int], list[int]]], inputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The named TOKEN_INPUTS, int64 (rows, longest)."""
        made = {
            "input_ids": lambda: self._padded([ids for ids, _ in rows], self._pad_id),
            "attention_mask": lambda: self._padded([[1] * len(ids) for ids, _ in rows], 0),
            "token_type_ids": lambda: self._padded([type_ids for _, type_ids in rows], self._pad_type_id),
        }
        return {name: made[name]() for name in inputs}

    def _padded(self, rows: list[list[int]], value: int) -> NDArray[np.int64]:
        width = max(map(len, rows))
        out = np.full((len(rows), width), value, np.int64)
        for line, row in zip(out, rows, strict=True):
            line[width - len(row) if self._pad_left else 0 :][: len(row)] = row
        return out
