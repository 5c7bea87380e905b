"""Round to nearest: scales from each group's extremes, codes from the nearest grid value. No data."""

from __future__ import annotations

import torch

from pipeline.formats import ABSENT, NOT_CODED, Codes, Format, QTensor, Scales, check_columns
from pipeline.layers import Stats


def quantize(w: torch.Tensor, stats: Stats | None, kind: Format) -> tuple[QTensor, list[str]]:
    """w float32 (rows, columns); stats are not looked at."""
    scales = extremes(w, kind)
    return QTensor(kind, nearest(w, scales, kind), scales), []


def extremes(w: torch.Tensor, kind: Format) -> Scales:
    """The scales with which the grid spans each group of w (rows, columns)."""
    codes = codes_of(w, kind)
    groups = w.reshape(w.shape[0], -1, codes.group_size)
    low, high = groups.amin(2), groups.amax(2)
    if not codes.has_offset:
        # The grid reaches furthest on its negative side: its end goes to the extreme of larger magnitude.
        return store(torch.where(low.abs() >= high, low, high) / codes.grid[0], None, kind)
    if codes.min_range != NOT_CODED:
        low, high = low.clamp(max=0), high.clamp(min=0)
    return store((high - low) / (codes.grid[-1] - codes.grid[0]), low, kind)


def store(scale: torch.Tensor, offset: torch.Tensor | None, kind: Format) -> Scales:
    """Scales and offsets of groups, float32 (rows, groups), as near as the format holds them by rounding.

    offset is None where the format has none.
    """
    codes = kind.codes
    assert codes is not None
    blocks = kind.block_size // codes.group_size
    d, scale_codes = _coded(scale, codes.scale_range, blocks, codes.float_type)
    if offset is None:
        return Scales(d, scale_codes)
    if codes.zero_point:
        zero = (-offset * _inverse(_spread(d, blocks))).round().clamp(*codes.min_range)
        return Scales(d, scale_codes, d, zero.to(torch.int16))
    dmin, min_codes = _coded(-offset, codes.min_range, blocks, codes.float_type)
    return Scales(d, scale_codes, dmin, min_codes)


def nearest(w: torch.Tensor, scales: Scales, kind: Format) -> torch.Tensor:
    """uint8 (rows, columns): for each weight the code of the nearest value; on ties the lower code.

    Where a scale is 0 all codes mean the same: the code of the grid value nearest to 0.
    """
    codes = codes_of(w, kind)
    groups = w.reshape(w.shape[0], -1, codes.group_size)
    offset = scales.offsets()
    if offset is not None:
        groups = groups - offset[:, :, None]
    return to_grid(groups * _inverse(scales.values())[:, :, None], codes).reshape(w.shape)


def to_grid(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    """uint8 codes of the grid values nearest to x; on ties the lower code."""
    grid = codes.grid
    if grid[-1] - grid[0] == len(grid) - 1:
        return (x - 0.5).ceil_().clamp_(grid[0], grid[-1]).sub_(grid[0]).to(torch.uint8)
    middles = torch.tensor([(a + b) / 2 for a, b in zip(grid, grid[1:], strict=False)], device=x.device)
    return torch.bucketize(x, middles).to(torch.uint8)


def codes_of(w: torch.Tensor, kind: Format) -> Codes:
    """The format's codes, after checking that it can hold w."""
    check_columns("A matrix", w.shape[1], kind)
    if kind.codes is None:
        raise ValueError(f"the codes of {kind.name} are not ours to choose")
    return kind.codes


def _coded(
    value: torch.Tensor, limits: tuple[int, int], blocks: int, float_type: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """value (rows, groups) as float (rows, groups / blocks) times integer codes within limits."""
    assert limits != ABSENT
    if limits == NOT_CODED:
        d = value.to(float_type)
        return d, torch.ones_like(value, dtype=torch.int16)
    of_block = value.reshape(value.shape[0], -1, blocks)
    low, high = of_block.amin(2), of_block.amax(2)
    top = torch.where(-low > high, low, high) / (limits[0] or limits[1]) if limits[0] else high / limits[1]
    d = top.to(float_type)
    return d, (value * _inverse(_spread(d, blocks))).round().clamp(*limits).to(torch.int16)


def _spread(per_block: torch.Tensor, blocks: int) -> torch.Tensor:
    return per_block.float().repeat_interleave(blocks, 1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, 1 / scale)
