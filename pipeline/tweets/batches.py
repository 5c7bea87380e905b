"""Batches of texts of like length, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def length_batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Indices of each batch, batches in random order; which texts of nearly the same length meet is drawn too."""
    noisy = np.asarray(lengths) + rng.uniform(-2, 2, len(lengths))
    order = np.argsort(noisy)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
