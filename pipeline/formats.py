"""What the bits on disk mean: ggml's tensor types, their blocks and bits per weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import gguf


@dataclass(frozen=True)
class Format:
    """A tensor type. Rows are cut into blocks of `block_size` weights; scales count in `bits_per_weight`."""

    name: str
    bits_per_weight: float
    block_size: int
    ggml_type: gguf.GGMLQuantizationType


FORMATS = {
    ggml_type.name: Format(ggml_type.name, 8 * block_bytes / block_size, block_size, ggml_type)
    for ggml_type, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items()
}
"""Every type the gguf package knows, by its name."""


def bits_per_weight(tensors: Iterable[tuple[str, str, int, int]]) -> float:
    """Mean bits per weight over (name, type, n_elements, n_bytes), as `read_gguf_types` lists them."""
    sizes = [(n_elements, n_bytes) for _, _, n_elements, n_bytes in tensors]
    return 8 * sum(n_bytes for _, n_bytes in sizes) / sum(n_elements for n_elements, _ in sizes)
