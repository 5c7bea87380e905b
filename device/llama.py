"""llama.cpp through llama-cpp-python's low-level functions: as little of it as the tasks need.

Nothing here imports numpy before it is asked for arrays: a process that has imported it runs the very same C code 2 to
3 % slower (seen on x86 with numpy 2.4, why is not known), which `throughput` would measure.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from device.records import SlimpiError

if TYPE_CHECKING:
    from device.runtimes import Logits, Tokens

N_BATCH, N_UBATCH = 2048, 512  # llama-bench's and llama.cpp's defaults
_GGML_LOG_WARN, _GGML_LOG_ERROR = 3, 4  # ggml.h, enum ggml_log_level

# Recent llama.cpp complaints, for error messages; the process opens one model at a time.
_complaints: deque[str] = deque(maxlen=3)


def _binding() -> Any:
    """llama_cpp.llama_cpp without the package around it, which imports numpy and much more for its own models."""
    spec = None if "llama_cpp" in sys.modules else importlib.util.find_spec("llama_cpp")
    if spec is None:  # imported as a whole already, or not installed, which the import says
        return importlib.import_module("llama_cpp.llama_cpp")
    package = ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]  # whoever wants the whole package still gets it


@functools.cache
def llama_api() -> Any:
    """llama-cpp-python's low-level functions, imported and set up once a process.

    llama.cpp's warnings and errors go to stderr and are kept for error messages; its other lines are dropped, as in
    llama-bench. Called by LlamaModel; call it before timing a load.
    """
    api = _binding()

    @api.llama_log_callback
    def listen(level: int, text: bytes, user_data: int | None) -> None:
        if level in (_GGML_LOG_WARN, _GGML_LOG_ERROR) and text.strip():
            line = " ".join(text.decode("utf-8", "replace").split())
            _complaints.append(line)
            sys.stderr.write(line + "\n")

    api.llama_log_set(listen, ctypes.c_void_p(0))
    api.llama_backend_init()
    api.slimpi_log_callback = listen  # C keeps a pointer to it: it must live as long as the library
    return api


class LlamaModel:
    """A GGUF model in llama.cpp on the CPU and one context of it, with the settings of llama-bench:

    mapped file, repacked weights where the CPU has kernels for them, F16 KV cache, flash attention
    decided by llama.cpp, an attached thread pool. Raises SlimpiError for a file llama.cpp refuses; some broken files
    abort the process instead, which is why models are opened in a worker.
    """

    def __init__(self, path: Path, threads: int) -> None:
        api = llama_api()
        self._api, self._path, self._threads = api, path, threads
        self._context: Any = None
        self._pool: Any = None
        _check_magic(path)
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise SlimpiError(f"llama.cpp cannot load {path}: {_complaint()}. Build the artifact again.")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.n_vocab: int = api.llama_vocab_n_tokens(self._vocab)
        self.add_bos: bool = api.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = api.llama_vocab_get_add_eos(self._vocab)
        self.bos: int = api.llama_vocab_bos(self._vocab)
        self._greedy = api.llama_sampler_init_greedy()

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_context()
        self._api.llama_sampler_free(self._greedy)
        self._api.llama_model_free(self._model)

    def open_context(self, n_ctx: int, n_outputs: int = 0, rewinds: bool = False) -> None:
        """Replace the context by an empty one of n_ctx tokens.

        n_outputs bounds how many positions of one batch give logits (0 = all); a bound saves n_vocab floats each.
        rewinds: for `rewind`, whose positions a sliding window's small cache would have dropped.
        """
        api = self._api
        self._close_context()
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.n_outputs_max, params.n_outputs_max_per_seq = n_outputs, 0
        params.swa_full = rewinds  # False as llama-bench and llama-perplexity; the library's own default differs
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise SlimpiError(
                f"llama.cpp cannot make a context of {n_ctx} tokens for {self._path}: {_complaint()}. "
                "Take a smaller n_ctx or free some memory."
            )
        self._pool = _attach_thread_pool(api, self._context, self._threads)

    def tokenize(self, text: bytes) -> Tokens:
        """Tokens of UTF-8 text, with BOS/EOS as the vocabulary says; special tokens in it are plain text."""
        import numpy as np

        buffer = np.empty(len(text) + 2, dtype=np.int32)
        count = self._tokenize(text, buffer)
        if count < 0:  # a vocabulary that makes more tokens than bytes: now the number is known
            buffer = np.empty(-count, dtype=np.int32)
            count = self._tokenize(text, buffer)
        if count < 0:
            raise SlimpiError(f"llama.cpp cannot tokenize a text of {len(text)} bytes. Take a shorter one.")
        return buffer[:count].copy()

    def logits(self, tokens: Tokens, first: int) -> Iterator[tuple[int, Logits]]:
        """Evaluate one fresh sequence; logits of positions >= first, in pieces of at most N_UBATCH positions.

        Yields (position of the first row, rows (n, n_vocab)); the rows are llama.cpp's own memory and hold
        until the next piece is asked for.
        """
        self._clear()
        yield from self.extend(tokens, first)

    def extend(self, tokens: Tokens, first: int) -> Iterator[tuple[int, Logits]]:
        """The same at the sequence's next positions; `first` and the positions yielded count from there."""
        import numpy as np

        for start in range(0, len(tokens), N_UBATCH):
            piece = _array(ctypes.c_int32, tokens[start : start + N_UBATCH].tolist())
            skip = min(max(first - start, 0), len(piece))
            self.run([self._batch(piece, _array(ctypes.c_int8, [i >= skip for i in range(len(piece))]))])
            if skip < len(piece):
                pointer = self._api.llama_get_logits(self._context)
                yield start + skip, np.ctypeslib.as_array(pointer, shape=(len(piece) - skip, self.n_vocab))

    def random_batches(self, n_tokens: int, size: int, seed: int) -> list[Any]:
        """Batches of `size` random tokens, BOS first as the vocabulary says: llama-bench's input."""
        draw = random.Random(seed)  # noqa: S311 (not for secrets)
        tokens = [draw.randrange(self.n_vocab) for _ in range(n_tokens)]
        if self.add_bos:
            tokens[0] = self.bos
        return [self._batch(_array(ctypes.c_int32, tokens[i : i + size])) for i in range(0, n_tokens, size)]

    def reset(self) -> None:
        """Forget the sequence but leave the cache's memory as it is, as llama-bench does between runs."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def rewind(self, n_tokens: int) -> bool:
        """Forget what comes after the sequence's first n_tokens; False where the model cannot (recurrent ones)."""
        memory = self._api.llama_get_memory(self._context)
        return bool(self._api.llama_memory_seq_rm(memory, 0, n_tokens, -1))

    def run(self, batches: Sequence[Any]) -> None:
        """Decode batch after batch at the next positions, waiting for each to be computed."""
        decode, synchronize, context = self._api.llama_decode, self._api.llama_synchronize, self._context
        for batch in batches:
            status = decode(context, batch)
            if status != 0:
                raise SlimpiError(f"llama_decode gave {status} on {self._path}: {_complaint()}. Use a larger n_ctx.")
            synchronize(context)

    def next_token(self) -> int:
        """The most likely token after the last position, by llama.cpp's greedy sampler."""
        return int(self._api.llama_sampler_sample(self._greedy, self._context, -1))

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _tokenize(self, text: bytes, buffer: Tokens) -> int:
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        return int(self._api.llama_tokenize(self._vocab, text, len(text), pointer, len(buffer), True, False))

    def _batch(self, tokens: ctypes.Array[ctypes.c_int32], wanted: ctypes.Array[ctypes.c_int8] | None = None) -> Any:
        """A batch at the sequence's next positions; logits where `wanted`, else of the last token only."""
        batch = self._api.llama_batch(n_tokens=len(tokens))
        batch.token = ctypes.cast(tokens, ctypes.POINTER(ctypes.c_int32))
        if wanted is not None:
            batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        batch.keep = tokens, wanted  # the pointers do not own their arrays
        return batch

    def _close_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._api._lib.ggml_threadpool_free(self._pool)
        self._context = self._pool = None


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * len(values))(*values)


class _ThreadPoolParams(ctypes.Structure):
    """ggml.h: ggml_threadpool_params; GGML_MAX_N_THREADS is 512."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def _attach_thread_pool(api: Any, context: Any, threads: int) -> Any:
    """A thread pool that lives as long as the context, as in llama-bench; without one, a build without OpenMP
    starts its threads anew for every token."""
    pool = new_thread_pool(api._lib, threads)
    api._lib.llama_attach_threadpool.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    api._lib.llama_attach_threadpool.restype = None
    api._lib.llama_attach_threadpool(context, pool, None)
    return pool


def new_thread_pool(library: Any, threads: int) -> Any:
    """A ggml_threadpool with llama.cpp's defaults. The binding lacks these functions, the library has them."""
    library.ggml_threadpool_params_default.argtypes = [ctypes.c_int]
    library.ggml_threadpool_params_default.restype = _ThreadPoolParams
    library.ggml_threadpool_new.argtypes = [ctypes.POINTER(_ThreadPoolParams)]
    library.ggml_threadpool_new.restype = ctypes.c_void_p
    library.ggml_threadpool_free.argtypes = [ctypes.c_void_p]
    library.ggml_threadpool_free.restype = None
    params = library.ggml_threadpool_params_default(threads)
    pool = library.ggml_threadpool_new(ctypes.byref(params))
    if not pool:
        raise SlimpiError(f"llama.cpp cannot start {threads} threads. Take fewer.")
    return pool


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    if magic != b"GGUF":
        raise SlimpiError(f"{path} starts with {magic!r}, not b'GGUF'. Build the artifact again.")


def _complaint() -> str:
    return "; ".join(_complaints) or "it gives no reason"
