"""Which products stay fp32: measured KL sensitivity of the logits, a Pareto frontier, and a floor on what is INT8.

Each product is quantized alone, weights and activations, and the KL divergence of the output to the fp32 encoder's is
measured on the calibration text. Products that no other beats in both sensitivity (more) and parameters (fewer) are
the frontier; they return to fp32, frontier after frontier, as long as enough weights and activations are INT8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from pipeline.export.onnx_observe import Calibration, Float32, logits_of
from pipeline.export.onnx_static import Arithmetic, Product, Treatment, quantize_static, shares
from pipeline.progress import Tick, quiet

MIN_SHARE = 0.95
N_FELT_PASSAGES = 48


def divergence(reference: Float32, logits: Float32) -> float:
    """Mean KL(softmax(reference) || softmax(logits)) over rows (n, n_labels), in nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def log_softmax(logits: Float32) -> np.ndarray:
    """Over the last of two axes, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def sensitivities(
    model: onnx.ModelProto,
    treatments: Mapping[str, Treatment],
    arithmetic: Arithmetic,
    per_channel: bool,
    calibration: Calibration,
    tick: Tick = quiet,
) -> dict[str, float]:
    """{y: KL divergence} of each product quantized alone, on the first passages of the calibration text."""
    part = calibration.first(N_FELT_PASSAGES)
    reference = logits_of(model, part)
    found = {}
    for done, (y, treatment) in enumerate(treatments.items(), 1):
        alone = quantize_static(model, {y: treatment}, arithmetic, per_channel, lookups=False)
        found[y] = divergence(reference, logits_of(alone, part))
        tick(done, len(treatments), "products")
    return found


def frontier(sensitivity: Sequence[float], n_weights: Sequence[int]) -> list[int]:
    """Indices of the products that no other beats or equals in both, beating it in one; most sensitive first."""
    order = sorted(range(len(sensitivity)), key=lambda i: (n_weights[i], -sensitivity[i], i))
    kept, best = [], -np.inf
    for i in order:
        if sensitivity[i] > best:
            kept.append(i)
            best = sensitivity[i]
    return kept[::-1]


def stay_fp32(
    found: Sequence[Product],
    treatments: Mapping[str, Treatment],
    sensitivity: Mapping[str, float],
    n_table_weights: int,
    min_share: float = MIN_SHARE,
) -> list[Product]:
    """The products that return to fp32, in the order chosen; those that share a weight stay INT8."""
    chosen: list[Product] = []
    left = [p for p in found if sum(q.name == p.name for q in found) == 1]
    while left:
        best = [left[i] for i in frontier([sensitivity[p.y] for p in left], [p.n_weights for p in left])]
        for product in best:
            without = {p.y for p in chosen} | {product.y}
            rest = {y: t for y, t in treatments.items() if y not in without}
            if min(shares(found, rest, n_table_weights)) >= min_share:
                chosen.append(product)
        left = [p for p in left if p not in best]
    return chosen
