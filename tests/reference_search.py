"""Naive float64 twins of formats and scale search: one weight, one group, one code at a time."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np

from pipeline.formats import Codes, QTensor


def group_scale(q: QTensor, row: int, group: int) -> tuple[float, float]:
    """Scale and offset of a group as the format's definition says, in float64."""
    codes: Any = q.format.codes
    stored: Any = q.scales
    if codes.pool > 1:
        pool = row // codes.pool
        code, min_code = int(stored.scale_codes[row, group]), int(stored.min_codes[row, group])
        scale = float(stored.scale_base[pool, group]) + float(stored.d[pool, group]) * code
        zero = float(stored.zero_base[pool, group]) + float(stored.dmin[pool, group]) * min_code
        return scale, -scale * zero
    block = group * codes.group_size // q.format.block_size
    scale = float(stored.d[row, block]) * int(stored.scale_codes[row, group])
    if stored.dmin is None:
        return scale, 0.0
    return scale, -float(stored.dmin[row, block]) * int(stored.min_codes[row, group])


def dequantize(q: QTensor) -> np.ndarray:
    codes = q.format.codes
    assert codes is not None
    out = np.zeros(tuple(q.codes.shape))
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            scale, offset = group_scale(q, row, column // codes.group_size)
            out[row, column] = scale * codes.grid[int(q.codes[row, column])] + offset
    return out


def nearest_code(value: float, scale: float, offset: float, codes: Codes) -> int:
    """Every code tried; the first of the nearest."""
    if scale == 0:
        return min(range(len(codes.grid)), key=lambda code: abs(codes.grid[code]))
    return min(range(len(codes.grid)), key=lambda code: abs(scale * codes.grid[code] + offset - value))


def weighted_error(x: np.ndarray, weight: np.ndarray, scale: float, offset: float, codes: Codes) -> float:
    error = 0.0
    for value, importance in zip(x.tolist(), weight.tolist(), strict=True):
        code = nearest_code(value, scale, offset, codes)
        error += importance * (scale * codes.grid[code] + offset - value) ** 2
    return error


def best_scale(x: np.ndarray, weight: np.ndarray, codes: Codes) -> float:
    """Least error of a group without offset, exactly: as the inverse scale grows, codes change only where a weight
    crosses the middle between two grid values; between two crossings least squares gives the best scale."""
    middles = [(a + b) / 2 for a, b in pairwise(codes.grid)]
    crossings = sorted({middle / value for middle in middles for value in x.tolist() if value})
    inside = [(a + b) / 2 for a, b in pairwise(crossings)]
    least = float((weight * x * x).sum())
    for inverse in [crossings[0] * 2, *inside, crossings[-1] * 2]:
        q = np.array([codes.grid[nearest_code(value * inverse, 1.0, 0.0, codes)] for value in x.tolist()], float)
        if q.any():
            scale = (weight * q * x).sum() / (weight * q * q).sum()
            least = min(least, float((weight * (x - scale * q) ** 2).sum()))
    return least


def best_scale_and_offset(x: np.ndarray, weight: np.ndarray, codes: Codes) -> float:
    """Least error of a group with a free offset, exactly, for few weights and levels: codes are constant within the
    cells that the lines inverse * x + shift = middle cut the plane of (inverse, shift) into; a cell has a corner where
    two lines meet, and points close to all corners on all sides visit every cell."""
    middles = [(a + b) / 2 for a, b in pairwise(codes.grid)]
    lines = [(value, middle) for value in x.tolist() for middle in middles]
    least = float((weight * (x - (weight * x).sum() / weight.sum()) ** 2).sum())
    for (x1, m1), (x2, m2) in combinations(lines, 2):
        if x1 == x2 or (m1 - m2) / (x1 - x2) <= 0:
            continue
        inverse = (m1 - m2) / (x1 - x2)
        for near in (1 - 1e-6, 1 + 1e-6):
            for shift in (m1 - inverse * x1 - 1e-5, m1 - inverse * x1, m1 - inverse * x1 + 1e-5):
                codes_of = [nearest_code(value * inverse * near + shift, 1.0, 0.0, codes) for value in x.tolist()]
                least = min(least, least_squares(x, weight, np.array([codes.grid[code] for code in codes_of], float)))
    return least


def least_squares(x: np.ndarray, weight: np.ndarray, q: np.ndarray) -> float:
    """Error of the best scale and offset for given grid values."""
    design = np.stack([q, np.ones_like(q)], 1) * np.sqrt(weight)[:, None]
    solution = np.linalg.lstsq(design, x * np.sqrt(weight), rcond=None)[0]
    return float((weight * (x - q * solution[0] - solution[1]) ** 2).sum())
