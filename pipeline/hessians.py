"""What GPTQ and its kin need to know of each linear layer's input: its Hessian E[x x^T] and its means.

`collect_stats` runs a GGUF through llama.cpp on a text, in chunks as `pipeline.calibrate` does, and writes a folder;
`load_stats` gives it back as `Stats`. Matrices with the same input (q, k, v; gate, up) share one Hessian.

A Hessian is kept as half a matrix in LAPACK's rectangular full packed format (Gustavson et al. 2010), in memory and
on disk, 2 n^2 bytes for n columns. Those of as many layers as fit in `memory_gib` are summed in one pass over the
text, then written; further layers take further passes, each of which stops computing after its last layer. Beside
them a pass holds the mapped model, one chunk's logits and one layer's activations.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from device.records import SlimpiError, read_record, sha256_file, write_atomic
from device.schema import File, verify_file
from pipeline.activations import MIN_N_CTX, Float32
from pipeline.hessian_pass import FORMAT_VERSION, INDEX, KEY, LAYERS, PROGRESS, Index, Input
from pipeline.layers import Stats
from pipeline.native import run_fresh
from pipeline.store import digest, tool_versions


def collect_stats(
    gguf: Path,
    text: Path,
    out: Path,
    n_ctx: int = 512,
    n_chunks: int = 0,
    threads: int = 1,
    memory_gib: float = 6.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write the statistics of `gguf`'s inputs on `text` to the folder `out` and return it.

    Chunks and errors are `collect_importance`'s. `out` appears whole or not at all; what a killed run had finished,
    whole layers, is kept beside it and not computed again. An `out` that holds just what is asked for is left as it
    is. One process at a time may write an `out`.
    """
    _check(gguf, text, n_ctx, n_chunks, threads, memory_gib)
    key = digest([FORMAT_VERSION, sha256_file(gguf), sha256_file(text), n_ctx, n_chunks, tool_versions()])
    if (out / INDEX).is_file() and _read_index(out).key == key:
        return out
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists() and not ((partial / KEY).is_file() and (partial / KEY).read_text() == key):
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_atomic(partial / KEY, key.encode())
    except OSError as error:
        raise SlimpiError(f"cannot write in {partial}: {error.strerror}. Choose another folder.") from error

    def on_line(line: str) -> None:
        if progress and line.startswith(PROGRESS):
            done, total = line.removeprefix(PROGRESS).split()
            progress(int(done), int(total), "chunks")

    request = {"gguf": str(gguf), "text": str(text), "out": str(partial), "n_ctx": n_ctx, "n_chunks": n_chunks}
    request |= {"threads": threads, "memory_bytes": int(memory_gib * 2**30), "key": key}
    try:
        run_fresh("pipeline.hessian_pass", request, on_line, f"calibration of {gguf.name}")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        if partial.exists() and not any(partial.glob(LAYERS)):
            shutil.rmtree(partial)
    return out


def load_stats(folder: Path) -> dict[str, Stats]:
    """Stats by tensor name (`blk.0.attn_q.weight`), one object for all matrices that share an input.

    Means are read at once, a Hessian whenever it is asked for, and both are checked against their hashes.
    """
    index = _read_index(folder)
    found: dict[str, Stats] = {}
    for entry in index.inputs:
        means = torch.from_numpy(_load(folder, entry.means, (2, entry.columns)))
        stats = Stats(means[0], means[1], index.n_tokens, _Reader(folder, entry))
        found |= dict.fromkeys(entry.matrices, stats)
    return found


@dataclass(frozen=True)
class _Reader:
    folder: Path
    entry: Input

    def __call__(self) -> torch.Tensor:
        n = self.entry.columns
        full = _unpack(_load(self.folder, self.entry.hessian, (n * (n + 1) // 2,)), n)
        return torch.from_numpy(full)


def _unpack(packed: Float32, n: int) -> Float32:
    from scipy.linalg import lapack

    lower, info = lapack.stfttr(n, packed, uplo="L")
    assert info == 0
    full: Float32 = lower.T  # its upper triangle, in C order
    for start in range(0, n, 512):  # block by block: a transposed copy of the whole would cost as much again
        end = min(start + 512, n)
        full[end:, start:end] = full[start:end, end:].T
        corner = full[start:end, start:end]
        corner[...] = np.triu(corner) + np.triu(corner, 1).T
    return full


def _load(folder: Path, file: File, shape: tuple[int, ...]) -> Float32:
    path = verify_file(folder, file)
    array: Float32 = np.load(path, allow_pickle=False)
    if array.dtype != np.float32 or array.shape != shape:
        raise SlimpiError(f"{path} holds {array.dtype} {array.shape}, not float32 {shape}. Calibrate again.")
    return array


def _read_index(folder: Path) -> Index:
    if not (folder / INDEX).is_file():
        raise SlimpiError(f"{folder} holds no calibration statistics. Run calibration first.")
    index = read_record(folder / INDEX, Index)
    if index.version != FORMAT_VERSION:
        raise SlimpiError(
            f"{folder} has version {index.version}, this slimpi reads {FORMAT_VERSION}. Delete it and calibrate again."
        )
    return index


def _check(gguf: Path, text: Path, n_ctx: int, n_chunks: int, threads: int, memory_gib: float) -> None:
    if n_ctx < MIN_N_CTX or n_chunks < 0 or threads < 1 or not memory_gib > 0:
        raise SlimpiError(
            f"n_ctx {n_ctx}, n_chunks {n_chunks}, threads {threads}, memory_gib {memory_gib}: use n_ctx >= "
            f"{MIN_N_CTX}, n_chunks >= 0 (0 = all), threads >= 1 and memory_gib > 0."
        )
    for path in (gguf, text):
        if not path.is_file():
            raise SlimpiError(f"{path} is not a file. Check the path.")
