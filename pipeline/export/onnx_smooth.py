"""How each product is quantized: its activations' interval, channels divided first (SmoothQuant), channels kept apart.

SmoothQuant (Xiao et al. 2023, eq. 4) divides channel j of the activations by max|x_j|^alpha / max|w_j|^(1 - alpha) and
multiplies row j of the weights by it. Outlier channels may be multiplied in fp32 instead (LLM.int8(), Dettmers et al.
2022, section 3.2), so that the other channels get finer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from pipeline.export.onnx_observe import Observed
from pipeline.export.onnx_ranges import RANGES, Range
from pipeline.export.onnx_rewrite import Float32
from pipeline.export.onnx_static import (
    DIVISOR,
    Arithmetic,
    Product,
    Treatment,
    activation_codes,
    quantize_weight,
    weight_of,
)

GELU_MINIMUM = -0.16997121  # of x * Phi(x), at x = -0.7518
ALPHAS = (None, 0.5, 0.7, 0.8, 0.9, 1.0)  # None = no division
N_SEARCH_ROWS = 256
_LEAST = 1e-5
_ELEMENTWISE = frozenset(("Mul", "Add", "Div", "Erf", "Cast", "Constant"))


@dataclass(frozen=True)
class Choices:
    """What `treat` may do: alphas to search, channels to keep in fp32 (of each product's input), the RANGES entry."""

    arithmetic: Arithmetic
    per_channel: bool = True
    ranges: str = "minmax"
    alphas: tuple[float | None, ...] = (None,)
    n_kept: int = 0


def treat(
    graph: onnx.GraphProto, found: Sequence[Product], seen: Mapping[str, Observed], choices: Choices
) -> dict[str, Treatment]:
    """{y: Treatment} of every product; those with the same input share one, so that it is quantized once."""
    after_gelu = gelu_outputs(graph)
    by_input: dict[str, list[Product]] = {}
    for product in found:
        by_input.setdefault(product.x, []).append(product)
    shared = {p.name for p in found if sum(q.name == p.name for q in found) > 1}
    treatments = {}
    for x, group in by_input.items():
        own = choices
        if any(p.name in shared for p in group):  # one weight, several inputs: nothing may be moved into it
            own = replace(choices, alphas=(None,), n_kept=0)
        weights = [np.asarray(weight_of(graph, product)) for product in group]
        treatment = _best(seen[x], weights, own, x in after_gelu)
        treatments.update({product.y: treatment for product in group})
    return treatments


def _best(seen: Observed, weights: list[Float32], choices: Choices, after_gelu: bool) -> Treatment:
    """The alpha whose quantized product is nearest to the true one on the sample (relative squared error, summed)."""
    largest = np.maximum(np.maximum(-seen.low, seen.high), _LEAST)
    n_kept = min(choices.n_kept, len(largest) // 64)  # 1.6 % at most
    kept = tuple(sorted(np.argsort(-largest, kind="stable")[:n_kept].tolist()))
    candidates = []
    for alpha in choices.alphas:
        divisor = None if alpha is None else divisor_of(largest, weights, alpha)
        candidates.append(Treatment(interval_of(seen, divisor, kept, choices.ranges, after_gelu), divisor, kept))
    if len(candidates) == 1:
        return candidates[0]
    rows = seen.rows[:N_SEARCH_ROWS]
    return min(candidates, key=lambda c: sum(relative_error(rows, w, c, choices) for w in weights))


def divisor_of(largest: Float32, weights: list[Float32], alpha: float) -> Float32:
    """(inputs,) SmoothQuant's s_j, scaled to a geometric mean of 1."""
    rows = np.maximum(np.max([np.abs(w).max(axis=1) for w in weights], axis=0), _LEAST)
    divisor = largest**alpha / rows ** (1 - alpha)
    return np.asarray(divisor / np.exp(np.log(divisor).mean()), np.float32)


def interval_of(seen: Observed, divisor: Float32 | None, kept: tuple[int, ...], ranges: str, after_gelu: bool) -> Range:
    """The interval of the divided channels that are not kept. After GELU its low end is known, not calibrated."""
    others = np.setdiff1d(np.arange(len(seen.low)), kept)
    scale = np.ones_like(seen.low) if divisor is None else divisor
    part = Observed(*((values / scale)[..., others] for values in (seen.low, seen.high, seen.rows)))
    low, high = RANGES[ranges](part)
    if after_gelu:
        low = GELU_MINIMUM / float(scale[others].min())
    return low, high


def relative_error(rows: Float32, weight: Float32, treatment: Treatment, choices: Choices) -> float:
    """Squared error of the quantized product over the squared deviation of the true one from its mean."""
    true = rows @ weight
    error = emulate(rows, weight, treatment, choices) - true
    return float(np.square(error).sum() / max(float(np.square(true - true.mean(axis=0)).sum()), 1e-12))


def emulate(rows: Float32, weight: Float32, treatment: Treatment, choices: Choices) -> Float32:
    """What the quantized graph computes for x (n, inputs) @ weight (inputs, outputs), in fp32."""
    kept = list(treatment.kept)
    divisor = np.ones(len(weight), np.float32) if treatment.divisor is None else treatment.divisor
    inner = weight * divisor[:, None]
    inner[kept] = 0
    codes, scale, zero = quantize_weight(inner, choices.arithmetic, choices.per_channel)
    step, offset = activation_codes(treatment.interval, choices.arithmetic.activations)
    limits = np.iinfo(choices.arithmetic.activations)
    x = np.clip(np.rint(rows / divisor / step) + float(offset), limits.min, limits.max) - float(offset)
    product = (x * step).astype(np.float32) @ ((codes.astype(np.float32) - zero.astype(np.float32)) * scale)
    return product + rows[:, kept] @ weight[kept]


def gelu_outputs(graph: onnx.GraphProto) -> set[str]:
    """Tensors that are x * Phi(x): a Gelu node, or a Mul that elementwise nodes lead to from an Erf."""
    producers = {output: node for node in graph.node for output in node.output}

    def from_erf(name: str, depth: int) -> bool:
        node = producers.get(name)
        if node is None or depth == 0 or node.op_type not in _ELEMENTWISE:
            return False
        return node.op_type == "Erf" or any(from_erf(source, depth - 1) for source in node.input)

    found = set()
    for name, node in producers.items():
        exact = node.op_type == "Gelu" and not any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
        if exact or (node.op_type == "Mul" and from_erf(name, 4)):
            found.add(name)
    return found


def fold_divisions(model: onnx.ModelProto) -> int:
    """Divisions after a LayerNormalization that feeds nothing else go into its scale and bias; how many did.

    In post-norm encoders (BERT) the norm feeds the residual too: a division there costs as much as undoing it.
    """
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    norms = {node.output[0]: node for node in graph.node if node.op_type == "LayerNormalization"}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    folded = []
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        norm = norms.get(node.input[0]) if node.op_type == "Mul" else None
        if norm is None or not node.input[1].endswith(DIVISOR) or node.input[0] in outputs:
            continue
        others = [user for user in users[node.input[0]] if user is not node and user.op_type != "Shape"]
        if others or any(len(users[name]) > 1 for name in norm.input[1:]):
            continue
        factor = onnx.numpy_helper.to_array(tensors[node.input[1]])
        for name in norm.input[1:]:
            scaled = onnx.numpy_helper.to_array(tensors[name]) * factor
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(scaled, name))
        for user in users[node.output[0]]:
            user.input[:] = [norm.output[0] if name == node.output[0] else name for name in user.input]
        folded.append(node)
    for node in folded:
        graph.node.remove(node)
        graph.initializer.remove(tensors[node.input[1]])
    return len(folded)
