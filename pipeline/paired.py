"""Differences to a reference over the same chunks, rows or questions, with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from device.records import SlimpiError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Paired difference to the reference with its 95% interval; `unit` says of what."""

    mean: float
    low: float
    high: float
    n: int
    unit: str
    flips_worse: int = 0
    flips_better: int = 0

    @property
    def significant(self) -> bool:
        return not (self.low <= 0.0 <= self.high)


def paired_difference(ours: Sequence[float], reference: Sequence[float], unit: str) -> Difference:
    """Mean of ours - reference over pairs with its Student-t interval (n - 1 degrees of freedom)."""
    if len(ours) != len(reference):
        raise SlimpiError(f"cannot pair {len(ours)} samples with {len(reference)}. Measure both over the same data.")
    deltas = np.asarray(ours, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    n = len(deltas)
    mean = float(deltas.mean())
    if n < 2:
        return Difference(mean, -math.inf, math.inf, n, unit)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * deltas.std(ddof=1) / math.sqrt(n))
    return Difference(mean, mean - half, mean + half, n, unit)


def accuracy_difference(ours: Sequence[float], reference: Sequence[float]) -> Difference:
    """Difference in accuracy (points) from paired 0/1 outcomes, flips counted.

    Agresti and Min's interval for matched pairs (Statistics in Medicine 2005): Wald after half a pair is added to
    each of the four cells, so that no flip at all still leaves an interval of honest width.
    """
    if len(ours) != len(reference):
        raise SlimpiError(
            f"cannot pair {len(ours)} predictions with {len(reference)}. Classify the same rows with both."
        )
    worse = sum(a < b for a, b in zip(ours, reference, strict=True))
    better = sum(a > b for a, b in zip(ours, reference, strict=True))
    n = len(ours)
    centre = (better - worse) / (n + 2)
    variance = ((better + worse + 1) - (better - worse) ** 2 / (n + 2)) / (n + 2) ** 2
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
    mean = 100.0 * (better - worse) / n
    return Difference(mean, 100.0 * (centre - half), 100.0 * (centre + half), n, "points", worse, better)
