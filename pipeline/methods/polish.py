"""Lowering tr(E H E^T), E = W - W^, step by step within a format.

Each step moves one number of every row, a code, a scale's code or a block's d, to the best value its format holds
while all others stay, so that no row's loss rises. Over codes this is cyclic coordinate descent as in QuantEase
(Behdin et al. 2023, arXiv 2309.01885, algorithm 2); here scales are coordinates too, and H's gradient H E is kept
for one block at a time.

Tensors are columns first, (columns, rows): a step touches one column in all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from pipeline.formats import NOT_CODED, Codes, Format, QTensor, Range, Scales
from pipeline.methods.rtn import inverse

PANEL = 32
"""Columns that see each other's steps one by one; beyond them one product does."""


@dataclass(frozen=True)
class Coded:
    """A matrix, or some of its blocks, in a format, columns first and changed in place; all float32.

    q: grid values (columns, rows). scale_codes, min_codes: (groups, rows). d, dmin, base, zero_base: (blocks, rows),
    spread over the rows of a pool. A weight is q * scale + offset, with both as in `Scales`.
    """

    kind: Format
    q: torch.Tensor
    d: torch.Tensor
    scale_codes: torch.Tensor
    dmin: torch.Tensor
    min_codes: torch.Tensor
    base: torch.Tensor
    zero_base: torch.Tensor

    @property
    def codes(self) -> Codes:
        assert self.kind.codes is not None
        return self.kind.codes

    def scale(self) -> torch.Tensor:
        """(groups, rows)"""
        return self._spread(self.d) * self.scale_codes + self._spread(self.base)

    def zero(self) -> torch.Tensor:
        """(groups, rows): the grid value that means 0, times the scale if zeros are stored apart from scales."""
        return self._spread(self.dmin) * self.min_codes + self._spread(self.zero_base)

    def offset(self) -> torch.Tensor:
        """(groups, rows)"""
        return -self.zero() * self.scale() if self.codes.pool > 1 else -self.zero()

    def weights(self) -> torch.Tensor:
        """(columns, rows)"""
        scaled = self.q * self.wide(self.scale())
        return scaled + self.wide(self.offset()) if self.codes.has_offset else scaled

    def wide(self, per_group: torch.Tensor) -> torch.Tensor:
        return per_group.repeat_interleave(self.codes.group_size, 0)

    def _spread(self, per_block: torch.Tensor) -> torch.Tensor:
        return per_block.repeat_interleave(len(self.scale_codes) // len(self.d), 0)

    def block(self, index: int) -> Coded:
        """One block, sharing memory."""
        size = self.kind.block_size
        n_groups = size // self.codes.group_size
        columns, groups = slice(index * size, (index + 1) * size), slice(index * n_groups, (index + 1) * n_groups)
        one = slice(index, index + 1)
        return Coded(
            self.kind,
            self.q[columns],
            self.d[one],
            self.scale_codes[groups],
            self.dmin[one],
            self.min_codes[groups],
            self.base[one],
            self.zero_base[one],
        )

    def put(self, index: int, scales: Scales) -> None:
        """Set the scales of one block."""
        block, new = self.block(index), from_scales(self.kind, scales)
        for name in ("d", "scale_codes", "dmin", "min_codes", "base", "zero_base"):
            getattr(block, name).copy_(getattr(new, name))

    def to_qtensor(self, like: Scales) -> QTensor:
        """As the format stores it. `like`: scales of the same matrix, whose d and bases stay where they are pooled."""
        codes = self.codes
        grid = torch.tensor(codes.grid, dtype=torch.float32, device=self.q.device)
        found = torch.searchsorted(grid, self.q.T.contiguous()).to(torch.uint8)
        scale_codes = self.scale_codes.T.to(torch.int16).contiguous()
        min_codes = self.min_codes.T.to(torch.int16).contiguous() if codes.has_offset else None
        scales = replace(like, scale_codes=scale_codes, min_codes=min_codes)
        if codes.pool == 1:
            d = self.d.T.to(codes.float_type).contiguous()
            dmin = self.dmin.T.to(codes.float_type).contiguous() if codes.has_offset else None
            scales = replace(scales, d=d, dmin=d if codes.zero_point else dmin)
        return QTensor(self.kind, found, scales)


def from_scales(kind: Format, scales: Scales) -> Coded:
    """Codes all at grid value 0."""
    rows, n_groups = scales.scale_codes.shape
    assert kind.codes is not None
    n_blocks = n_groups * kind.codes.group_size // kind.block_size

    def spread(stored: torch.Tensor | None) -> torch.Tensor:
        if stored is None:
            return torch.zeros(n_blocks, rows, device=scales.d.device)
        return stored.float().repeat_interleave(scales.pool, 0)[:rows].T.contiguous()

    def turned(stored: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(n_groups, rows, device=scales.d.device) if stored is None else stored.T.float().contiguous()

    return Coded(
        kind,
        torch.zeros(n_groups * kind.codes.group_size, rows, device=scales.d.device),
        spread(scales.d),
        turned(scales.scale_codes),
        spread(scales.dmin),
        turned(scales.min_codes),
        spread(scales.scale_base),
        spread(scales.zero_base),
    )


def rounder(codes: Codes, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """In place: the nearest grid value of each element."""
    low, high = codes.grid[0], codes.grid[-1]
    if high - low == len(codes.grid) - 1:
        return lambda x: x.round_().clamp_(low, high)
    grid = torch.tensor(codes.grid, dtype=torch.float32, device=device)
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(codes.grid)], device=device)
    return lambda x: torch.index_select(grid, 0, torch.bucketize(x.contiguous(), middles, out_int32=True), out=x)


def improve(part: Coded, error: torch.Tensor, gradient: torch.Tensor, h: torch.Tensor, rounds: int) -> None:
    """Steps over all codes, then all scales of one block, `rounds` times.

    error: E (m, rows) of the block's columns; gradient: (H E)'s rows of them, (m, rows); h: H's (m, m) corner.
    Both are kept up to date.
    """
    for _ in range(rounds):
        step_codes(part, error, gradient, h)
        step_scales(part, error, gradient, h)


def step_codes(part: Coded, error: torch.Tensor, gradient: torch.Tensor, h: torch.Tensor) -> None:
    """One step of every code, in the order of columns."""
    nearest, size = rounder(part.codes, error.device), part.codes.group_size
    scale = part.scale()
    scales, inverses = scale.unbind(), inverse(scale).unbind()
    freedom = (1 / h.diagonal()).tolist()
    for low in range(0, len(error), PANEL):
        high = min(low + PANEL, len(error))
        now, moved, new = (
            gradient[low:high].clone(),
            torch.empty_like(error[low:high]),
            torch.empty_like(error[low:high]),
        )
        corner = h[low:high, low:high].contiguous()
        parts = (tensor.unbind() for tensor in (part.q[low:high], new, now, moved, corner))
        for k, (old, q, wanted, change, curvature) in enumerate(zip(*parts, strict=True), low):
            nearest(torch.addcmul(old, wanted, inverses[k // size], value=freedom[k], out=q))
            torch.sub(q, old, out=change).mul_(scales[k // size])
            after = k + 1 - low
            now[after:].addr_(curvature[after:], change, alpha=-1)
        part.q[low:high] = new
        error[low:high] -= moved
        gradient.addmm_(h[:, low:high], moved, alpha=-1)


def step_scales(part: Coded, error: torch.Tensor, gradient: torch.Tensor, h: torch.Tensor) -> None:
    """One step of one block's d and dmin, then of every group's scale code and min code; pairs move together."""
    codes, size = part.codes, part.codes.group_size
    move = Mover(error, gradient, h)
    whole = slice(None)
    if codes.pool == 1:
        per_d = part.q * part.wide(part.scale_codes)
        if codes.zero_point:
            move.one(part.d[0], codes.float_type, per_d - part.wide(part.min_codes), whole)
            part.dmin.copy_(part.d)
        elif codes.has_offset:
            move.two((part.d[0], part.dmin[0]), codes.float_type, (per_d, -part.wide(part.min_codes)), whole)
        else:
            move.one(part.d[0], codes.float_type, per_d, whole)
    for group in range(len(part.scale_codes)):
        columns = slice(group * size, (group + 1) * size)
        scale_code, min_code = part.scale_codes[group], part.min_codes[group]
        per_scale = part.q[columns] * part.d[0]
        per_min = -part.dmin[0].expand(size, -1)
        if codes.pool > 1:  # here a scale's code scales the offset too, so that a pair's effects are not a sum
            move.one(scale_code, codes.scale_range, per_scale - part.zero()[group] * part.d[0], columns)
            move.one(min_code, codes.min_range, per_min * part.scale()[group], columns)
        elif codes.zero_point:
            move.one(min_code, codes.min_range, per_min, columns)
        elif codes.scale_range != NOT_CODED and codes.has_offset:
            assert codes.scale_range == codes.min_range
            move.two((scale_code, min_code), codes.scale_range, (per_scale, per_min), columns)
        elif codes.scale_range != NOT_CODED:
            move.one(scale_code, codes.scale_range, per_scale, columns)


@dataclass(frozen=True)
class Mover:
    """Moves numbers (rows,) of which W^ is linear, to where the loss is least among what the format holds.

    `per`, (m, rows), is how W^ changes in `columns` when the number grows by 1. A change x then changes the loss by
    x^2 a - 2 x b with a = per^T H per and b = per^T H E. Rows that would not gain stay.
    """

    error: torch.Tensor
    gradient: torch.Tensor
    h: torch.Tensor

    def one(self, value: torch.Tensor, holds: Range | torch.dtype, per: torch.Tensor, columns: slice) -> None:
        h_per = self.h[:, columns] @ per
        a, b = (per * h_per[columns]).sum(0), (per * self.gradient[columns]).sum(0)
        change = _held(value + b * inverse(a), holds) - value
        change = torch.where(change * (change * a - 2 * b) < 0, change, 0)
        value += change
        self._apply(per, h_per, change, columns)

    def two(
        self,
        values: tuple[torch.Tensor, torch.Tensor],
        holds: Range | torch.dtype,
        pers: tuple[torch.Tensor, torch.Tensor],
        columns: slice,
    ) -> None:
        """The first goes to the joint optimum, as held (of integers: either neighbour), or stays; the second to its
        optimum given the first."""
        h_pers = [self.h[:, columns] @ per for per in pers]
        (a, cross), (_, c) = [[(per * h_per[columns]).sum(0) for h_per in h_pers] for per in pers]
        b, d = ((per * self.gradient[columns]).sum(0) for per in pers)
        determinant = a * c - cross * cross
        sound = determinant > 1e-5 * a * c
        wanted = values[0] + torch.where(sound, (b * c - d * cross) / determinant, b * inverse(a))
        firsts = [wanted] if isinstance(holds, torch.dtype) else [wanted.floor(), wanted.ceil()]
        best, gain = [torch.zeros_like(b), torch.zeros_like(b)], torch.zeros_like(b)
        for first in [*firsts, values[0]]:
            x = _held(first, holds) - values[0]
            y = _held(values[1] + (d - cross * x) * inverse(c), holds) - values[1]
            found = x * (2 * b - x * a) + y * (2 * d - y * c - 2 * x * cross)
            more = found > gain
            gain = torch.where(more, found, gain)
            best = [torch.where(more, new, old) for new, old in zip((x, y), best, strict=True)]
        for value, per, h_per, change in zip(values, pers, h_pers, best, strict=True):
            value += change
            self._apply(per, h_per, change, columns)

    def _apply(self, per: torch.Tensor, h_per: torch.Tensor, change: torch.Tensor, columns: slice) -> None:
        self.error[columns] -= per * change
        self.gradient.sub_(h_per.mul_(change))


def _held(value: torch.Tensor, holds: Range | torch.dtype) -> torch.Tensor:
    return value.to(holds).float() if isinstance(holds, torch.dtype) else value.round().clamp(*holds)


def stack(parts: list[Coded]) -> Coded:
    """A matrix from its consecutive blocks."""
    names = ("q", "d", "scale_codes", "dmin", "min_codes", "base", "zero_base")
    return Coded(parts[0].kind, *(torch.cat([getattr(part, name) for part in parts]) for name in names))
