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
    w, inverse = weight.double().clone(), _inverse(hessian)
    step = max(1, n_units // _STEPS)
    left = torch.ones(n_units, dtype=torch.bool)
    order: list[int] = []
    matrices, losses, total = {}, {}, 0.0
    while True:
        kept = n_units - len(order)
        if kept in levels:
            matrices[kept], losses[kept] = w.to(weight.dtype), total
        if not kept:
            return Surgery(tuple(order), matrices, losses)
        stop = max((level for level in levels if level < kept), default=0)
        units = torch.topk(_costs(w, inverse, width, left), min(step, kept - stop), largest=False).indices
        total += _remove(w, inverse, _columns(units, width))
        left[units] = False
        order += units.tolist()


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    h = hessian.double().clone()
    h.diagonal().add_(_DAMPING * h.diagonal().mean() + 1e-30)
    return h


def _inverse(hessian: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(_damped(hessian))


def _columns(units: torch.Tensor, width: int) -> torch.Tensor:
    return (units[:, None] * width + torch.arange(width)).reshape(-1)


def _costs(w: torch.Tensor, inverse: torch.Tensor, width: int, left: torch.Tensor) -> torch.Tensor:
    costs = torch.full((len(left),), torch.inf, dtype=torch.float64)
    if width == 1:
        costs[left] = w.square().sum(0)[left] / inverse.diagonal()[left]
        return costs
    for unit in left.nonzero()[:, 0].tolist():
        columns = slice(unit * width, (unit + 1) * width)
        costs[unit] = (w[:, columns] * torch.linalg.solve(inverse[columns, columns], w[:, columns].T).T).sum()
    return costs


def _remove(w: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> float:
    """Remove columns in place, the others made to fit; the loss that it adds."""
    factor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    removed = w[:, gone]
    loss = float((removed * torch.linalg.solve(inverse[gone][:, gone], removed.T).T).sum())
    w -= removed @ factor
    w[:, gone] = 0
    inverse -= inverse[:, gone] @ factor
    inverse[gone] = 0
    inverse[:, gone] = 0
    inverse[gone, gone] = 1
    return loss
