"""GPTQ as the paper has it, and what coordinate descent must have reached: naive, float64, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def proxy_loss(error: Array, h: Array) -> float:
    """tr(E H E^T)."""
    return float(sum(row @ h @ row for row in error.astype(np.float64)))


def damped(h: Array, damping: float) -> Array:
    return h.astype(np.float64) + damping * np.mean(np.diag(h.astype(np.float64))) * np.eye(len(h))


def importance(h: Array) -> Array:
    """1 / U_kk^2 of the paper's U: what is left of column k's error counts so much."""
    return np.diag(upper_of_inverse(h)) ** -2.0


def upper_of_inverse(h: Array) -> Array:
    """U, upper triangular, with U^T U = H^-1."""
    return np.linalg.cholesky(np.linalg.inv(h)).T


def gptq(w: Array, h: Array, grid: Array, scale: Array, offset: Array, order: Array) -> tuple[Array, Array, Array]:
    """Algorithm 1 of Frantar et al. 2022 without blocks; h damped, scale and offset (rows, columns), columns in
    `order`. Returns codes; how far each was from being another, in steps of the grid; and each weight as the errors
    before it had moved it, at the moment its column's turn came."""
    w = w.astype(np.float64)[:, order].copy()
    upper = upper_of_inverse(h[np.ix_(order, order)])
    codes, margins, seen = (np.zeros(w.shape) for _ in range(3))
    for k, column in enumerate(order):
        seen[:, column] = w[:, k]
        for row in range(len(w)):
            x = (w[row, k] - offset[row, column]) / scale[row, column] if scale[row, column] else 0.0
            distances = np.abs(grid - x)
            nearest, second = np.argsort(distances, kind="stable")[:2]
            codes[row, column] = nearest
            margins[row, column] = distances[second] - distances[nearest]
            value = grid[nearest] * scale[row, column] + offset[row, column]
            w[row, k:] -= (w[row, k] - value) / upper[k, k] * upper[k, k:]
    return codes.astype(np.uint8), margins, seen


def updated_at(w: Array, what: Array, h: Array, start: int) -> Array:
    """The weights from column `start` on that compensate the errors of those before it best: least squares."""
    error = (w - what)[:, :start].astype(np.float64)
    return w[:, start:] + error @ h[:start, start:] @ np.linalg.inv(h[start:, start:])


def best_single_change(w: Array, codes: Array, h: Array, grid: Array, scale: Array, offset: Array) -> float:
    """The most that changing one code of one row lowers that row's loss, over all codes, as a share of its loss."""
    best = 0.0
    for row in range(len(w)):
        error = w[row].astype(np.float64) - (grid[codes[row]] * scale[row] + offset[row])
        slope = h @ error
        loss = error @ slope
        for k in range(w.shape[1]):
            change = w[row, k] - (grid * scale[row, k] + offset[row, k]) - error[k]
            best = max(best, -np.min(2 * change * slope[k] + change**2 * h[k, k]) / loss)
    return float(best)
