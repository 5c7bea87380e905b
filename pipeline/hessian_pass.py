"""The child process of `pipeline.hessians`: runs the model, sums x x^T of every input, writes the folder.

Apart from its parent so that it need not import torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from device.records import Record, encode, read_record, write_atomic
from device.schema import File, describe_file
from pipeline.activations import MIN_N_CTX, Float32, Session, Tap, check_counts, cut, decode, open_session
from pipeline.native import emit, serve

FORMAT_VERSION = 1
INDEX = "index.json"
KEY = "key.txt"
LAYERS = "blk.*.json"
PROGRESS = "slimpi-progress "


class Input(Record, frozen=True, kw_only=True):
    """One input and the matrices it is multiplied with. hessian: .npy (n (n + 1) / 2,), lower triangle, packed;
    means: .npy (2, n), mean x^2 and mean |x|; float32."""

    matrices: list[str]
    columns: int
    hessian: File
    means: File


class Index(Record, frozen=True, kw_only=True):
    """index.json, history of `version`: 1, 2026-11, the first."""

    version: int
    key: str
    gguf: str
    text: str
    n_ctx: int
    n_tokens: int
    inputs: list[Input]


@dataclass
class _Found:
    """One input in its model's order, named by the first matrix that is multiplied with it."""

    name: str
    columns: int
    matrices: list[str]

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1])

    @property
    def packed_size(self) -> int:
        return self.columns * (self.columns + 1) // 2


@dataclass
class _Sums:
    """Sums over tokens: the packed x x^T in float32, x^2 and |x| in float64."""

    packed: dict[str, Float32] = field(default_factory=dict)
    x2: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    abs_x: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, name: str, address: int, x: Float32) -> None:
        from scipy.linalg import lapack

        n = x.shape[1]
        if name not in self.packed:
            self.packed[name] = np.zeros(n * (n + 1) // 2, np.float32)
            self.x2[name], self.abs_x[name], self.counts[name] = np.zeros(n), np.zeros(n), 0
        old = self.packed[name]
        self.packed[name] = lapack.ssfrk(n, len(x), 1.0, x.T, 1.0, old, uplo="L", overwrite_c=1)
        self.x2[name] += np.einsum("ij,ij->j", x, x, dtype=np.float64)
        self.abs_x[name] += np.abs(x).sum(0, dtype=np.float64)
        self.counts[name] += len(x)


def _handle(request: dict[str, Any]) -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = str(request["threads"])  # scipy's BLAS reads it when it is first imported
    gguf, text, out = Path(request["gguf"]), Path(request["text"]), Path(request["out"])
    session = open_session(gguf, request["n_ctx"], request["threads"], Tap(lambda name, address, x: None))
    chunks = cut(session, text, request["n_chunks"])
    found = _discover(session, chunks[0])
    left = [entry for entry in found if not _layer_file(out, entry.layer).is_file()]
    passes = _passes(left, request["memory_bytes"])
    for n_passed, entries in enumerate(passes):
        tell = partial(_tell, n_passed * len(chunks), len(passes) * len(chunks))
        _run_pass(session, chunks, entries, out, tell)
    layers = sorted({entry.layer for entry in found})
    index = Index(
        version=FORMAT_VERSION,
        key=request["key"],
        gguf=gguf.name,
        text=text.name,
        n_ctx=request["n_ctx"],
        n_tokens=chunks.size,
        inputs=[entry for layer in layers for entry in read_record(_layer_file(out, layer), list[Input])],
    )
    write_atomic(out / INDEX, encode(index))
    for path in (out / KEY, *(_layer_file(out, layer) for layer in layers)):
        path.unlink()


def _tell(before: int, total: int, done: int) -> None:
    emit(f"{PROGRESS}{before + done} {total}")


def _discover(session: Session, chunk: npt.NDArray[np.int32]) -> list[_Found]:
    """Which matrices share an input, from one graph: the inputs of one are the same tensor."""
    found: dict[int, _Found] = {}

    def take(name: str, address: int, x: Float32) -> None:
        found.setdefault(address, _Found(name, x.shape[1], [])).matrices.append(name)

    session.tap.take = take
    decode(session, chunk[:MIN_N_CTX])
    check_counts(session.gguf, {entry.name: MIN_N_CTX for entry in found.values()}, MIN_N_CTX)
    return list(found.values())


def _passes(found: list[_Found], memory_bytes: int) -> list[list[_Found]]:
    """Consecutive layers whose Hessians together fit in memory; a layer that does not fit has a pass of its own."""
    passes: list[list[_Found]] = []
    free = 0
    for _, of_layer in groupby(found, lambda entry: entry.layer):
        entries = list(of_layer)
        size = 4 * sum(entry.packed_size for entry in entries)
        if not passes or size > free:
            passes.append([])
            free = memory_bytes
        passes[-1] += entries
        free -= size
    return passes


def _run_pass(
    session: Session, chunks: npt.NDArray[np.int32], entries: list[_Found], out: Path, tell: Callable[[int], None]
) -> None:
    sums, tap = _Sums(), session.tap
    tap.take, tap.wanted, tap.last = sums.take, frozenset(entry.name for entry in entries), entries[-1].name
    for done, chunk in enumerate(chunks, 1):
        decode(session, chunk)
        tell(done)
    check_counts(session.gguf, sums.counts, chunks.size)
    for layer, of_layer in groupby(entries, lambda entry: entry.layer):
        written = [_write(out, entry, sums, chunks.size) for entry in of_layer]
        write_atomic(_layer_file(out, layer), msgspec.json.encode(written))


def _write(out: Path, entry: _Found, sums: _Sums, n_tokens: int) -> Input:
    packed = sums.packed.pop(entry.name)
    packed /= n_tokens
    means = np.stack([sums.x2[entry.name], sums.abs_x[entry.name]]) / n_tokens
    names = f"{entry.name}.hessian.npy", f"{entry.name}.means.npy"
    for name, array in zip(names, (packed, means.astype(np.float32)), strict=True):
        with (out / name).open("wb") as handle:
            np.save(handle, array, allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
    hessian, means_file = (describe_file(out, name) for name in names)
    return Input(matrices=entry.matrices, columns=entry.columns, hessian=hessian, means=means_file)


def _layer_file(out: Path, layer: int) -> Path:
    return out / LAYERS.replace("*", str(layer))


if __name__ == "__main__":
    sys.exit(serve(_handle))
