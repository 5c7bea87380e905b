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
    units zero, and its loss E|W x - W' x|^2."""

    order: tuple[int, ...]
    matrices: dict[int, torch.Tensor]
    losses: dict[int, float]

    def kept(self, count: int) -> tuple[int, ...]:
        """The units that stay if `count` do, ascending."""
        return tuple(sorted(self.order[len(self.order) - count :]))


def operate(weight: torch.Tensor, hessian: torch.Tensor, width: int, levels: Collection[int]) -> Surgery:
    """Remove all units of `width` neighbouring columns of weight (rows, columns), hessian (columns, columns) undamped;
    `levels`: numbers of kept units at which the matrix is wanted."""
    n_units = weight.shape[1] // width
    w, inverse = weight.double(), _inverse(hessian)  # of the units that are left alone: the work falls with them
    left = torch.arange(n_units)
    step = max(1, n_units // _STEPS)
    order: list[int] = []
    matrices, losses, total = {}, {}, 0.0
    while True:
        if len(left) in levels:
            matrices[len(left)], losses[len(left)] = torch.zeros_like(weight), total
            matrices[len(left)][:, _columns(left, width)] = w.to(weight.dtype)
        if not len(left):
            return Surgery(tuple(order), matrices, losses)
        stop = max((level for level in levels if level < len(left)), default=0)
        units = torch.topk(_costs(w, inverse, width), min(step, len(left) - stop), largest=False).indices
        gone = torch.zeros(len(left), dtype=torch.bool)
        gone[units] = True
        order += left[units].tolist()
        w, inverse, loss = _without(w, inverse, gone.repeat_interleave(width))
        total += loss
        left = left[~gone]


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    h = hessian.double().clone()
    h.diagonal().add_(_DAMPING * h.diagonal().mean() + 1e-30)
    return h


def _inverse(hessian: torch.Tensor) -> torch.Tensor:
    h = _damped(hessian)
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


def _without(w: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The columns that stay, made to fit, the inverse of their Hessian, and the loss that it adds."""
    rows, removed = inverse[gone], w[:, gone]
    among, across = rows[:, gone], rows[:, ~gone]
    factor = torch.linalg.solve(among, across)
    loss = float((removed * torch.linalg.solve(among, removed.T).T).sum())
    return (
        torch.addmm(w[:, ~gone], removed, factor, alpha=-1),
        torch.addmm(inverse[~gone][:, ~gone], across.T, factor, alpha=-1),
        loss,
    )
