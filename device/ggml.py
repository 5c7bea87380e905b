"""Matrix products by llama.cpp's own kernels, alone: what decoding spends its time on, one format and shape at a time.

The functions of ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h, which llama-cpp-python ships but does not bind.
Weights lie where llama.cpp would put them: in the first of the CPU's extra buffer types (repacked for its kernels)
that takes the product, else in plain memory (llama-model.cpp, make_cpu_buft_list; llama-model-loader.cpp).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.llama import llama_api, new_thread_pool
from device.records import SlimpiError

Float32 = NDArray[np.float32]

# ggml.h, enum ggml_type: what weights are quantized into. The numbers are GGUF's, and stay.
WEIGHT_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
}  # fmt: skip
_CPU = 0  # enum ggml_backend_dev_type
_SAMPLE_ROWS = 64  # rows that differ; a matrix repeats them, since no kernel's time depends on the values
_MIB = 2**20


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


_POINTER, _INT, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t

# name: (result, arguments)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_type_name": (ctypes.c_char_p, [_INT]),
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), [_INT]),
    "ggml_row_size": (_SIZE, [_INT, _INT64]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [_INT]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER]),
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _INT64, _INT64]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph_custom": (_POINTER, [_POINTER, _SIZE, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_backend_dev_by_type": (_POINTER, [_INT]),
    "ggml_backend_dev_init": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
    "ggml_backend_dev_buffer_type": (_POINTER, [_POINTER]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_POINTER, _POINTER]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
    "ggml_backend_cpu_set_threadpool": (None, [_POINTER, _POINTER]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
    "ggml_threadpool_free": (None, [_POINTER]),
}


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(llama_api()._lib._name)  # functions of our own: nobody else sets their signatures
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Backend:
    """llama.cpp's CPU backend with a pool of threads of its own, as a context of it has."""

    def __init__(self, threads: int) -> None:
        self.ggml = _library()
        self.device = self.ggml.ggml_backend_dev_by_type(_CPU)
        self.handle = self.ggml.ggml_backend_dev_init(self.device, None)
        self._pool = new_thread_pool(self.ggml, threads)
        self.ggml.ggml_backend_cpu_set_n_threads(self.handle, threads)
        self.ggml.ggml_backend_cpu_set_threadpool(self.handle, self._pool)

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.ggml.ggml_backend_free(self.handle)
        self.ggml.ggml_threadpool_free(self._pool)

    def buffer_types(self) -> list[int]:
        """The CPU's buffer types in llama.cpp's order of preference: extra ones, then plain memory."""
        registry = self.ggml.ggml_backend_dev_backend_reg(self.device)
        address = self.ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra: list[int] = []
        if address:
            get = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)
            listed = get(self.device)
            while listed and (pointer := listed[len(extra)]) is not None:
                extra.append(pointer)
        return [*extra, self.ggml.ggml_backend_dev_buffer_type(self.device)]


class Products:
    """`copies` matrices of one format and shape, each multiplied by the same n_tokens columns of activations.

    Close (or leave `with`) frees them. `buffer` names the memory the weights lie in, such as CPU or CPU_REPACK.
    """

    def __init__(self, backend: Backend, weights: Weights, copies: int, n_tokens: int) -> None:
        self._backend, self._weights, self._n_tokens = backend, weights, n_tokens
        ggml = backend.ggml
        with contextlib.ExitStack() as stack:
            self._graph: int = 0
            for buffer_type in backend.buffer_types():
                with contextlib.ExitStack() as attempt:
                    if self._build(attempt, buffer_type, copies):
                        self.buffer = ggml.ggml_backend_buft_name(buffer_type).decode()
                        stack.push(attempt.pop_all())
                        break
            else:
                raise SlimpiError(f"llama.cpp has no product of {weights.kind} {weights.rows}x{weights.columns} here.")
            self._stack = stack.pop_all()

    def __enter__(self) -> Products:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self, stack: contextlib.ExitStack, buffer_type: int, copies: int) -> bool:
        """Allocate, fill and link; False where this buffer type does not take the product."""
        ggml, w = self._backend.ggml, self._weights
        probe = _context(stack, copies + 1, 0)
        matrices = [ggml.ggml_new_tensor_2d(probe, w.type, w.columns, w.rows) for _ in range(copies)]
        _allocate(stack, probe, buffer_type, copies * w.n_bytes)
        plain = _context(stack, copies + 2, copies)
        x = ggml.ggml_new_tensor_2d(plain, WEIGHT_TYPES["F32"], w.columns, self._n_tokens)
        outputs = [ggml.ggml_mul_mat(plain, matrix, x) for matrix in matrices]
        if not ggml.ggml_backend_dev_supports_op(self._backend.device, outputs[0]):
            return False
        cpu = self._backend.buffer_types()[-1]
        _allocate(stack, plain, cpu, 4 * (copies * w.rows + w.columns) * self._n_tokens)
        data = w.data()
        for matrix in matrices:
            ggml.ggml_backend_tensor_set(matrix, data.ctypes.data, 0, w.n_bytes)
        self._graph = ggml.ggml_new_graph_custom(plain, copies + 2, False)
        for output in outputs:
            ggml.ggml_build_forward_expand(self._graph, output)
        rng = np.random.default_rng(1)
        self.x: Float32 = rng.standard_normal((self._n_tokens, w.columns)).astype(np.float32)
        ggml.ggml_backend_tensor_set(x, self.x.ctypes.data, 0, self.x.nbytes)
        self._last = outputs[-1]
        return True

    def compute(self) -> None:
        """All the products, one after the other, as the nodes of a decode graph are."""
        status = self._backend.ggml.ggml_backend_graph_compute(self._backend.handle, self._graph)
        if status != 0:
            raise SlimpiError(f"ggml_backend_graph_compute gave {status} for {self._weights.kind}. Free some memory.")

    def relative_error(self) -> float:
        """|y - W x| / |W x| of the last product computed: what the kernel makes of the weights it was given."""
        w = self._weights
        got = np.empty((self._n_tokens, w.rows), np.float32)
        self._backend.ggml.ggml_backend_tensor_get(self._last, got.ctypes.data, 0, got.nbytes)
        expected = np.resize((self.x.astype(np.float64) @ w.sample.T).T, (w.rows, self._n_tokens)).T
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


class Weights:
    """A random matrix (rows, columns) in a format: `sample` holds the float values of the rows that it repeats.

    SlimpiError for a format that llama.cpp does not quantize into, or whose blocks do not divide the columns.
    """

    def __init__(self, kind: str, rows: int, columns: int) -> None:
        ggml = _library()
        if kind not in WEIGHT_TYPES:
            raise SlimpiError(f"llama.cpp has no format {kind!r} for weights. Known: {', '.join(WEIGHT_TYPES)}.")
        self.kind, self.rows, self.columns, self.type = kind, rows, columns, WEIGHT_TYPES[kind]
        traits = ggml.ggml_get_type_traits(self.type).contents
        if columns % traits.block_size:
            raise SlimpiError(f"{columns} columns are not divisible by {kind}'s blocks of {traits.block_size}.")
        n_sample = min(rows, _SAMPLE_ROWS)
        values = np.random.default_rng(0).standard_normal((n_sample, columns)).astype(np.float32)
        row_bytes = ggml.ggml_row_size(self.type, columns)
        self.n_bytes = rows * row_bytes
        self._packed = packed = np.empty(n_sample * row_bytes, np.uint8)
        needed = ggml.ggml_quantize_requires_imatrix(self.type)
        ones = np.ones(columns, np.float32)
        importance = ones.ctypes.data if needed else None
        ggml.ggml_quantize_chunk(self.type, values.ctypes.data, packed.ctypes.data, 0, n_sample, columns, importance)
        self.sample = values
        if kind != "F32":
            traits.to_float(packed.ctypes.data, values.ctypes.data, values.size)

    def data(self) -> NDArray[np.uint8]:
        """The whole matrix's bytes, made anew: they may be hundreds of MiB."""
        return np.resize(self._packed, self.n_bytes)


def _context(stack: contextlib.ExitStack, n_tensors: int, n_nodes: int) -> int:
    """A ggml context for the descriptions of so many tensors and a graph; their data lies in a buffer."""
    ggml = _library()
    graph_bytes = ggml.ggml_graph_overhead_custom(n_nodes + 2, False)
    size = (n_tensors + n_nodes) * ggml.ggml_tensor_overhead() + graph_bytes
    context: int = ggml.ggml_init(_InitParams(size, None, True))
    stack.callback(ggml.ggml_free, context)
    return context


def _allocate(stack: contextlib.ExitStack, context: int, buffer_type: int, n_bytes: int) -> None:
    ggml = _library()
    buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
    if not buffer:
        raise SlimpiError(f"no memory for matrices of {n_bytes / _MIB:.0f} MiB. Take a smaller working_set_mib.")
    stack.callback(ggml.ggml_backend_buffer_free, buffer)
