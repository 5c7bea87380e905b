"""Naive float64 twins of the KL divergence's definition: one token, one probability at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

CUT = -16.0


def log_softmax(logits: Sequence[float]) -> list[float]:
    row = [float(x) for x in logits]
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [x - top - math.log(total) for x in row]


def divergence(reference: Sequence[float], model: Sequence[float]) -> float:
    """KLD of two rows of log-probabilities, nats; tokens the reference gives exp(-16) or less are left out."""
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(reference, model, strict=True) if p > CUT)


def percentile(values: Sequence[float], fraction: float) -> float:
    """llama-perplexity's: linear between the two order statistics around fraction * (n - 1)."""
    ordered = sorted(values)
    at = fraction * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] * (1 - (at - below)) + ordered[above] * (at - below)


def read_rows(path: Path, n_scored: int) -> tuple[list[int], list[list[list[float]]]]:
    """Header numbers and log-probabilities [chunk][position][token] of a file llama-perplexity could have written."""
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    n_ctx, n_vocab, n_chunks = struct.unpack_from("<iii", data, 8)
    at = 20 + 4 * n_ctx * n_chunks
    chunks = []
    for _ in range(n_chunks):
        rows = []
        for _ in range(n_scored):
            scale, floor = struct.unpack_from("<ff", data, at)
            codes = struct.unpack_from(f"<{n_vocab}H", data, at + 8)
            rows.append([scale * code + floor for code in codes])
            at += 8 + 2 * (n_vocab + n_vocab % 2)
        chunks.append(rows)
    return [n_ctx, n_vocab, n_chunks], chunks
