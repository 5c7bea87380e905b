"""Which columns of a matrix to remove, and what the others become: the optimal brain surgeon for whole columns.

min over W' of E|W x - W' x|^2 with columns S of W' zero costs, beside what is removed already, sum over rows of
w_S (H^-1_SS)^-1 w_S^T, and the others move by -w_S (H^-1_SS)^-1 H^-1_S: (Hassibi & Stork 1992; for columns SlimGPT,
Ling et al. 2024, and ZipLM, Kurtic et al. 2023, eq. 3 and 4). After each removal H^-1 is downdated.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

_DAMPING = 0.01
_STEPS = 48  # removals are batched to about so many, each unit of a batch judged as if alone


@dataclass(frozen=True)
class Surgery:
    """Units in the order they are removed; for the numbers of kept units asked for the matrix then, columns of removed
    units zero, its loss E|W x - W' x|^2 with the damping that it was chosen by, and without it by row (rows,)."""

    order: tuple[int, ...]
    matrices: dict[int, torch.Tensor]
    losses: dict[int, float]
    row_losses: dict[int, torch.Tensor]

    def kept(self, count: int) -> tuple[int, ...]:
        """The units that stay if `count` do, ascending."""
        return tuple(sorted(self.order[len(self.order) - count :]))


def operate(weight: torch.Tensor, hessian: torch.Tensor, width: int, levels: Collection[int]) -> Surgery:
    """Remove all units of `width` neighbouring columns of weight (rows, columns), hessian (columns, columns) undamped;
    `levels`: numbers of kept units at which the matrix is wanted."""
    n_units = weight.shape[1] // width
    damping = _damping(hessian)
    w, inverse = weight.to(torch.float64, copy=True), _inverse(hessian, damping)  # of the units that are left alone
    left = torch.arange(n_units)
    step = max(1, n_units // _STEPS)
    order: list[int] = []
    matrices, losses, row_losses = {}, {}, {}
    lost = torch.zeros(len(w), dtype=torch.float64)
    while True:
        if len(left) in levels:
            matrix = torch.zeros_like(weight)
            matrix[:, _columns(left, width)] = w.to(weight.dtype)
            damped = damping * (weight - matrix).double().square().sum(1)
            matrices[len(left)], losses[len(left)] = matrix, float(lost.sum())
            row_losses[len(left)] = (lost - damped).clamp_min(0)
        if not len(left):
            return Surgery(tuple(order), matrices, losses, row_losses)
        stop = max((level for level in levels if level < len(left)), default=0)
        units = torch.topk(_costs(w, inverse, width), min(step, len(left) - stop), largest=False).indices
        gone = torch.zeros(len(left), dtype=torch.bool)
        gone[units] = True
        order += left[units].tolist()
        w, inverse, more = _without(w, inverse, gone.repeat_interleave(width))
        lost += more
        left = _packed(left, gone)


def _damping(hessian: torch.Tensor) -> float:
    return _DAMPING * float(hessian.diagonal().double().mean()) + 1e-30


def _inverse(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    h = hessian.double().clone()
    h.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(h)
    return torch.linalg.inv(h) if int(failed) else torch.cholesky_inverse(lower)


def _columns(units: torch.Tensor, width: int) -> torch.Tensor:
    return (units[:, None] * width + torch.arange(width)).reshape(-1)


def _costs(w: torch.Tensor, inverse: torch.Tensor, width: int) -> torch.Tensor:
    """(units,) what removing each alone adds to the loss."""
    if width == 1:
        return w.square().sum(0) / inverse.diagonal()
    costs = []
    for start in range(0, w.shape[1], width):
        columns = slice(start, start + width)
        costs.append((w[:, columns] * torch.linalg.solve(inverse[columns, columns], w[:, columns].T).T).sum())
    return torch.stack(costs)


def _without(
    w: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The columns that stay, made to fit, the inverse of their Hessian, both in place of what is given, and the loss
    that it adds by row. Copying what stays, of 9,000 columns, would take longer than all else."""
    rows, removed = inverse[gone], w[:, gone]
    among, across = rows[:, gone], _packed(rows.T, gone).T
    factor = torch.linalg.solve(among, across)
    loss = (removed * torch.linalg.solve(among, removed.T).T).sum(1)
    w, inverse = _packed(w.T, gone).T, _packed(_packed(inverse, gone).T, gone).T
    return w.addmm_(removed, factor, alpha=-1), inverse.addmm_(across.T, factor, alpha=-1), loss


def _packed(values: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """The entries (along the first axis) that stay, moved in place to the front: the last of them fill the holes."""
    n_left = len(gone) - int(gone.sum())
    values[:n_left][gone[:n_left]] = values[n_left:][~gone[n_left:]]
    return values[:n_left]
