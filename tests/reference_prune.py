"""Naive float64 twins of pruning: one unit at a time, whole matrices inverted anew, no masks."""

from __future__ import annotations

import numpy as np


def best_columns(weight: np.ndarray, hessian: np.ndarray, kept: list[int]) -> tuple[np.ndarray, float]:
    """W' (rows, kept) with least E|W x - W' x_kept|^2 and that loss, by the normal equations."""
    h = hessian.astype(np.float64)
    best = weight @ h[:, kept] @ np.linalg.inv(h[np.ix_(kept, kept)])
    full = np.zeros_like(weight, dtype=np.float64)
    full[:, kept] = best
    error = weight - full
    return best, float(np.einsum("ri,ij,rj->", error, h, error))


def greedy_order(weight: np.ndarray, hessian: np.ndarray, width: int) -> list[int]:
    """Units in the order in which each removal costs least, everything left refit by the normal equations."""
    left = list(range(weight.shape[1] // width))
    order = []
    while left:
        losses = []
        for unit in left:
            kept = [u * width + k for u in left if u != unit for k in range(width)]
            losses.append(best_columns(weight, hessian, kept)[1] if kept else np.inf)
        order.append(left.pop(int(np.argmin(losses))))
    return order


def ridge(x: np.ndarray, wanted: np.ndarray, old: np.ndarray, penalty: float) -> np.ndarray:
    """W with least |wanted - x W^T|^2 + penalty |W - old|^2, a row at a time, as one stacked least-squares problem."""
    rows = []
    for target, before in zip(wanted.T.astype(np.float64), old.astype(np.float64), strict=True):
        stacked = np.concatenate([x, np.sqrt(penalty) * np.eye(x.shape[1])])
        rows.append(np.linalg.lstsq(stacked, np.concatenate([target, np.sqrt(penalty) * before]), rcond=None)[0])
    return np.array(rows)


def block_influence(before: np.ndarray, after: np.ndarray) -> float:
    """1 - the mean cosine between a layer's input and output, token by token."""
    cosines = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(before, after, strict=True)]
    return 1 - sum(cosines) / len(cosines)


def sparsegpt(weight: np.ndarray, hessian: np.ndarray, share: float, block: int) -> np.ndarray:
    """Columns from left to right, each error spread over all later columns at once by the inverse Hessian of what is
    left, inverted anew for every column; masks chosen at the start of each block."""
    w = weight.astype(np.float64).copy()
    n = w.shape[1]
    mask = np.zeros(w.shape, dtype=bool)
    for column in range(n):
        inverse = np.linalg.inv(hessian[column:, column:])
        if column % block == 0:
            stop = min(column + block, n)
            # The k-th pivot of the block: the inverse's corner once the columns before it are gone.
            pivots = np.array([np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(column, stop)])
            scores = w[:, column:stop] ** 2 / pivots
            lowest = np.argsort(scores, axis=1, kind="stable")[:, : round(share * (stop - column))]
            np.put_along_axis(mask[:, column:stop], lowest, True, axis=1)
        error = np.where(mask[:, column], w[:, column], 0) / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
    return np.where(mask, 0, w)
