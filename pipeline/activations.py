"""The inputs of a GGUF's block matrices, as llama.cpp computes them. Child process only: see `pipeline.native`.

A `Session` runs chunks of a text through the model; its `Tap` is llama.cpp's cb_eval and hands on the float32 rows
that every block matrix is multiplied with (as llama.cpp tools/imatrix/imatrix.cpp collects them).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from device.records import SlimpiError

Float32 = npt.NDArray[np.float32]
Take = Callable[[str, int, Float32], None]
"""(matrix's tensor name, address of its input's tensor, input (rows, columns), valid until it returns)."""

MIN_N_CTX = 16  # llama.cpp's own collector ignores shorter products: those of single-token decoding
_GGML_F32 = 0


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


@dataclass
class Tap:
    """llama.cpp's cb_eval. `take` gets the input of each matrix in `wanted` (None: of all block matrices); after the
    matrix `last`, if named, the rest of the model is not computed. `problem` says why the run must end."""

    take: Take
    wanted: frozenset[str] | None = None
    last: str = ""
    problem: str = ""
    op_name: Callable[[int], bytes] = field(init=False)
    get_name: Callable[[int], bytes] = field(init=False)

    def __post_init__(self) -> None:
        from llama_cpp._ggml import libggml

        libggml.ggml_op_name.restype = libggml.ggml_get_name.restype = ctypes.c_char_p
        libggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        self.op_name, self.get_name = libggml.ggml_op_name, libggml.ggml_get_name

    def __call__(self, address: int, ask: bool, user_data: Any) -> bool:
        """Asked before a node runs (want it?), called again after it ran (go on?)."""
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
        wanted = name.startswith("blk.") if self.wanted is None else name in self.wanted
        wanted = wanted and x.type == _GGML_F32 and x.ne[1] >= MIN_N_CTX
        if ask or not wanted:
            return wanted if ask else True
        self._read(name, node.src[1], x)
        return name != self.last

    def _read(self, name: str, address: int, x: _Tensor) -> None:
        if x.ne[2] != 1 or x.ne[3] != 1 or x.nb[0] != 4 or x.nb[1] % 4:
            self.problem = f"the input of {name}, shape {list(x.ne)}, strides {list(x.nb)}, is not rows of floats"
            return
        columns, rows, stride = x.ne[0], x.ne[1], x.nb[1] // 4
        flat = (ctypes.c_float * ((rows - 1) * stride + columns)).from_address(x.data)
        values = np.lib.stride_tricks.as_strided(np.ctypeslib.as_array(flat), (rows, columns), (x.nb[1], 4))
        if not np.isfinite(values).all():
            self.problem = f"the input of {name} is not finite"
            return
        self.take(name, address, values)


@dataclass(frozen=True)
class Session:
    """A loaded model, a context of n_ctx tokens, and its tap; lives until its process ends."""

    gguf: Path
    n_ctx: int
    tap: Tap
    model: Any
    ctx: Any
    callback: Any  # what llama.cpp calls: it must not be collected while the context lives


def open_session(gguf: Path, n_ctx: int, threads: int, tap: Tap) -> Session:
    """SlimpiError for a model llama.cpp refuses, or a context longer than the model's."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SlimpiError(f"llama.cpp cannot load {gguf}. Check that it is a whole GGUF of a supported architecture.")
    n_train = llama_cpp.llama_model_n_ctx_train(model)
    if n_ctx > n_train:
        raise SlimpiError(f"n_ctx {n_ctx} is longer than the {n_train} tokens {gguf.name} was made for. Lower n_ctx.")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = n_ctx
    params.n_ubatch = min(n_ctx, 512)
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = threads
    callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(tap)
    params.cb_eval = callback
    ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise SlimpiError(f"llama.cpp gives no context of {n_ctx} tokens: out of memory? Lower n_ctx.")
    return Session(gguf, n_ctx, tap, model, ctx, callback)


def cut(session: Session, text: Path, n_chunks: int) -> npt.NDArray[np.int32]:
    """(n, n_ctx) tokens, the rest dropped, n_chunks 0 = all; the first of each chunk is BOS if the model adds one."""
    import llama_cpp

    vocab, n_ctx = llama_cpp.llama_model_get_vocab(session.model), session.n_ctx
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


def decode(session: Session, chunk: npt.NDArray[np.int32]) -> None:
    """Run one chunk from an empty cache; every token is an output, else the last block sees only some."""
    import llama_cpp

    ctx = session.ctx
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
    if session.tap.problem:
        raise SlimpiError(f"cannot calibrate {session.gguf.name}: {session.tap.problem}.")


def check_counts(gguf: Path, counts: dict[str, int], n_tokens: int) -> None:
    """SlimpiError unless every matrix saw every token."""
    if not counts:
        raise SlimpiError(f"{gguf.name} has no block matrices to calibrate. Use a language model's GGUF.")
    for name, count in counts.items():
        if count != n_tokens:
            raise SlimpiError(f"cannot calibrate {gguf.name}: {name} saw {count} of {n_tokens} tokens.")
