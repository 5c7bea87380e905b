"""RANGES: from what was observed of a tensor to the interval its 8-bit codes cover. One entry a calibration method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.export.onnx_observe import Observed

Range = tuple[float, float]

PERCENTILE = 99.99
N_BINS, N_LEVELS = 2048, 128
_SHRINKS = tuple(i / 40 for i in range(12, 41))
_FEW = 65536  # values that the grid of `mse` looks at


def minmax(seen: Observed) -> Range:
    """All that was seen."""
    return float(seen.low.min()), float(seen.high.max())


def percentile(seen: Observed) -> Range:
    """All but the outer 0.01 % on each side (Wu et al. 2020, "Integer Quantization for Deep Learning Inference")."""
    low, high = np.percentile(seen.rows, [100 - PERCENTILE, PERCENTILE])
    return float(low), float(high)


def entropy(seen: Observed) -> Range:
    """The threshold on |x| whose 128-level histogram is nearest in KL divergence (Migacz 2017, "8-bit Inference with
    TensorRT"), on both sides as far as values reach."""
    counts, edges = np.histogram(np.abs(seen.rows), bins=N_BINS)
    best = min(range(N_LEVELS, N_BINS + 1, 16), key=lambda n_bins: _divergence(counts.astype(float), n_bins))
    low, high = minmax(seen)
    return max(low, -float(edges[best])), min(high, float(edges[best]))


def _divergence(counts: np.ndarray, n_bins: int) -> float:
    """KL of the first n_bins, what lies beyond added to the last, to their 128-level form."""
    from scipy.stats import entropy as relative_entropy

    clipped = counts[:n_bins].copy()
    reference = clipped.copy()
    reference[-1] += counts[n_bins:].sum()
    groups = np.arange(n_bins) * N_LEVELS // n_bins
    filled = clipped > 0
    sums = np.bincount(groups, clipped, N_LEVELS)
    sizes = np.bincount(groups, filled.astype(float), N_LEVELS)
    coarse = np.where(filled, sums[groups] / np.maximum(sizes[groups], 1), 0.0)
    coarse[(reference > 0) & (coarse == 0)] = 1e-9 * max(1.0, counts.sum())
    return float(relative_entropy(reference, coarse))


def mse(seen: Observed) -> Range:
    """The shrunk interval, of a grid on each side, with the least squared error on the sample."""
    low, high = minmax(seen)
    values = seen.rows.reshape(-1)
    values = values[:: max(1, values.size // _FEW)]

    def error(interval: Range) -> float:
        step = max(interval[1] - interval[0], 1e-12) / 255
        codes = np.rint((np.clip(values, *interval) - interval[0]) / step)
        return float(np.square(codes * step + interval[0] - values).sum())

    high = min((high * shrink for shrink in _SHRINKS), key=lambda end: error((low, end)))
    low = min((low * shrink for shrink in _SHRINKS), key=lambda end: error((end, high)))
    return low, high


RANGES: dict[str, Callable[[Observed], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
