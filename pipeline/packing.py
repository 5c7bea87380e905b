"""Codes to the bytes of a file and back, bit by bit: ggml's block types, and ONNX Runtime's MatMulNBits.

Layouts are from ggml-common.h and ggml-quants.c of llama.cpp, and ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.formats import ABSENT, NOT_CODED, Format, Packed, QTensor, Scales

Bytes = NDArray[Any]
"""uint8."""


@dataclass(frozen=True)
class Bits:
    """A run of bytes in a block: `width` bits from bit `shift` on of each of a block's values of one source.

    Byte l of each run of `stride` bytes holds the values l, l + stride, l + 2 stride... from its low bits up. Values
    count from their range's lower end. flip is xor-ed in: 128 makes two's complement of excess 128.
    """

    source: str
    width: int
    stride: int = 1
    shift: int = 0
    flip: int = 0


@dataclass(frozen=True)
class Half:
    """A little-endian float16 of the block, negated if it is the minimum itself."""

    source: str
    negated: bool = False


_D, _DMIN, _MIN = Half("d"), Half("dmin"), Half("dmin", negated=True)

_LAYOUTS: dict[str, tuple[Bits | Half, ...]] = {
    "Q4_0": (_D, Bits("codes", 4, 16)),
    "Q4_1": (_D, _MIN, Bits("codes", 4, 16)),
    "Q5_0": (_D, Bits("codes", 1, 1, shift=4), Bits("codes", 4, 16)),
    "Q5_1": (_D, _MIN, Bits("codes", 1, 1, shift=4), Bits("codes", 4, 16)),
    "Q8_0": (_D, Bits("codes", 8, flip=128)),
    "IQ4_NL": (_D, Bits("codes", 4, 16)),
    "Q2_K": (Bits("scales_mins", 4, 16), Bits("codes", 2, 32), _D, _DMIN),
    "Q3_K": (
        Bits("codes", 1, 32, shift=2),
        Bits("codes", 2, 32),
        Bits("scales", 4, 8),
        Bits("scales", 2, 4, shift=4),
        _D,
    ),
    "Q4_K": (_D, _DMIN, Bits("scales_k4", 8), Bits("codes", 4, 32)),
    "Q5_K": (_D, _DMIN, Bits("scales_k4", 8), Bits("codes", 1, 32, shift=4), Bits("codes", 4, 32)),
    "Q6_K": (Bits("codes", 4, 64), Bits("codes", 2, 32, shift=4), Bits("scales", 8, flip=128), _D),
    "IQ4_XS": (_D, Bits("scales", 2, 1, shift=4), Bits("scales", 4, 1), Bits("codes", 4, 16)),
}


def pack(q: QTensor | Packed) -> Bytes:
    """uint8 (rows, bytes of a row): q as GGUF stores it."""
    if isinstance(q, Packed):
        return q.data
    layout = _layout(q.format)
    values = _values(q)
    rows, columns = q.codes.shape
    blocks = rows * columns // q.format.block_size
    parts = []
    for part in layout:
        if isinstance(part, Bits):
            data = _interleave((values[part.source] >> part.shift) & ((1 << part.width) - 1), part.width, part.stride)
            parts.append(data ^ part.flip)
        else:
            half = getattr(q.scales, part.source).cpu().numpy().reshape(blocks, 1)
            parts.append((-half if part.negated else half).astype("<f2").view(np.uint8))
    return np.concatenate(parts, 1).reshape(rows, -1)


def unpack(data: Bytes, kind: Format, columns: int) -> QTensor:
    """The codes of uint8 (rows, bytes of a row) of `kind`: what `pack` made them from."""
    layout = _layout(kind)
    assert kind.codes is not None
    rows = data.shape[0]
    block_bytes = round(kind.bits_per_weight * kind.block_size / 8)
    blocks = np.ascontiguousarray(data).reshape(rows * columns // kind.block_size, block_bytes)
    values: dict[str, Any] = {}
    at = 0
    for part in layout:
        if isinstance(part, Bits):
            end = at + _counts(kind)[part.source] * part.width // 8
            found = _separate(blocks[:, at:end] ^ part.flip, part.width, part.stride) << part.shift
            values[part.source] = values.get(part.source, 0) | found
        else:
            end = at + 2
            half = np.ascontiguousarray(blocks[:, at:end]).view("<f2").astype(np.float16).reshape(rows, -1)
            values[part.source] = -half if part.negated else half
        at = end
    assert at == block_bytes
    return _qtensor(values, kind, rows, columns)


def pack_matmul_nbits(q: QTensor) -> tuple[Bytes, NDArray[np.float32], Bytes | None]:
    """B uint8 (rows, groups, bytes of a group), scales float32 (rows, groups), zero points uint8 (rows, bytes) or
    None: the inputs of MatMulNBits(N=rows, K=columns, bits, block_size) for x @ q.T."""
    codes = q.format.codes
    assert codes is not None
    if q.format.ggml_type is not None or codes.pool > 1:
        raise ValueError(f"{q.format.name} is no format of MatMulNBits")
    rows, groups = q.scales.scale_codes.shape
    width = (len(codes.grid) - 1).bit_length()
    data = _interleave(q.codes.cpu().numpy(), width, 1).reshape(rows, groups, -1)
    zeros = None
    if codes.zero_point:
        assert q.scales.min_codes is not None
        # Each row's zero points start at a byte of their own.
        padded = np.zeros((rows, groups + -groups % (8 // width)), np.uint8)
        padded[:, :groups] = q.scales.min_codes.cpu().numpy()
        zeros = _interleave(padded, width, 1)
    return data, q.scales.d.cpu().numpy().astype(np.float32), zeros


class Nibbles(NamedTuple):
    """Inputs of a MatMulNBits of 4 bits, and what its x is multiplied with first."""

    factor: int
    data: Bytes
    zeros: Bytes | None


def pack_in_nibbles(q: QTensor) -> tuple[tuple[Nibbles, Nibbles], NDArray[np.float32]]:
    """Codes of 8 bits as the sum of two products of 4: ((high, low), the scales of both).

    scale (code - zero) x = scale (high - zero's high) (16 x) + scale (low - zero's low) x, exactly. ONNX Runtime has
    fast kernels for 4 bits everywhere; of 8 it unpacks the whole matrix for every call where activations are fp32.
    """
    data, scales, zeros = pack_matmul_nbits(q)
    rows, groups, _ = data.shape
    points = zeros[:, :groups] if zeros is not None else None
    padding = [(0, 0), (0, groups % 2)]

    high_zeros = None if points is None else _interleave(np.pad(points >> 4, padding), 4, 1)
    # 128, which 8 bits have for zero where nothing is said, is 8 in the high half, 4 bits' own, and none in the low.
    low_points = np.zeros((rows, groups), np.uint8) if points is None else points & 15
    low_zeros = _interleave(np.pad(low_points, padding), 4, 1)
    high, low = (_interleave(half, 4, 1).reshape(rows, groups, -1) for half in (data >> 4, data & 15))
    return (Nibbles(16, high, high_zeros), Nibbles(1, low, low_zeros)), scales


def _layout(kind: Format) -> tuple[Bits | Half, ...]:
    if kind.name not in _LAYOUTS:
        raise ValueError(f"{kind.name} has no layout of codes in GGUF; known: {', '.join(_LAYOUTS)}")
    return _LAYOUTS[kind.name]


def _counts(kind: Format) -> dict[str, int]:
    """Values of each source in a block."""
    assert kind.codes is not None
    groups = kind.block_size // kind.codes.group_size
    return {"codes": kind.block_size, "scales": groups, "scales_mins": 2 * groups, "scales_k4": 12}


def _values(q: QTensor) -> dict[str, Bytes]:
    """uint8 (blocks, values of a block) of each source."""
    kind = q.format.codes
    assert kind is not None
    values = {"codes": q.codes.cpu().numpy().reshape(-1, q.format.block_size)}
    groups = q.format.block_size // kind.group_size
    if kind.scale_range != NOT_CODED:
        scale_codes = q.scales.scale_codes.cpu().numpy().reshape(-1, groups)
        values["scales"] = (scale_codes - kind.scale_range[0]).astype(np.uint8)
        if q.scales.min_codes is not None:
            mins = q.scales.min_codes.cpu().numpy().reshape(-1, groups).astype(np.uint8)
            values["scales_mins"] = np.concatenate([values["scales"], mins], 1)
            if kind.scale_range == (0, 63):
                values["scales_k4"] = _join_k4(values["scales"], mins)
    return values


def _qtensor(values: dict[str, Any], kind: Format, rows: int, columns: int) -> QTensor:
    codes = kind.codes
    assert codes is not None
    groups = kind.block_size // codes.group_size
    if "scales_k4" in values:
        values["scales"], values["mins"] = _split_k4(values["scales_k4"])
    if "scales_mins" in values:
        values["scales"], values["mins"] = np.split(values["scales_mins"], [groups], axis=1)
    ones = np.ones((rows, columns // codes.group_size), np.int16)
    scale_codes, min_codes = ones, ones
    if codes.scale_range != NOT_CODED:
        scale_codes = (values["scales"].astype(np.int16) + codes.scale_range[0]).reshape(rows, -1)
    if codes.min_range not in (ABSENT, NOT_CODED):
        min_codes = values["mins"].astype(np.int16).reshape(rows, -1)
    d = torch.from_numpy(values["d"])
    scales = Scales(d, torch.from_numpy(scale_codes))
    if codes.has_offset:
        scales = Scales(d, torch.from_numpy(scale_codes), torch.from_numpy(values["dmin"]), torch.from_numpy(min_codes))
    return QTensor(kind, torch.from_numpy(values["codes"]).reshape(rows, columns), scales)


def _interleave(values: Bytes, width: int, stride: int) -> Bytes:
    """(n, count) values of `width` bits -> (n, count * width / 8) bytes."""
    runs = values.reshape(values.shape[0], -1, 8 // width, stride)
    data = np.zeros((runs.shape[0], runs.shape[1], stride), np.uint8)
    for at in range(8 // width):
        data |= runs[:, :, at] << (at * width)
    return data.reshape(values.shape[0], -1)


def _separate(data: Bytes, width: int, stride: int) -> Bytes:
    """The inverse of `_interleave`."""
    runs = data.reshape(data.shape[0], -1, 1, stride)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[None, None, :, None]
    return ((runs >> shifts) & ((1 << width) - 1)).reshape(data.shape[0], -1)


def _join_k4(scales: Bytes, mins: Bytes) -> Bytes:
    """Eight 6-bit scales and mins in 12 bytes: the first four scales and mins whole, the last four's low nibbles in
    bytes of their own and their high bits on top of the first four."""
    top = [first[:, :4] | (first[:, 4:] >> 4 << 6) for first in (scales, mins)]
    return np.concatenate([*top, (scales[:, 4:] & 15) | (mins[:, 4:] << 4)], 1)


def _split_k4(data: Bytes) -> tuple[Bytes, Bytes]:
    scales, mins, low = np.split(data, 3, axis=1)
    return (
        np.concatenate([scales & 63, (low & 15) | (scales >> 6 << 4)], 1),
        np.concatenate([mins & 63, (low >> 4) | (mins >> 6 << 4)], 1),
    )
