"""llama.cpp's own C quantizers and dequantizers of single matrices, as oracles."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_lib = llama_cpp.llama_cpp._lib
_FLOATS = ctypes.POINTER(ctypes.c_float)


class _Traits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


_lib.ggml_quantize_chunk.restype = ctypes.c_size_t
_lib.ggml_quantize_chunk.argtypes = [
    ctypes.c_int,
    _FLOATS,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    _FLOATS,
]
_lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
_lib.ggml_get_type_traits.argtypes = [ctypes.c_int]


def row_bytes(ggml_type: GGMLQuantizationType, columns: int) -> int:
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
    return columns // block_size * block_bytes


def quantize(w: np.ndarray, ggml_type: GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 (rows, row_bytes) of float32 (rows, columns) with an imatrix of one value a column."""
    w = np.ascontiguousarray(w, np.float32)
    out = np.zeros((w.shape[0], row_bytes(ggml_type, w.shape[1])), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    assert weights is None or weights.shape == w.shape[1:]
    pointer = None if weights is None else weights.ctypes.data_as(_FLOATS)
    written = _lib.ggml_quantize_chunk(
        int(ggml_type), w.ctypes.data_as(_FLOATS), out.ctypes.data, 0, w.shape[0], w.shape[1], pointer
    )
    assert written == out.nbytes
    return out


def dequantize(data: np.ndarray, ggml_type: GGMLQuantizationType, columns: int) -> np.ndarray:
    """float32 (rows, columns) by ggml's to_float."""
    data = np.ascontiguousarray(data)
    out = np.zeros((data.shape[0], columns), np.float32)
    traits = _lib.ggml_get_type_traits(int(ggml_type)).contents
    assert traits.blck_size == GGML_QUANT_SIZES[ggml_type][0]
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out
