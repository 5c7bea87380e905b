"""A reference's log-probabilities on disk: llama-perplexity's own file, with what it lacks in a trailer behind it.

    b"_logits_", int32 n_ctx, n_vocab, n_chunks          all little-endian
    int32 tokens (n_chunks, n_ctx)                        as the text gave them, BOS not yet put in
    uint16 rows (n_chunks, n_scored, 4 + n_vocab + pad)   pad makes the number even
        words 0-3: float32 scale, float32 floor; then codes: log-probability = scale * code + floor
    JSON of Info, uint32 its length, b"_slimpi_"          the trailer; llama-perplexity never reads that far

Layout and rounding are those of llama.cpp's tools/perplexity/perplexity.cpp (`log_softmax` with uint16_t * log_prob),
so that either program scores against the other's file. A row spans at most CUT_NATS below its top; what lies deeper
gets code 0, whose value is then -CUT_NATS or less. Half a step is 1.2e-4 nats at most.

History of the trailer's schema: 1 (2026-11) first version.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from device.language import log_partition, n_scored
from device.records import Count, Positive, Record, Sha256, SlimpiError, decode, sync_folder, write_remedy
from device.runtimes import Logits, Tokens

LOGITS_NAME = "reference.logits"
CUT_NATS = 16.0
HEAD_WORDS = 4
_MAGIC, _END = b"_logits_", b"_slimpi_"
_LARGEST = np.float32(65535)

Words = NDArray[np.uint16]


class Info(Record, frozen=True, kw_only=True):
    """What the rows are of: a text, cut into chunks, and the artifact (its id) that was asked."""

    schema: Literal[1] = 1
    n_ctx: Positive
    n_vocab: Positive
    n_chunks: Count
    corpus: str
    corpus_sha256: Sha256
    tokenizer_sha256: Sha256
    reference: str

    @property
    def row_words(self) -> int:
        return HEAD_WORDS + self.n_vocab + self.n_vocab % 2

    @property
    def chunk_bytes(self) -> int:
        return n_scored(self.n_ctx) * self.row_words * 2


def encode_row(row: Logits, out: Words) -> None:
    """One row of logits (n_vocab,) as 16-bit log-probabilities, into `out` (row_words,)."""
    top, log_sum = log_partition(row)
    low = max(row.min(), top - np.float32(CUT_NATS))
    scale = np.float32(top - low) / _LARGEST
    out[:HEAD_WORDS].view(np.float32)[:] = scale, low - top - np.float32(log_sum)
    codes = out[HEAD_WORDS : HEAD_WORDS + len(row)]
    out[HEAD_WORDS + len(row) :] = 0
    if scale:
        codes[:] = np.rint(np.maximum(row - low, 0) * (np.float32(1) / scale))
    else:
        codes[:] = 0


def decode_row(words: Words, n_vocab: int) -> Logits:
    """Log-probabilities (n_vocab,) float32, nats."""
    scale, floor = words[:HEAD_WORDS].view(np.float32)
    return words[HEAD_WORDS : HEAD_WORDS + n_vocab] * scale + floor


class Recording:
    """The file while it grows: whole chunks only, each on disk before `append` returns; `n_chunks` are there.

    An earlier, interrupted recording of the same text goes on after its last whole chunk, but no later than chunk
    `done`. `finish` adds the trailer and gives the file its name. SlimpiError if the disk does not take it.
    """

    def __init__(self, folder: Path, info: Info, tokens: Tokens, done: int) -> None:
        self._info, self._target = info, folder / LOGITS_NAME
        self._partial = folder / f".{LOGITS_NAME}.partial"
        header = _MAGIC + struct.pack("<3i", info.n_ctx, info.n_vocab, info.n_chunks) + tokens.astype("<i4").tobytes()
        try:
            self._handle = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
            size = self._partial.stat().st_size
            same = self._handle.read(len(header)) == header
            self.n_chunks = min(done, (size - len(header)) // info.chunk_bytes) if same else 0
            whole = len(header) + self.n_chunks * info.chunk_bytes
            self._handle.truncate(whole if same else 0)
            self._check_space(folder, len(header) + info.n_chunks * info.chunk_bytes - whole)
            if not same:
                self._handle.seek(0)
                self._handle.write(header)
            self._handle.seek(whole)
        except OSError as error:
            raise self._refusal(error) from error

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def append(self, rows: Words) -> None:
        """One chunk's rows (n_scored, row_words)."""
        assert rows.nbytes == self._info.chunk_bytes
        self._write(rows.astype("<u2", copy=False).data)
        self.n_chunks += 1

    def finish(self) -> None:
        assert self.n_chunks == self._info.n_chunks
        trailer = msgspec.json.encode(self._info)
        self._write(trailer + struct.pack("<I", len(trailer)) + _END)
        try:
            self._partial.replace(self._target)
            sync_folder(self._target.parent)
        except OSError as error:
            raise self._refusal(error) from error

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._handle.write(data)
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise self._refusal(error) from error

    def _check_space(self, folder: Path, needed_bytes: int) -> None:
        free_bytes = shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise SlimpiError(
                f"{folder} has {free_bytes / 1e6:.0f} MB free, {needed_bytes / 1e6:.0f} MB are needed for "
                f"{self._info.n_chunks} chunks of log-probabilities. Free some space or take fewer chunks."
            )

    def _refusal(self, error: OSError) -> SlimpiError:
        return SlimpiError(f"cannot write {self._partial}: {error.strerror}. {write_remedy(error)}")


class LogitsFile:
    """A finished recording, read one row at a time: `info`, `tokens` (n_chunks, n_ctx), `row`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = path.open("rb")
            self.info = self._read_info()
            self._handle.seek(len(_MAGIC) + 12)
            count = self.info.n_chunks * self.info.n_ctx
            self.tokens: Tokens = np.fromfile(self._handle, dtype="<i4", count=count).reshape(-1, self.info.n_ctx)
            self._first_row = self._handle.tell()
        except OSError as error:
            raise SlimpiError(f"cannot read {path}: {error.strerror}. Record it again.") from error

    def __enter__(self) -> LogitsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def row(self, chunk: int, position: int) -> Words:
        """Words (row_words,) of a chunk's scored position, counted from its first scored one."""
        size = self.info.row_words * 2
        try:
            self._handle.seek(self._first_row + chunk * self.info.chunk_bytes + position * size)
            return np.fromfile(self._handle, dtype="<u2", count=self.info.row_words)
        except OSError as error:
            raise SlimpiError(f"cannot read {self._path}: {error.strerror}. Record it again.") from error

    def _read_info(self) -> Info:
        """The trailer, once header and size agree with it."""
        size = self._path.stat().st_size
        head = self._handle.read(len(_MAGIC) + 12)
        tail_bytes = 4 + len(_END)
        self._handle.seek(max(0, size - tail_bytes))
        tail = self._handle.read(tail_bytes)
        if len(head) != len(_MAGIC) + 12 or not head.startswith(_MAGIC) or tail[4:] != _END:
            raise SlimpiError(f"{self._path} is not a file of log-probabilities by slimpi. Record it again.")
        (length,) = struct.unpack("<I", tail[:4])
        self._handle.seek(max(0, size - tail_bytes - length))
        info = decode(self._handle.read(length), Info, f"the trailer of {self._path}")
        expected: Any = len(head) + 4 * info.n_chunks * info.n_ctx + info.n_chunks * info.chunk_bytes
        header = struct.unpack("<3i", head[len(_MAGIC) :])
        if header != (info.n_ctx, info.n_vocab, info.n_chunks) or size != expected + length + tail_bytes:
            raise SlimpiError(f"{self._path} is damaged: header, trailer and size disagree. Record it again.")
        return info
