"""One forward pass over a text: what llama.cpp's quantizer needs to know of each linear layer's input.

`collect_importance` runs a GGUF through llama.cpp and sums x^2 per input column of every block matrix, chunk
by chunk as llama-imatrix does (llama.cpp tools/imatrix/imatrix.cpp), in a fresh process.
"""

from __future__ import annotations

import ctypes
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

from device.schema import SlimpiError
from pipeline.native import emit, run_fresh, serve

Float32 = npt.NDArray[np.float32]

FORMAT_VERSION = 1
MIN_N_CTX = 16  # llama.cpp's own collector ignores shorter products: those of single-token decoding
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


class _Tensor(ctypes.Structure):
    """ggml_tensor as in ggml/include/ggml.h of the pinned llama.cpp, up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


_GGML_F32 = 0


@dataclass
class _Collector:
    """Sums of x^2 per column in float64, and the rows summed, of every block matrix llama.cpp multiplies by."""

    op_name: Callable[[int], bytes]
    get_name: Callable[[int], bytes]
    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    def __call__(self, address: int, ask: bool, user_data: Any) -> bool:
        """llama.cpp's cb_eval: asked before a node runs (want it?), called again after it ran."""
        if self.problem:
            return False
        node = _Tensor.from_address(address)
        op = self.op_name(node.op)
        if op == b"MUL_MAT_ID":
            self.problem = "it is a mixture of experts, which calibration does not support"
        if op != b"MUL_MAT":
            return not ask
        weight, x = (_Tensor.from_address(source) for source in node.src[:2])
        if self.get_name(node.src[0]) != weight.name:
            self.problem = "this llama.cpp lays its tensors out differently; install the pinned llama-cpp-python"
            return not ask
        name = weight.name.decode()
        wanted = name.startswith("blk.") and x.type == _GGML_F32 and x.ne[1] >= MIN_N_CTX
        if ask or not wanted:
            return wanted if ask else True
        self._add(name, x)
        return True

    def _add(self, name: str, x: _Tensor) -> None:
        if x.ne[2] != 1 or x.ne[3] != 1 or x.nb[0] != 4 or x.nb[1] % 4:
            self.problem = f"the input of {name}, shape {list(x.ne)}, strides {list(x.nb)}, is not rows of floats"
            return
        columns, rows, stride = x.ne[0], x.ne[1], x.nb[1] // 4
        flat = (ctypes.c_float * ((rows - 1) * stride + columns)).from_address(x.data)
        values = np.lib.stride_tricks.as_strided(np.ctypeslib.as_array(flat), (rows, columns), (x.nb[1], 4))
        sums = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        if not np.isfinite(sums).all():
            self.problem = f"the input of {name} is not finite"
            return
        self.sums[name] = self.sums.get(name, np.zeros(columns)) + sums
        self.counts[name] = self.counts.get(name, 0) + rows


def _handle(request: dict[str, Any]) -> None:
    import llama_cpp
    from llama_cpp._ggml import libggml

    libggml.ggml_op_name.restype = libggml.ggml_get_name.restype = ctypes.c_char_p
    libggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    collector = _Collector(libggml.ggml_op_name, libggml.ggml_get_name)
    gguf, text, n_ctx = Path(request["gguf"]), Path(request["text"]), request["n_ctx"]
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SlimpiError(f"llama.cpp cannot load {gguf}. Check that it is a whole GGUF of a supported architecture.")
    n_train = llama_cpp.llama_model_n_ctx_train(model)
    if n_ctx > n_train:
        raise SlimpiError(f"n_ctx {n_ctx} is longer than the {n_train} tokens {gguf.name} was made for. Lower n_ctx.")
    chunks = _chunks(llama_cpp.llama_model_get_vocab(model), text, n_ctx, request["n_chunks"])
    ctx, keep = _new_context(model, n_ctx, request["threads"], collector)
    for done, chunk in enumerate(chunks, 1):
        _decode(ctx, chunk)
        if collector.problem:
            raise SlimpiError(f"cannot calibrate {gguf.name}: {collector.problem}.")
        emit(f"{_PROGRESS}{done} {len(chunks)}")
    del keep
    if not collector.sums:
        raise SlimpiError(f"{gguf.name} has no block matrices to calibrate. Use a language model's GGUF.")
    for name, count in collector.counts.items():
        if count != chunks.size:
            raise SlimpiError(f"cannot calibrate {gguf.name}: {name} saw {count} of {chunks.size} tokens.")
    mean_x2 = {name: (sums / collector.counts[name]).astype(np.float32) for name, sums in collector.sums.items()}
    _save(Path(request["out"]), Importance(mean_x2, chunks.size, n_ctx, text.name))


def _chunks(vocab: Any, text: Path, n_ctx: int, n_chunks: int) -> npt.NDArray[np.int32]:
    """(n, n_ctx) tokens; the first of each chunk is BOS if the model adds one."""
    import llama_cpp

    try:
        data = text.read_text(encoding="utf-8").encode()
    except UnicodeDecodeError as error:
        raise SlimpiError(f"{text} is not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error
    buffer = (llama_cpp.llama_token * (len(data) + 8))()
    n_tokens = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), True, False)
    if n_tokens < n_ctx:
        raise SlimpiError(f"{text} has {n_tokens} tokens, one chunk needs {n_ctx}. Use more text or a smaller n_ctx.")
    tokens = np.ctypeslib.as_array(buffer)[:n_tokens].astype(np.int32)
    available = n_tokens // n_ctx
    if n_chunks > available:
        raise SlimpiError(f"{text} has {available} chunks of {n_ctx} tokens, {n_chunks} asked. Use more text or fewer.")
    n = n_chunks or available
    chunks = tokens[: n * n_ctx].reshape(n, n_ctx).copy()
    if llama_cpp.llama_vocab_get_add_bos(vocab):
        chunks[:, 0] = llama_cpp.llama_vocab_bos(vocab)
    return chunks


def _new_context(model: Any, n_ctx: int, threads: int, collector: _Collector) -> tuple[Any, Any]:
    """A context of one chunk a batch, and what must stay referenced while it is used."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = n_ctx
    params.n_ubatch = min(n_ctx, 512)
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = threads
    callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(collector)
    params.cb_eval = callback
    ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise SlimpiError(f"llama.cpp gives no context of {n_ctx} tokens: out of memory? Lower n_ctx.")
    return ctx, callback


def _decode(ctx: Any, chunk: npt.NDArray[np.int32]) -> None:
    """Run one chunk from an empty cache; every token is an output, else the last block sees only some."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    n = len(chunk)
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    try:
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = int(chunk[i])
            batch.pos[i] = i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        status = llama_cpp.llama_decode(ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status:
        raise SlimpiError(f"llama.cpp cannot run a chunk of {n} tokens (status {status}). Lower n_ctx or free memory.")


if __name__ == "__main__":
    sys.exit(serve(_handle))
