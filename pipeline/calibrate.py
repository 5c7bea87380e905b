"""One forward pass over a text: what llama.cpp's quantizer needs to know of each linear layer's input.

`collect_importance` runs a GGUF through llama.cpp and sums x^2 per input column of every block matrix, chunk
by chunk as llama-imatrix does (llama.cpp tools/imatrix/imatrix.cpp), in a fresh process.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from device.records import SlimpiError
from pipeline.activations import MIN_N_CTX, Float32, Tap, check_counts, cut, decode, open_session
from pipeline.native import emit, run_fresh, serve

FORMAT_VERSION = 1
_PROGRESS = "slimpi-progress "
_META = "meta"
_PREFIX = "mean_x2/"


@dataclass(frozen=True)
class Importance:
    """Mean x^2 of each linear layer's input: {tensor: (n_columns,) float32}, over n_tokens tokens."""

    mean_x2: dict[str, Float32]
    n_tokens: int
    n_ctx: int
    text: str

    @property
    def n_chunks(self) -> int:
        return self.n_tokens // self.n_ctx


def collect_importance(
    gguf: Path,
    text: Path,
    out: Path,
    n_ctx: int = 512,
    n_chunks: int = 0,
    threads: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write the importance matrix of `gguf` on `text` to `out` (.npz) and return `out`.

    The text is cut into chunks of n_ctx tokens, the rest dropped; n_chunks 0 = all. BOS replaces each chunk's
    first token if the model adds one. Raises SlimpiError for a text shorter than one chunk, a context longer
    than the model's, a mixture of experts, a model llama.cpp refuses, or activations that are not finite.
    """
    if n_ctx < MIN_N_CTX or n_chunks < 0 or threads < 1:
        raise SlimpiError(
            f"n_ctx {n_ctx}, n_chunks {n_chunks}, threads {threads}: "
            f"use n_ctx >= {MIN_N_CTX}, n_chunks >= 0 (0 = all) and threads >= 1."
        )
    for path in (gguf, text):
        if not path.is_file():
            raise SlimpiError(f"{path} is not a file. Check the path.")

    def on_line(line: str) -> None:
        if progress and line.startswith(_PROGRESS):
            done, total = line.removeprefix(_PROGRESS).split()
            progress(int(done), int(total), "chunks")

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    request = {"gguf": str(gguf), "text": str(text), "out": str(partial), "n_ctx": n_ctx, "n_chunks": n_chunks}
    try:
        run_fresh("pipeline.calibrate", {**request, "threads": threads}, on_line, f"calibration of {gguf.name}")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def load_importance(path: Path) -> Importance:
    """Read an importance matrix: ours (.npz) or llama-imatrix's (.gguf). SlimpiError if it is neither."""
    if not path.is_file():
        raise SlimpiError(f"importance matrix {path} is not a file. Run calibration first.")
    try:
        importance = _read_gguf(path) if path.suffix == ".gguf" else _read_npz(path)
    except (ValueError, KeyError, IndexError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SlimpiError(f"{path} is not an importance matrix ({error}). Calibrate again.") from error
    for tensor, values in importance.mean_x2.items():
        if values.ndim != 1 or values.dtype != np.float32 or not np.isfinite(values).all() or (values < 0).any():
            raise SlimpiError(f"{path}: `{tensor}` has values that are no mean squares. Calibrate again.")
    return importance


def _save(path: Path, importance: Importance) -> None:
    meta = {
        "version": FORMAT_VERSION,
        "n_tokens": importance.n_tokens,
        "n_ctx": importance.n_ctx,
        "text": importance.text,
    }
    arrays = {_PREFIX + name: values for name, values in sorted(importance.mean_x2.items())}
    with path.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **{_META: np.array(json.dumps(meta))}, **arrays)
        handle.flush()
        os.fsync(handle.fileno())


def _read_npz(path: Path) -> Importance:
    with np.load(path, allow_pickle=False) as data:
        meta = json.loads(str(data[_META]))
        if meta["version"] != FORMAT_VERSION:
            raise ValueError(f"version {meta['version']}, this slimpi reads {FORMAT_VERSION}")
        mean_x2 = {key.removeprefix(_PREFIX): data[key] for key in data.files if key.startswith(_PREFIX)}
    return Importance(mean_x2, meta["n_tokens"], meta["n_ctx"], meta["text"])


def _read_gguf(path: Path) -> Importance:
    """llama-imatrix's file: `<tensor>.in_sum2` (1, n_columns) and `<tensor>.counts` (1, 1), both float32."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    n_ctx = int(reader.fields["imatrix.chunk_size"].contents())
    n_chunks = int(reader.fields["imatrix.chunk_count"].contents())
    texts = reader.fields["imatrix.datasets"].contents() or [""]
    mean_x2 = {}
    for name in sorted(tensors):
        if not name.endswith(".in_sum2"):
            continue
        tensor = name.removesuffix(".in_sum2")
        counts = tensors[f"{tensor}.counts"].reshape(-1)
        if counts.size != 1:
            raise ValueError(f"`{tensor}` has {counts.size} experts; mixtures of experts are not supported")
        mean_x2[tensor] = (tensors[name].reshape(-1) / counts[0]).astype(np.float32)
    return Importance(mean_x2, n_chunks * n_ctx, n_ctx, Path(str(texts[0])).name)


# Child process from here on.


@dataclass
class _Sums:
    """Sums of x^2 per column in float64, and the rows summed, of every block matrix llama.cpp multiplies by."""

    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    latest: tuple[int, npt.NDArray[np.float64]] = (0, np.zeros(0))

    def take(self, name: str, address: int, x: Float32) -> None:
        if address != self.latest[0]:  # query, key and value have one input, so have gate and up
            self.latest = address, np.einsum("ij,ij->j", x, x, dtype=np.float64)
        self.sums[name] = self.sums.get(name, 0.0) + self.latest[1]
        self.counts[name] = self.counts.get(name, 0) + len(x)


def _handle(request: dict[str, Any]) -> None:
    gguf, text = Path(request["gguf"]), Path(request["text"])
    found = _Sums()
    session = open_session(gguf, request["n_ctx"], request["threads"], Tap(found.take))
    chunks = cut(session, text, request["n_chunks"])
    for done, chunk in enumerate(chunks, 1):
        decode(session, chunk)
        # From the second chunk on nothing behind the last matrix is computed: the logits are a fifth of a small model.
        session.tap.last, found.latest = next(reversed(found.counts), ""), (0, np.zeros(0))
        emit(f"{_PROGRESS}{done} {len(chunks)}")
    check_counts(gguf, found.counts, chunks.size)
    mean_x2 = {name: (sums / found.counts[name]).astype(np.float32) for name, sums in found.sums.items()}
    _save(Path(request["out"]), Importance(mean_x2, chunks.size, request["n_ctx"], text.name))


if __name__ == "__main__":
    sys.exit(serve(_handle))
