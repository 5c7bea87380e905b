"""Round to nearest: scales from each group's extremes, codes from the nearest grid value. No data."""

from __future__ import annotations

from functools import cache

import torch

from pipeline.formats import NOT_CODED, Codes, Format, QTensor, Range, Scales, check_columns
from pipeline.layers import Stats

_CHUNK = 1 << 17


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
    if not codes.any_offset:
        low, high = low.clamp(max=0), high.clamp(min=0)
    return store((high - low) / (codes.grid[-1] - codes.grid[0]), low, kind)


def store(scale: torch.Tensor, offset: torch.Tensor | None, kind: Format) -> Scales:
    """Scales and offsets of groups, float32 (rows, groups), as near as the format holds them by rounding.

    offset is None where the format has none.
    """
    codes = kind.codes
    assert codes is not None
    if codes.pool > 1:
        assert offset is not None
        return _store_pooled(scale, offset, codes)
    blocks = kind.block_size // codes.group_size
    d, scale_codes = _coded(scale, codes.scale_range, blocks, codes.float_type)
    if offset is None:
        return Scales(d, scale_codes)
    if codes.zero_point:
        zero = (-offset * inverse(d.float())).round().clamp(*codes.min_range)
        return Scales(d, scale_codes, d, zero.to(torch.int16))
    dmin, min_codes = _coded(-offset, codes.min_range, blocks, codes.float_type)
    return Scales(d, scale_codes, dmin, min_codes)


def nearest(w: torch.Tensor, scales: Scales, kind: Format) -> torch.Tensor:
    """uint8 (rows, columns): for each weight the code of the nearest value; on ties the lower code.

    Where a scale is 0 all codes mean the same: the code of the grid value nearest to 0.
    """
    codes = codes_of(w, kind)
    inverse_scale, offset = inverse(scales.values())[:, :, None], scales.offsets()
    groups = w.reshape(w.shape[0], -1, codes.group_size)
    found = torch.empty(groups.shape, dtype=torch.uint8, device=w.device)
    # Some rows at a time, so that the floats between stay in cache.
    per_chunk = max(1, _CHUNK // w.shape[1]) if w.device.type == "cpu" else w.shape[0]
    for start in range(0, w.shape[0], per_chunk):
        rows = slice(start, start + per_chunk)
        x = groups[rows] if offset is None else groups[rows] - offset[rows, :, None]
        found[rows] = to_grid(x * inverse_scale[rows], codes)
    return found.view(w.shape)


def to_grid(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    """uint8 codes of the grid values nearest to x; on ties the lower code."""
    first, last = codes.grid[0], codes.grid[-1]
    if codes.is_uniform:
        return (x - 0.5).ceil_().clamp_(first, last).sub_(first).to(torch.uint8)
    at = (x.clamp(first, last) - first).mul_(2).ceil_().to(torch.int32)
    return half_steps(codes, x.device).index_select(0, at.flatten()).view(x.shape)


@cache
def half_steps(codes: Codes, device: torch.device) -> torch.Tensor:
    """uint8: the code nearest to all x in (first + (k - 1) / 2, first + k / 2], for k from 0 to the grid's end.

    Middles between neighbours of an integer grid are ends of such intervals.
    """
    insides = [codes.grid[0] + k / 2 - 0.25 for k in range(2 * (codes.grid[-1] - codes.grid[0]) + 1)]
    nearest_codes = [min(range(len(codes.grid)), key=lambda code: abs(codes.grid[code] - x)) for x in insides]
    return torch.tensor(nearest_codes, dtype=torch.uint8, device=device)


def codes_of(w: torch.Tensor, kind: Format) -> Codes:
    """The format's codes, after checking that it can hold w."""
    check_columns("A matrix", w.shape[1], kind)
    if kind.codes is None:
        raise ValueError(f"the codes of {kind.name} are not ours to choose")
    return kind.codes


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def _coded(value: torch.Tensor, limits: Range, blocks: int, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """value (rows, groups) as float (rows, groups / blocks) times integer codes within limits."""
    if limits == NOT_CODED:
        return value.to(kind), torch.ones_like(value, dtype=torch.int16)
    of_block = value.reshape(value.shape[0], -1, blocks)
    low, high = of_block.amin(2), of_block.amax(2)
    # As with weights: the range reaches furthest on its negative side, if it has one.
    top = torch.where(low.abs() >= high, low, high) / limits[0] if limits[0] else high / limits[1]
    d = top.to(kind)
    codes = (of_block * inverse(d.float())[:, :, None]).round().clamp(*limits)
    return d, codes.to(torch.int16).reshape(value.shape)


def _store_pooled(scale: torch.Tensor, offset: torch.Tensor, codes: Codes) -> Scales:
    d, base, scale_codes = store_affine(scale, codes.scale_range, codes)
    stored = Scales(d, scale_codes, scale_base=base, pool=codes.pool)
    dmin, zero_base, min_codes = store_affine(-offset * inverse(stored.values()), codes.min_range, codes)
    return Scales(d, scale_codes, dmin, min_codes, base, zero_base, codes.pool)


def store_affine(value: torch.Tensor, limits: Range, codes: Codes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """value (rows, groups) in pools of rows: step and base (pools, groups), and codes with value = base + step code."""
    rows = value.shape[0]
    last = value[-1:].expand(-rows % codes.pool, -1)
    pools = torch.cat([value, last]).reshape(-1, codes.pool, value.shape[1])
    base = pools.amin(1).to(codes.float_type)
    # A little more than needed, so that rounding to float16 does not leave the last code short of the maximum.
    step = ((pools.amax(1) - base.float()) / limits[1] * (1 + 2**-11) + 2**-25).to(codes.float_type)
    found = ((pools - base.float()[:, None]) * inverse(step.float())[:, None]).round().clamp(*limits)
    return step, base, found.to(torch.int16).reshape(-1, value.shape[1])[:rows]
