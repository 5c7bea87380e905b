"""Calibrated INT8 variants of encoders, named by rule: INT8-PLAN[-ARITHMETIC][-tensor][-RANGES].

Plans: `static` quantizes everything as calibrated, `smooth` divides channels first, `lossless` also keeps outlier
channels and the most sensitive products in fp32, never more than 5 % of the weights or activations, and corrects
biases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx

from pipeline.export.onnx_bias import correct_biases
from pipeline.export.onnx_lossless import MIN_SHARE, sensitivities, stay_fp32
from pipeline.export.onnx_observe import Calibration, Observed, observe
from pipeline.export.onnx_ranges import RANGES
from pipeline.export.onnx_smooth import ALPHAS, Choices, fold_divisions, treat
from pipeline.export.onnx_static import ARITHMETICS, Product, Treatment, products, quantize_static, shares
from pipeline.progress import Tick, quiet


@dataclass(frozen=True)
class Plan:
    """alphas and n_kept as in Choices; `selects`: whether sensitive products return to fp32; `corrects`: whether
    biases are corrected."""

    alphas: tuple[float | None, ...]
    n_kept: int
    selects: bool
    corrects: bool


PLANS = {
    "static": Plan((None,), 0, False, False),
    "smooth": Plan(ALPHAS, 0, False, False),
    "lossless": Plan(ALPHAS, 4, True, True),
}


@dataclass(frozen=True)
class Int8Spec:
    """A variant's name taken apart."""

    plan: str
    arithmetic: str = "U8U8"
    per_channel: bool = True
    ranges: str = "minmax"


@dataclass(frozen=True)
class Quantized:
    """The model, what the manifest says of it, and the same as data for the lineage."""

    model: onnx.ModelProto
    notes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


def parse(variant: str) -> Int8Spec | None:
    """INT8-smooth-S8S8-tensor-mse taken apart, or None for another kind of name. What is left out is the default."""
    kind, *words = variant.split("-")
    if kind != "INT8" or not words or words[0] not in PLANS:
        return None
    spec = Int8Spec(words.pop(0))
    arithmetic = words.pop(0) if words and words[0] in ARITHMETICS else spec.arithmetic
    per_channel = not (words and words[0] == "tensor" and words.pop(0))
    ranges = words.pop(0) if words and words[0] in RANGES else spec.ranges
    return None if words else Int8Spec(spec.plan, arithmetic, per_channel, ranges)


def help_text() -> str:
    return (
        f"INT8-PLAN[-ARITHMETIC][-tensor][-RANGES] with a plan among {', '.join(PLANS)}, an arithmetic among "
        f"{', '.join(ARITHMETICS)} and ranges among {', '.join(RANGES)}"
    )


def quantize(
    model: onnx.ModelProto,
    spec: Int8Spec,
    calibration: Calibration,
    seen: dict[str, Observed] | None = None,
    tick: Tick = quiet,
) -> Quantized:
    """The fp32 `model` as `spec` says. `seen`: what `observe` gave; filled if it is empty."""
    found = products(model.graph)
    seen = {} if seen is None else seen
    if not seen:
        seen |= observe(model, list(dict.fromkeys(p.x for p in found)), calibration, tick=tick)
    plan, arithmetic = PLANS[spec.plan], ARITHMETICS[spec.arithmetic]
    choices = Choices(arithmetic, spec.per_channel, spec.ranges, plan.alphas, plan.n_kept)
    treatments = treat(model.graph, found, seen, choices)
    n_table_weights = table_weights(model.graph)
    kept: list[Product] = []
    felt: dict[str, float] = {}
    if plan.selects:
        felt = sensitivities(model, treatments, arithmetic, spec.per_channel, calibration, tick)
        kept = stay_fp32(found, treatments, felt, n_table_weights)
    used = {y: t for y, t in treatments.items() if y not in {p.y for p in kept}}
    quantized = quantize_static(model, used, arithmetic, spec.per_channel)
    fold_divisions(quantized)
    weights, activations = shares(found, used, n_table_weights)
    notes, facts = _notes(weights, activations, kept), _facts(found, used, kept, felt, weights, activations)
    if plan.corrects:
        before, after = correct_biases(model, quantized, calibration, tick)
        facts["bias_correction_kl"] = [float(f"{x:.3g}") for x in (before, after)]
        told = f"divergence {before:.3g} -> {after:.3g} nats a passage" if after < before else "no gain, so left alone"
        notes.append(f"biases corrected on calibration text: {told}")
    return Quantized(quantized, notes, facts)


def table_weights(graph: onnx.GraphProto) -> int:
    """Weights of the lookup tables (Gather of a constant fp32 matrix by rows), which are always uint8."""
    shapes = {t.name: t.dims for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2}
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in shapes}
    return sum(shapes[name][0] * shapes[name][1] for name in tables)


def _notes(weights: float, activations: float, kept: list[Product]) -> list[str]:
    notes = [f"INT8: {weights:.2%} of the weights of products and lookups, {activations:.2%} of the products' inputs"]
    if kept:
        notes.append(f"in fp32: {', '.join(p.name for p in kept)}")
    if min(weights, activations) < MIN_SHARE:
        notes.append(f"less than {MIN_SHARE:.0%} is INT8")
    return notes


def _facts(
    found: list[Product],
    used: dict[str, Treatment],
    kept: list[Product],
    felt: dict[str, float],
    weights: float,
    activations: float,
) -> dict[str, Any]:
    facts: dict[str, Any] = {"int8_weights": round(weights, 5), "int8_activations": round(activations, 5)}
    if kept:
        facts["fp32"] = [p.name for p in kept]
    channels = sum(len(t.kept) for t in used.values())
    if channels:
        facts["fp32_channels"] = channels
    if felt:
        facts["sensitivity_kl"] = {p.name: float(f"{felt[p.y]:.3g}") for p in found}
    return facts
