"""Probabilities that mean what they say, and the threshold that decides.

All of it is chosen on validation rows. Log-odds z are log p(1) / p(0); a calibrated probability is sigmoid(z / T).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from device.records import Record, SlimpiError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

N_BINS = 10
THRESHOLDS = ("f1", "accuracy", "half")


class Calibration(Record, frozen=True):
    """temperature T, the threshold a probability must reach for label 1, and the expected calibration error on the
    validation rows before and after."""

    temperature: float
    threshold: float
    ece_before: float
    ece_after: float

    def __str__(self) -> str:
        errors = f"expected calibration error {self.ece_before:.3f} -> {self.ece_after:.3f} on validation rows"
        return f"temperature {self.temperature:.2f}, threshold {self.threshold:.2f}, {errors}"

    def probabilities(self, log_odds: FloatArray) -> FloatArray:
        return sigmoid(log_odds / self.temperature)

    def margins(self, log_odds: FloatArray) -> FloatArray:
        """(n,) >= 0 where label 1 is chosen: z / T - logit(threshold)."""
        return log_odds / self.temperature - logit(self.threshold)


def calibrate(log_odds: FloatArray, targets: IntArray, threshold: str) -> Calibration:
    """From validation rows. threshold: what it maximizes there, "f1" or "accuracy"; "half" is 0.5.

    SlimpiError for another threshold, or if the rows do not have both labels.
    """
    if threshold not in THRESHOLDS:
        raise SlimpiError(f"unknown threshold {threshold!r}. Use one of {', '.join(THRESHOLDS)}.")
    if set(targets.tolist()) != {0, 1}:
        raise SlimpiError(f"{len(targets)} validation rows have labels {sorted(set(targets.tolist()))}, not both.")
    temperature = fit_temperature(log_odds, targets)
    p = sigmoid(log_odds / temperature)
    chosen = 0.5 if threshold == "half" else best_threshold(p, targets, threshold)
    return Calibration(temperature, chosen, ece(sigmoid(log_odds), targets), ece(p, targets))


def fit_temperature(log_odds: FloatArray, targets: IntArray) -> float:
    """The T > 0 of the least negative log likelihood (Guo et al. 2017, section 4.2), within [0.05, 20]."""
    signed = np.where(targets == 1, log_odds, -log_odds)
    return best_temperature(lambda t: float(np.logaddexp(0, -signed / t).mean()))


def best_temperature(loss: Callable[[float], float]) -> float:
    """Where the loss of logits divided by it is least, within [0.05, 20]."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: loss(float(np.exp(log_t))), bounds=(np.log(0.05), np.log(20)), method="bounded"
    )
    return float(np.exp(found.x))


def best_threshold(p: FloatArray, targets: IntArray, measure: str) -> float:
    """Halfway between neighbouring probabilities, where F1 of label 1 or accuracy is highest; of equals the nearest to
    0.5."""
    order = np.argsort(-p, kind="stable")
    ranked, hits = p[order], np.cumsum(targets[order])
    n, n_positive = len(p), int(targets.sum())
    chosen = np.arange(1, n + 1)
    f1, accuracy = 2 * hits / (chosen + n_positive), (hits + (n - n_positive) - (chosen - hits)) / n
    scores = f1 if measure == "f1" else accuracy
    between = np.append((ranked[:-1] + ranked[1:]) / 2, ranked[-1] / 2)
    possible = np.append(ranked[:-1] > ranked[1:], True) & (between > 0) & (between < 1)
    candidates = np.flatnonzero(possible)
    best = min(candidates, key=lambda i: (-scores[i], abs(between[i] - 0.5)))
    return float(between[best])


def ece(p: FloatArray, targets: IntArray, n_bins: int = N_BINS) -> float:
    """Expected calibration error of the chosen label's probability, bins of equal width (Guo et al. 2017, eq. 3)."""
    confidence, right = np.maximum(p, 1 - p), (p >= 0.5) == (targets == 1)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = [
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins.tolist())
    ]
    return float(sum(gaps))


def sigmoid(z: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0, -z))


def logit(p: float | FloatArray) -> FloatArray:
    clipped = np.clip(p, 1e-12, 1 - 1e-12)
    return np.log(clipped) - np.log1p(-clipped)
