"""AWQ's two searches with samples of the input, weight by weight in float64 (Lin et al. 2023). Format: Q4_1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GROUP = 32


def rounded(w: Array) -> Array:
    """w (rows, columns) as Q4_1 by round to nearest: float16 minimum and step of each group of 32."""
    out = np.zeros(w.shape)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], GROUP):
            out[row, start : start + GROUP] = rounded_group(w[row, start : start + GROUP])
    return out


def rounded_group(x: Array) -> Array:
    low, high = float(min(x)), float(max(x))
    step, base = float(np.float16(np.float32(high - low) / np.float32(15))), float(np.float16(low))
    if step == 0:
        return np.full(len(x), base)
    return np.array([base + step * min(range(16), key=lambda k: (abs((v - base) / step - k), k)) for v in x])


def output_loss(samples: Array, w: Array, other: Array) -> float:
    """Mean over samples of |(other - w) x|^2."""
    return math.fsum(float(np.sum(((other - w) @ x) ** 2)) for x in samples) / len(samples)


def scales(samples: Array, alpha: float) -> Array:
    """mean |x|^alpha of each column, geometric mean 1."""
    size = [math.fsum(abs(float(x)) for x in column) / len(column) for column in samples.T]
    powers = [v**alpha for v in size]
    middle = math.exp(math.fsum(math.log(p) for p in powers) / len(powers))
    return np.array([p / middle for p in powers])


def search(samples: Array, consumers: list[Array], alphas: tuple[float, ...]) -> tuple[float, list[float]]:
    """(best alpha, loss of each with 0 before them)."""
    losses = []
    for alpha in (0.0, *alphas):
        s = scales(samples, alpha)
        losses.append(math.fsum(output_loss(samples, w, rounded(w * s) / s) for w in consumers))
    return (0.0, *alphas)[losses.index(min(losses))], losses


def clipped(samples: Array, w: Array, ratios: tuple[float, ...]) -> Array:
    """Each group rounded after the clipping that changes its part of the output least; rows it does not help as they
    would be without."""
    out = np.zeros(w.shape)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], GROUP):
            x, part = w[row, start : start + GROUP], samples[:, start : start + GROUP]
            largest = max(abs(v) for v in x)
            tried = []
            for ratio in (1.0, *ratios):
                limit = float(np.float32(largest) * np.float32(ratio))
                q = rounded_group(np.array([min(limit, max(-limit, v)) for v in x]))
                tried.append((math.fsum(float((q - x) @ sample) ** 2 for sample in part), q))
            out[row, start : start + GROUP] = min(tried, key=lambda pair: pair[0])[1]
    plain = rounded(w)
    for row in range(w.shape[0]):
        if output_loss(samples, w[row : row + 1], plain[row : row + 1]) <= output_loss(
            samples, w[row : row + 1], out[row : row + 1]
        ):
            out[row] = plain[row]
    return out
