"""Types whose codes only llama.cpp chooses (its IQ2 and IQ3 lattices): blocks of columns by its own quantizer.

ggml-quants.c's search takes one importance a column. `gptq` calls it for a super-block at a time, on the goal that the
errors of the blocks before have moved.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from pipeline.formats import Format, Packed, check_columns

TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def choose(w: torch.Tensor, importance: torch.Tensor, kind: Format) -> Packed:
    """w float32 (rows, columns), finite; importance (columns,) or (1,), not negative. On the CPU, in all of torch's
    threads."""
    check_columns("A matrix", w.shape[1], kind)
    if kind.name not in TYPES or not w.isfinite().all():
        raise ValueError(f"{kind.name} of {tuple(w.shape)}: not one of {', '.join(TYPES)}, or not finite")
    rows, columns = w.shape
    values = np.ascontiguousarray(w.cpu().numpy(), np.float32)
    # A column that counts nothing still needs a number: the search divides by sums of them.
    floor = max(1e-6 * float(importance.mean()), 1e-30)
    weights = np.ascontiguousarray(importance.clamp(min=floor).expand(columns).cpu().numpy(), np.float32)
    data = np.empty((rows, round(columns * kind.bits_per_weight / 8)), np.uint8)

    def fill(part: slice) -> None:
        chunk = values[part]
        arguments = (kind.ggml_type, chunk.ctypes.data, data[part].ctypes.data, 0, len(chunk), columns)
        _quantize_chunk()(*arguments, weights.ctypes.data)

    size = -(-rows // torch.get_num_threads())
    _quantize_init()(kind.ggml_type)  # builds tables that all rows share
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, (slice(start, start + size) for start in range(0, rows, size))))
    return Packed(kind, data, columns)


@cache
def _quantize_chunk() -> Any:
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


@cache
def _quantize_init() -> Any:
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_init
    function.restype, function.argtypes = None, [ctypes.c_int]
    return function
