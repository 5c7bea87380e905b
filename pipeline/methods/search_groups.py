"""Groups of weights with importances, laid out for search, and the best free scale and offset of each.

Groups lie side by side: every tensor is (size, n) or (n,), so that all sums run over contiguous memory. A trial is one
pass over the weights: codes by rounding at some scale and offset, then the scale and offset that suit those codes
best, by weighted least squares. Trials start from a sweep and then move around the best one found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.formats import Codes
from pipeline.methods.rtn import half_steps


@dataclass(frozen=True)
class PlainSearch:
    """Without offset: where the group's extreme is put, relative to the grid's longer end, on its side (and on the
    other); moves of that end from there, in steps of the grid; then factors tried on integer scale codes."""

    levels: int
    reaches: tuple[float, ...]
    both_sides: bool
    radii: tuple[float, ...] = ()
    code_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class AffineSearch:
    """With offset: where the grid's ends are put, in steps inward from the group's extremes, each with each; moves of
    both ends around the best found so far; then moves of integer scale and min codes, rounds of either in turn."""

    levels: int
    ends: tuple[float, ...]
    radii: tuple[float, ...]
    code_radii: tuple[int, ...]


# For grids of up to so many levels. Tuned on Gaussian and t-distributed weights with importances of several spreads:
# within 1-2% of the error of searches of three times the time (Q6_K and Q8_0: 5%).
_COARSE = (0.78, 0.86, 0.93, 1.0, 1.07, 1.15, 1.3, 1.55, 1.9)
_PLAIN = (
    PlainSearch(16, _COARSE, True, (0.5, 0.25, 0.7, 0.35, 0.15)),
    PlainSearch(32, tuple(0.72 + 0.04 * k for k in range(18)), False, (0.4, 0.25, 0.12)),
    PlainSearch(64, (0.8, 0.9, 1.0, 1.1), False, (), tuple(0.7 + 0.02 * k for k in range(20) if k != 15)),
    PlainSearch(256, tuple(0.9 + 0.01 * k for k in range(12)), False),
)
_AFFINE = (
    AffineSearch(4, (-0.2, 0.1, 0.4, 0.9), (1.5, 0.8, 0.4), (1,)),
    AffineSearch(16, (-0.3, 0.5, 1.5, 3.0), (2.0, 1.3, 0.9, 0.6, 0.4, 0.2), (2,)),
    AffineSearch(256, (-0.3, 0.5, 1.5, 3.0), (2.0, 1.3, 0.9, 0.6, 0.4, 0.2), (3, 2, 1)),
)
AROUND = tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0))
_TINY = 1e-12


def plain_search(codes: Codes) -> PlainSearch:
    return next(search for search in _PLAIN if len(codes.grid) <= search.levels)


def affine_search(codes: Codes) -> AffineSearch:
    return next(search for search in _AFFINE if len(codes.grid) <= search.levels)


# Masks are floats of 0 and 1 here, to be used with lerp, which is exact at both: on CPUs several times as fast as
# bools and where. All that is mixed in must be finite, hence divisors that are never 0.


def is_more(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1.0 where a > b, else 0.0."""
    return torch.gt(a, b, out=torch.empty_like(a))


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for 0."""
    return scale / (scale * scale).clamp_(min=1e-36)


Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Weighted means of a group's x q, q^2 and q, each (n,)."""


@dataclass(frozen=True)
class Fit:
    """The best found for each group: scale, offset from the mean, and gain, each (n,).

    gain is by how much the weighted mean square error is below that of all zeros (of all weights at their mean,
    where the format has an offset).
    """

    scale: torch.Tensor
    offset: torch.Tensor
    gain: torch.Tensor

    def or_better(self, scale: torch.Tensor, offset: torch.Tensor, gain: torch.Tensor) -> Fit:
        more = is_more(gain, self.gain)
        return Fit(
            torch.lerp(self.scale, scale, more),
            torch.lerp(self.offset, offset, more),
            torch.maximum(gain, self.gain),
        )


class Groups:
    """x (size, n), less its weighted mean where the format has an offset; weight (size, n), of sum 1 in a group;
    mean and total importance (n,)."""

    def __init__(self, w: torch.Tensor, importance: torch.Tensor, codes: Codes) -> None:
        """w (rows, columns), importance broadcastable to it."""
        self.codes = codes
        self.x = self._side_by_side(w)
        # Columns that weigh alike in all rows are laid out once.
        alike = importance.dim() < 2 or importance.shape[0] == 1 or importance.stride(0) == 0
        one = importance.expand(w.shape)[: 1 if alike else None]
        weight = self._side_by_side(one)
        total = weight.sum(0)
        # A group whose inputs are never seen: all its weights count alike, and next to nothing within its block.
        unseen = (total == 0).float()
        weight.add_(unseen).div_(total + unseen * codes.group_size)
        self.total = total.clamp_(min=1e-20)
        if alike:
            weight, self.total = weight.repeat(1, w.shape[0]), self.total.repeat(w.shape[0])
        self.weight = weight
        self._weighted_x = self.weight * self.x
        self.mean = torch.zeros_like(self.total)
        if codes.has_offset:
            self.mean = self._weighted_x.sum(0)
            self.x -= self.mean
            torch.mul(self.weight, self.x, out=self._weighted_x)
        self.minus_mean, self.minus_mean_square = -self.mean, -self.mean.square()
        self.low, self.high = self.x.amin(0), self.x.amax(0)
        self._q, self._product = torch.empty_like(self.x), torch.empty_like(self.x)
        if not codes.is_uniform:
            grid = torch.tensor(codes.grid, dtype=torch.float32, device=w.device)
            self._half_steps = grid[half_steps(codes, w.device).long()]

    def _side_by_side(self, values: torch.Tensor) -> torch.Tensor:
        groups = values.float().reshape(-1, self.codes.group_size)
        return groups.t().clone(memory_format=torch.contiguous_format)

    def moments(self, inverse_scale: torch.Tensor, offset: torch.Tensor | None) -> Moments:
        """Of the codes nearest to x under this scale and offset (from the mean)."""
        q = self._snapped(inverse_scale, offset)
        product = torch.mul(self._weighted_x, q, out=self._product)
        of_xq = product.sum(0)
        torch.mul(self.weight, q, out=product)
        of_q = product.sum(0) if offset is not None else None
        return of_xq, product.mul_(q).sum(0), of_q

    def errors(self, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """Weighted square error of each group (n,), under this scale and offset (from 0) with the nearest codes."""
        from_mean = None if offset is None else offset - self.mean
        left = self._snapped(reciprocal(scale), from_mean).mul_(scale)
        if from_mean is not None:
            left += from_mean
        return left.sub_(self.x).square_().mul_(self.weight).sum(0) * self.total

    def _snapped(self, inverse_scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        q = self._q
        if offset is None:
            torch.mul(self.x, inverse_scale, out=q)
        else:
            torch.addcmul(-offset * inverse_scale, self.x, inverse_scale, out=q)
        low, high = self.codes.grid[0], self.codes.grid[-1]
        if self.codes.is_uniform:
            return q.round_().clamp_(low, high)
        at = q.clamp_(low, high).sub_(low).mul_(2).ceil_().to(torch.int32)
        torch.index_select(self._half_steps, 0, at.view(-1), out=q.view(-1))
        return q


def fit_groups(groups: Groups) -> Fit:
    """The best scale and offset of each group, were they stored exactly."""
    if not groups.codes.has_offset:
        return _fit_plain(groups)
    return _fit_zero_point(groups) if groups.codes.zero_point else _fit_affine(groups)


def _nothing(groups: Groups) -> Fit:
    zero = torch.zeros_like(groups.total)
    return Fit(zero, zero, zero)


def _fit_plain(groups: Groups) -> Fit:
    search = plain_search(groups.codes)
    end = groups.codes.grid[0]
    to_end = end * reciprocal(torch.where(groups.low.abs() >= groups.high, groups.low, groups.high))
    best = _nothing(groups)
    for reach in search.reaches:
        for side in (1, -1) if search.both_sides else (1,):
            best = _try_plain(groups, best, to_end * (reach * side))
    for radius in search.radii:
        now = reciprocal(best.scale)
        for sign in (1, -1):
            best = _try_plain(groups, best, now * (1 + sign * radius / abs(end)))
    return best


def _try_plain(groups: Groups, best: Fit, inverse_scale: torch.Tensor) -> Fit:
    of_xq, of_qq, _ = groups.moments(inverse_scale, None)
    scale = of_xq / of_qq.clamp(min=_TINY)
    return best.or_better(scale, best.offset, scale * of_xq)


def _fit_affine(groups: Groups) -> Fit:
    codes = groups.codes
    search = affine_search(codes)
    steps = codes.grid[-1] - codes.grid[0]
    # The constraint offset <= 0 means that the grid begins at or below 0, which is -mean here.
    low = groups.low if codes.any_offset else torch.minimum(groups.low, -groups.mean)
    step = (groups.high - low) / steps
    least_width = step.clamp(min=1e-20)
    best = _nothing(groups)
    starts, ends = ([end + sign * by * step for by in search.ends] for end, sign in ((low, 1), (groups.high, -1)))
    for start in starts:
        for end in ends:
            best = _try_affine(groups, best, start, torch.maximum(end - start, least_width))
    for radius in search.radii:
        center, scale = best.offset, best.scale
        for up, wider in AROUND:
            start = torch.add(center, scale, alpha=up * radius)
            width = scale * (steps + (wider - up) * radius)
            best = _try_affine(groups, best, start, torch.maximum(width, least_width))
    return best


def _try_affine(groups: Groups, best: Fit, start: torch.Tensor, width: torch.Tensor) -> Fit:
    """Codes from a grid of this start and width, and the least squares solution for them."""
    steps = groups.codes.grid[-1] - groups.codes.grid[0]
    of_xq, of_qq, of_q = groups.moments(steps / width, start)
    assert of_q is not None
    spread = torch.addcmul(of_qq, of_q, of_q, value=-1)
    scale = of_xq / spread.clamp_(min=1e-6 * steps**2)
    offset = (scale * of_q).neg_()
    gain = scale * of_xq
    if not groups.codes.any_offset:
        # Where the offset would be positive it is 0, and the scale alone is fitted.
        positive = is_more(offset, groups.minus_mean)
        of_wq = torch.addcmul(of_xq, groups.mean, of_q)
        alone = of_wq / of_qq.clamp_(min=_TINY)
        scale = torch.lerp(scale, alone, positive)
        gain = torch.lerp(gain, torch.addcmul(groups.minus_mean_square, alone, of_wq), positive)
        offset = torch.minimum(offset, groups.minus_mean)
    return best.or_better(scale, offset, gain)


def _fit_zero_point(groups: Groups) -> Fit:
    """Offsets that are a whole number of scales: zero points around the one that a free offset asks for."""
    codes = groups.codes
    steps = codes.grid[-1] - codes.grid[0]
    free = _fit_affine(groups)
    zero = (-(free.offset + groups.mean) * reciprocal(free.scale)).round_().clamp_(*codes.min_range)
    best, best_zero = _nothing(groups), zero
    for radius in (0.0, *affine_search(codes).radii):
        now, center = reciprocal(best.scale if radius else free.scale), best_zero
        for wider in (-radius, radius) if radius else (0.0,):
            for up in (-1, 0, 1):
                zero = (center + up).clamp(*codes.min_range)
                found = _try_zero_point(groups, best, now * (1 + wider / steps), zero)
                best_zero = torch.lerp(best_zero, zero, is_more(found.gain, best.gain))
                best = found
    return best


def _try_zero_point(groups: Groups, best: Fit, inverse_scale: torch.Tensor, zero: torch.Tensor) -> Fit:
    offset = -zero * reciprocal(inverse_scale)
    of_xq, of_qq, of_q = groups.moments(inverse_scale, offset - groups.mean)
    assert of_q is not None
    # Moments of w and of q - zero.
    of_wq = of_xq + groups.mean * (of_q - zero)
    scale = of_wq / (of_qq - 2 * zero * of_q + zero**2).clamp(min=_TINY)
    return best.or_better(scale, -zero * scale - groups.mean, scale * of_wq)
