"""From the free scales and offsets of groups to what a format stores, block by block.

Two-level formats give a block one float step for the scales of its groups, and one for the offsets. The steps are
chosen among several by the quadratic that the error is near its optimum; the integers by the true error, climbing
over their neighbours; then steps by least squares and integers by climbing take turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from pipeline.formats import NOT_CODED, Codes, Format, Range, Scales
from pipeline.methods.rtn import store, store_affine
from pipeline.methods.search_groups import AROUND, Fit, Groups, affine_search, is_more, plain_search, reciprocal

_STEP_FACTORS = (0.9, 0.94, 0.97, 1.0, 1.03, 1.07, 1.12)
_OFFSET_STEP_FACTORS = (0.9, 0.95, 1.0, 1.06, 1.13)
_TURNS = 2


@dataclass(frozen=True)
class _Place:
    """What groups store, as floats (n,): scale = step * code + base, and offset = -zero_step * min_code, or in formats
    with a pool -scale * (zero_step * min_code + zero_base).

    Without offset zero_step and min_code are 0; base and zero_base are None in formats without a pool. gain counts
    the group's importance.
    """

    step: torch.Tensor
    code: torch.Tensor
    zero_step: torch.Tensor
    min_code: torch.Tensor
    gain: torch.Tensor
    base: torch.Tensor | None = None
    zero_base: torch.Tensor | None = None

    def scale(self) -> torch.Tensor:
        scale = self.step * self.code
        return scale if self.base is None else scale + self.base

    def offset(self, scale: torch.Tensor) -> torch.Tensor:
        below = self.zero_step * self.min_code
        return -below if self.zero_base is None else -scale * (below + self.zero_base)

    def mixed(self, other: _Place, more: torch.Tensor) -> _Place:
        """The other's values where `more` (n,) is 1, not 0."""

        def mix(name: str) -> torch.Tensor:
            ours, theirs = getattr(self, name), getattr(other, name)
            return ours if ours is theirs else torch.lerp(ours, theirs, more)

        return replace(self, **{name: mix(name) for name in ("step", "code", "zero_step", "min_code", "gain")})


def store_fit(groups: Groups, fit: Fit, kind: Format, rows: int) -> Scales:
    """The scales of `rows` rows, whose groups these are."""
    codes = kind.codes
    assert codes is not None
    scale, offset = fit.scale.view(rows, -1), None
    if codes.has_offset:
        offset = (fit.offset + groups.mean).view(rows, -1)
    if codes.scale_range == NOT_CODED:
        return store(scale, offset, kind)
    if codes.pool > 1:
        return _settle_pooled(groups, store(scale, offset, kind))
    return _settle(groups, fit, kind, rows)


def _settle(groups: Groups, fit: Fit, kind: Format, rows: int) -> Scales:
    codes = groups.codes
    per_block = kind.block_size // codes.group_size
    place = _first_steps(groups, fit, per_block)
    if codes.has_offset:
        for radius in affine_search(codes).code_radii:
            place = _climb(groups, place, radius)
    else:
        place = _scan(groups, place, plain_search(codes).code_factors)
        place = _climb(groups, place, 1)
    for _ in range(_TURNS):
        refitted = _evaluated(groups, _refitted(groups, place, per_block))
        more = is_more(_sums(refitted.gain, per_block), _sums(place.gain, per_block))
        place = _climb(groups, place.mixed(refitted, _each_group(more, per_block)), 1)

    def of_block(values: torch.Tensor) -> torch.Tensor:
        return values[::per_block].to(codes.float_type).view(rows, -1)

    scales = Scales(of_block(place.step), _integers(place.code, rows))
    if not codes.has_offset:
        return scales
    return replace(scales, dmin=of_block(place.zero_step), min_codes=_integers(place.min_code, rows))


def _first_steps(groups: Groups, fit: Fit, per_block: int) -> _Place:
    """Steps and integers of least error, were the error of each group the quadratic around its free fit."""
    codes = groups.codes
    _, of_qq, of_q = groups.moments(reciprocal(fit.scale), fit.offset if codes.has_offset else None)
    curvature = of_qq if of_q is None else of_qq - of_q * of_q
    place, least = None, torch.full_like(fit.scale, torch.inf)
    for step, code in _coded(fit.scale, codes.scale_range, per_block, _STEP_FACTORS, codes):
        lost = curvature * (step * code - fit.scale) ** 2
        below = torch.zeros_like(step)
        offsets: Iterable[tuple[torch.Tensor, torch.Tensor]] = [(below, below)]
        if of_q is not None:
            below = step * code * of_q - groups.mean
            offsets = _coded(below.clamp(min=0), codes.min_range, per_block, _OFFSET_STEP_FACTORS, codes)
        for zero_step, min_code in offsets:
            all_lost = lost + (zero_step * min_code - below) ** 2
            in_block = _each_group(_sums(all_lost * groups.total, per_block), per_block)
            found = _Place(step, code, zero_step, min_code, -in_block)
            place = found if place is None else place.mixed(found, is_more(least, in_block))
            least = torch.minimum(least, in_block)
    assert place is not None
    return _evaluated(groups, place)


def _coded(
    value: torch.Tensor, limits: Range, per_block: int, factors: tuple[float, ...], codes: Codes
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """value (n,) as a step for each block, these factors times the one that just reaches, and integers."""
    in_block = value.view(-1, per_block)
    low, high = in_block.amin(1), in_block.amax(1)
    reach = torch.where(low.abs() >= high, low, high) / limits[0] if limits[0] else high / limits[1]
    for factor in factors:
        step = _stored(reach * factor, codes, per_block)
        yield step, (value * reciprocal(step)).round_().clamp_(*limits)


def _evaluated(groups: Groups, place: _Place) -> _Place:
    scale = place.scale()
    offset = place.offset(scale) - groups.mean if groups.codes.has_offset else None
    of_xq, of_qq, of_q = groups.moments(reciprocal(scale), offset)
    gain = torch.addcmul(of_xq * 2, scale, of_qq, value=-1).mul_(scale)
    if offset is not None and of_q is not None:
        gain.addcmul_(torch.addcmul(offset, scale, of_q, value=2), offset, value=-1)
    return replace(place, gain=gain.mul_(groups.total))


def _best(groups: Groups, place: _Place, others: Iterable[_Place]) -> _Place:
    for other in others:
        found = _evaluated(groups, other)
        place = place.mixed(found, is_more(found.gain, place.gain))
    return place


def _scan(groups: Groups, place: _Place, factors: tuple[float, ...]) -> _Place:
    limits = groups.codes.scale_range
    return _best(groups, place, (replace(place, code=(place.code * by).round_().clamp_(*limits)) for by in factors))


def _climb(groups: Groups, place: _Place, radius: int) -> _Place:
    """The best of the integers this far around each group's."""
    codes = groups.codes

    def moved(values: torch.Tensor, by: int, limits: Range) -> torch.Tensor:
        return (values + by).clamp_(*limits) if by else values

    return _best(
        groups,
        place,
        (
            replace(
                place,
                code=moved(place.code, up * radius, codes.scale_range),
                min_code=moved(place.min_code, down * radius, codes.min_range),
            )
            for up, down in (AROUND if codes.has_offset else ((-1, 0), (1, 0)))
        ),
    )


def _refitted(groups: Groups, place: _Place, per_block: int) -> _Place:
    """Steps of each block by least squares, all integers as they are."""
    codes = groups.codes
    scale = place.scale()
    offset = place.offset(scale) - groups.mean if codes.has_offset else None
    of_xq, of_qq, of_q = groups.moments(reciprocal(scale), offset)
    code, min_code, total = place.code, place.min_code, groups.total
    scale_scale = _sums(total * code * code * of_qq, per_block)
    if of_q is None:
        step = _sums(total * code * of_xq, per_block) * reciprocal(scale_scale)
        return replace(place, step=_stored(step, codes, per_block))
    scale_min = -_sums(total * code * min_code * of_q, per_block)
    min_min = _sums(total * min_code * min_code, per_block)
    scale_w = _sums(total * code * (of_xq + groups.mean * of_q), per_block)
    min_w = -_sums(total * min_code * groups.mean, per_block)
    determinant = scale_scale * min_min - scale_min**2
    sound = is_more(determinant, 1e-6 * scale_scale * min_min)
    divisor = torch.lerp(torch.ones_like(determinant), determinant, sound)
    step = torch.lerp(place.step[::per_block], (scale_w * min_min - min_w * scale_min) / divisor, sound)
    zero_step = torch.lerp(place.zero_step[::per_block], (min_w * scale_scale - scale_w * scale_min) / divisor, sound)
    return replace(place, step=_stored(step, codes, per_block), zero_step=_stored(zero_step, codes, per_block))


def _stored(step: torch.Tensor, codes: Codes, per_block: int) -> torch.Tensor:
    return _each_group(step.to(codes.float_type).float(), per_block)


def _settle_pooled(groups: Groups, scales: Scales) -> Scales:
    """Zeros that suit the stored scales, and integers climbing."""
    rows = scales.scale_codes.shape[0]
    scale = scales.values().flatten()
    offsets = scales.offsets()
    assert offsets is not None
    _, _, of_q = groups.moments(reciprocal(scale), offsets.flatten() - groups.mean)
    assert of_q is not None
    zero = of_q - groups.mean * reciprocal(scale)
    dmin, zero_base, min_codes = store_affine(zero.view(rows, -1), groups.codes.min_range, groups.codes)
    scales = replace(scales, dmin=dmin, zero_base=zero_base, min_codes=min_codes)

    def spread(of_pool: torch.Tensor | None) -> torch.Tensor:
        assert of_pool is not None
        return of_pool.float().repeat_interleave(scales.pool, 0)[:rows].flatten()

    place = _Place(
        spread(scales.d),
        scales.scale_codes.float().flatten(),
        spread(dmin),
        min_codes.float().flatten(),
        torch.zeros_like(scale),
        spread(scales.scale_base),
        spread(zero_base),
    )
    place = _evaluated(groups, place)
    for radius in affine_search(groups.codes).code_radii:
        place = _climb(groups, place, radius)
    return replace(scales, scale_codes=_integers(place.code, rows), min_codes=_integers(place.min_code, rows))


def _integers(values: torch.Tensor, rows: int) -> torch.Tensor:
    return values.to(torch.int16).view(rows, -1)


def _sums(values: torch.Tensor, per_block: int) -> torch.Tensor:
    return values.view(-1, per_block).sum(1)


def _each_group(of_block: torch.Tensor, per_block: int) -> torch.Tensor:
    """repeat_interleave, but fast."""
    return of_block[:, None].expand(-1, per_block).reshape(-1)
