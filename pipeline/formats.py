"""What the bits on disk mean: formats, and tensors whose codes are in one of them.

A weight is `scale * grid[code] + offset`, one scale and offset a group of weights of a row. Formats know arrays, not
models; packing to a file's bytes is in `pipeline.packing`, choosing codes in `pipeline.methods`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import gguf
import torch

from device.schema import SlimpiError

Range = tuple[int, int]
"""Smallest and largest integer, both included."""

NOT_CODED: Range = (1, 1)
ABSENT: Range = (0, 0)

# ggml's non-linear 4-bit grid (ggml-common.h, kvalues_iq4nl).
IQ4_GRID = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Codes:
    """How integers become weights: scale * grid[code] + offset.

    The scale of a group is d * scale_code, its offset -dmin * min_code; d and dmin are floats of the whole block.
    scale_range NOT_CODED: a group is a block and d its scale. min_range ABSENT: no offset; NOT_CODED: it is -dmin.
    zero_point: dmin is d itself, so that min_code is the code that means zero.
    """

    group_size: int
    grid: tuple[int, ...]
    scale_range: Range = NOT_CODED
    min_range: Range = ABSENT
    zero_point: bool = False
    float_type: torch.dtype = torch.float16

    @property
    def has_offset(self) -> bool:
        return self.min_range != ABSENT


@dataclass(frozen=True)
class Format:
    """A tensor type. Rows are cut into blocks of `block_size` weights; scales count in `bits_per_weight`.

    `codes` is None for floats and for types whose codes only llama.cpp chooses; `ggml_type` is None outside GGUF.
    """

    name: str
    bits_per_weight: float
    block_size: int
    ggml_type: gguf.GGMLQuantizationType | None = None
    codes: Codes | None = None


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix as its format stores them.

    d, dmin in the format's float_type, (rows, blocks); scale_codes, min_codes int16 (rows, groups). dmin and
    min_codes are None where the format has no offset.
    """

    d: torch.Tensor
    scale_codes: torch.Tensor
    dmin: torch.Tensor | None = None
    min_codes: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """Scale of each group: float32 (rows, groups)."""
        return _spread(self.d, self.scale_codes) * self.scale_codes.float()

    def offsets(self) -> torch.Tensor | None:
        """Offset of each group: float32 (rows, groups), or None."""
        if self.dmin is None or self.min_codes is None:
            return None
        return -(_spread(self.dmin, self.min_codes) * self.min_codes.float())


@dataclass(frozen=True)
class QTensor:
    """A matrix in codes, uint8 (rows, columns): what a file of its format holds, and nothing that it cannot hold."""

    format: Format
    codes: torch.Tensor
    scales: Scales

    def dequantize(self) -> torch.Tensor:
        """float32 (rows, columns), in ggml's order of operations: (d * scale_code) * value - dmin * min_code."""
        kind = self.format.codes
        assert kind is not None
        grid = torch.tensor(kind.grid, dtype=torch.float32, device=self.codes.device)
        values = grid[self.codes.long()] * self.scales.values().repeat_interleave(kind.group_size, 1)
        offsets = self.scales.offsets()
        return values if offsets is None else values + offsets.repeat_interleave(kind.group_size, 1)


def _spread(per_block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return per_block.float().repeat_interleave(like.shape[1] // per_block.shape[1], 1)


def _span(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


_GGML_CODES = {
    "Q4_0": Codes(32, _span(-8, 7)),
    "Q4_1": Codes(32, _span(0, 15), min_range=NOT_CODED),
    "Q5_0": Codes(32, _span(-16, 15)),
    "Q5_1": Codes(32, _span(0, 31), min_range=NOT_CODED),
    "Q8_0": Codes(32, _span(-128, 127)),
    "IQ4_NL": Codes(32, IQ4_GRID),
    "Q2_K": Codes(16, _span(0, 3), scale_range=(0, 15), min_range=(0, 15)),
    "Q3_K": Codes(16, _span(-4, 3), scale_range=(-32, 31)),
    "Q4_K": Codes(32, _span(0, 15), scale_range=(0, 63), min_range=(0, 63)),
    "Q5_K": Codes(32, _span(0, 31), scale_range=(0, 63), min_range=(0, 63)),
    "Q6_K": Codes(16, _span(-32, 31), scale_range=(-128, 127)),
    "IQ4_XS": Codes(32, IQ4_GRID, scale_range=(-32, 31)),
}

FORMATS = {
    ggml_type.name: Format(
        ggml_type.name, 8 * block_bytes / block_size, block_size, ggml_type, _GGML_CODES.get(ggml_type.name)
    )
    for ggml_type, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items()
}
"""Every type the gguf package knows, by its name."""


def check_columns(name: str, columns: int, kind: Format) -> None:
    """SlimpiError if a row of `columns` weights is no whole number of the format's blocks."""
    if columns % kind.block_size:
        raise SlimpiError(
            f"{name} has {columns} columns, which {kind.name}'s blocks of {kind.block_size} do not divide. "
            "Plan another format for it."
        )


def bits_per_weight(tensors: Iterable[tuple[str, str, int, int]]) -> float:
    """Mean bits per weight over (name, type, n_elements, n_bytes), as `read_gguf_types` lists them."""
    sizes = [(n_elements, n_bytes) for _, _, n_elements, n_bytes in tensors]
    return 8 * sum(n_bytes for _, n_bytes in sizes) / sum(n_elements for n_elements, _ in sizes)
