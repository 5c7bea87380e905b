"""What the bits on disk mean: formats, and tensors whose codes are in one of them.

A weight is `scale * grid[code] + offset`, one scale and offset a group of weights of a row. Formats know arrays, not
models; packing to a file's bytes is in `pipeline.packing`, choosing codes in `pipeline.methods`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from device.records import SlimpiError

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
    pool: d and dmin are of one group in that many consecutive rows, and there scales and zeros are affine in their
    codes: scale = d * scale_code + scale_base, zero = dmin * min_code + zero_base, offset = -scale * zero.
    """

    group_size: int
    grid: tuple[int, ...]
    scale_range: Range = NOT_CODED
    min_range: Range = ABSENT
    zero_point: bool = False
    pool: int = 1
    float_type: torch.dtype = torch.float16

    @property
    def has_offset(self) -> bool:
        return self.min_range != ABSENT

    @property
    def is_uniform(self) -> bool:
        """Whether the grid is all integers from its first to its last."""
        return self.grid[-1] - self.grid[0] == len(self.grid) - 1

    @property
    def any_offset(self) -> bool:
        """Whether an offset may have either sign, so that the grid need not span 0."""
        return self.min_range == NOT_CODED


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
    min_codes are None where the format has no offset. Formats with a pool have d, dmin, scale_base and zero_base of
    (pools, groups), the last pool perhaps of fewer rows; the others have no bases.
    """

    d: torch.Tensor
    scale_codes: torch.Tensor
    dmin: torch.Tensor | None = None
    min_codes: torch.Tensor | None = None
    scale_base: torch.Tensor | None = None
    zero_base: torch.Tensor | None = None
    pool: int = 1

    def values(self) -> torch.Tensor:
        """Scale of each group: float32 (rows, groups)."""
        values = self._spread(self.d) * self.scale_codes.float()
        return values if self.scale_base is None else values + self._spread(self.scale_base)

    def offsets(self) -> torch.Tensor | None:
        """Offset of each group: float32 (rows, groups), or None."""
        if self.dmin is None or self.min_codes is None:
            return None
        below = self._spread(self.dmin) * self.min_codes.float()
        return -below if self.zero_base is None else -(below + self._spread(self.zero_base)) * self.values()

    def _spread(self, stored: torch.Tensor) -> torch.Tensor:
        rows, groups = self.scale_codes.shape
        wide = stored.float().repeat_interleave(groups // stored.shape[1], 1)
        return wide if self.pool == 1 else wide.repeat_interleave(self.pool, 0)[:rows]


def side_by_side(parts: Sequence[Scales]) -> Scales:
    """The scales of a matrix from those of its column slices, each of whole blocks."""

    def joined(tensors: list[Any]) -> Any:
        return torch.cat(tensors, 1) if isinstance(tensors[0], torch.Tensor) else tensors[0]

    return Scales(**{field.name: joined([getattr(part, field.name) for part in parts]) for field in fields(Scales)})


@dataclass(frozen=True)
class QTensor:
    """A matrix in codes, uint8 (rows, columns): what a file of its format holds, and nothing that it cannot hold."""

    format: Format
    codes: torch.Tensor
    scales: Scales

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """float32 (rows, columns), in ggml's order of operations: (d * scale_code) * value - dmin * min_code."""
        kind = self.format.codes
        assert kind is not None
        grid = torch.tensor(kind.grid, dtype=torch.float32, device=self.codes.device)
        groups = self.codes.view(*self.scales.scale_codes.shape, kind.group_size)
        values = grid[groups.int()].mul_(self.scales.values()[:, :, None])
        offsets = self.scales.offsets()
        return (values if offsets is None else values.add_(offsets[:, :, None])).view(self.codes.shape)


def rows_of(q: QTensor, order: torch.Tensor) -> QTensor:
    """The rows of `q` in another order (rows,). Not for formats whose scales are shared by rows."""
    assert q.scales.pool == 1

    def taken(value: Any) -> Any:
        return value[order] if isinstance(value, torch.Tensor) else value

    scales = Scales(**{field.name: taken(getattr(q.scales, field.name)) for field in fields(Scales)})
    return QTensor(q.format, q.codes[order], scales)


@dataclass(frozen=True)
class Packed:
    """A matrix in a type whose codes are llama.cpp's own: uint8 (rows, bytes of a row), as its file holds it."""

    format: Format
    data: NDArray[np.uint8]
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.data), self.columns))

    def dequantize(self) -> torch.Tensor:
        """float32 (rows, columns)"""
        assert self.format.ggml_type is not None
        return torch.from_numpy(gguf.quants.dequantize(self.data, self.format.ggml_type)).float()


Quantized = QTensor | Packed


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

# ONNX Runtime's MatMulNBits: a float32 scale a group, and without zero points code 8 or 128 means zero.
_ONNX_CODES = {
    f"INT{bits}_G{size}{suffix}": Codes(
        size,
        _span(0, 2**bits - 1) if suffix else _span(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        min_range=(0, 2**bits - 1) if suffix else ABSENT,
        zero_point=bool(suffix),
        float_type=torch.float32,
    )
    for bits in (4, 8)
    for size in (16, 32, 64, 128, 256)
    for suffix in ("", "_ZP")
}

# MXQ (Zhang et al. 2025): b1 bits in groups of g1, scales and zeros in b2 bits in groups of g2. HQQ's order makes
# neighbours within a row a group of scales; here it is neighbours within a column, so that column slices are whole.
_MXQ_POOL, _MXQ_SCALE_BITS = 128, 8
_MXQ_CODES = {
    f"MXQ_B{bits}_G{size}": Codes(
        size,
        _span(0, 2**bits - 1),
        scale_range=(0, 2**_MXQ_SCALE_BITS - 1),
        min_range=(0, 2**_MXQ_SCALE_BITS - 1),
        pool=_MXQ_POOL,
    )
    for bits in (2, 3, 4, 8)
    for size in (32, 64, 128)
}


def _code_bits(codes: Codes) -> int:
    return (len(codes.grid) - 1).bit_length()


def _onnx_bits(codes: Codes) -> float:
    return _code_bits(codes) + (32 + (_code_bits(codes) if codes.zero_point else 0)) / codes.group_size


def _mxq_bits(codes: Codes) -> float:
    """The paper's equation 2: b1 + 2 b2 / g1, and for each g2 scales and g2 zeros a float16 scale and base."""
    return _code_bits(codes) + 2 * _MXQ_SCALE_BITS / codes.group_size + 2 * 2 * 16 / (codes.group_size * codes.pool)


FORMATS = {
    ggml_type.name: Format(
        ggml_type.name, 8 * block_bytes / block_size, block_size, ggml_type, _GGML_CODES.get(ggml_type.name)
    )
    for ggml_type, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items()
}
FORMATS |= {
    name: Format(name, bits_of(codes), codes.group_size, codes=codes)
    for of_kind, bits_of in ((_ONNX_CODES, _onnx_bits), (_MXQ_CODES, _mxq_bits))
    for name, codes in of_kind.items()
}
"""Every type the gguf package knows by its name there, MatMulNBits' INT<bits>_G<group>[_ZP], and MXQ_B<b1>_G<g1>."""


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
