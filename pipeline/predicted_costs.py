"""What each matrix would cost the model's output in each format: the table from which a budget's plan is chosen.

The cost of a matrix in a format is the rise in KL divergence that `pipeline.sensitivity` predicts from the error that
searched scales leave, 1/2 sum over rows of E[g_r^2] E[(W - W^)_r x]^2. How much less than a search a method leaves is
a matter of the type more than of the matrix: `gains` measures it on one.
Rows are sampled: they are many, alike, and quantized each by itself. Those of the embeddings and the output matrix,
whose weights differ by orders of magnitude, are drawn by their weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import torch

from pipeline import plan as plans
from pipeline import plan_costs
from pipeline.checkpoint import Checkpoint, Tensor
from pipeline.export.gguf import gguf_tensors
from pipeline.formats import FORMATS
from pipeline.layers import Layer, Stats
from pipeline.methods import METHODS, llama_codes, search
from pipeline.plan import Base
from pipeline.progress import Tick
from pipeline.quantize import Workshop, read_layer
from pipeline.sensitivity import Sensitivity, Term, outer_stats
from pipeline.store import stage

CANDIDATES = (
    *llama_codes.TYPES,
    "Q2_K",
    "Q3_K",
    "IQ4_XS",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
)
SAMPLED_ROWS = 48
DRAWN_ROWS = 2048
GAIN_NOISE = 0.1
"""Standard deviations of the weights: more than a step of 8 bits, far less than what would hide their shape."""
GAIN_ROWS = 128
_METHOD = "search"
_TINY = 1e-30
_COSTS = "costs.json"


def predicted_divergence(
    checkpoint: Checkpoint,
    base: Base,
    stats: Mapping[str, Stats],
    felt: Sensitivity,
    candidates: Sequence[str],
    shop: Workshop,
    tick: Tick,
) -> plan_costs.Costs:
    """{block matrix: {candidate format: nats}}, block by block, each block a stage of its own."""
    tensors = gguf_tensors(checkpoint)
    choices = plans.choices(base, base.linear, candidates)
    n_blocks = checkpoint.config["num_hidden_layers"]
    costs: plan_costs.Costs = {}
    for index in range(n_blocks):

        def make(folder: Path, index: int = index) -> None:
            layer = read_layer(tensors, index, (), shop.device)
            found = _layer_costs(layer, stats, felt.rows, choices)
            (folder / _COSTS).write_bytes(msgspec.json.encode(found))

        key = [shop.weights_key, shop.stats_key, candidates, SAMPLED_ROWS, _METHOD, shop.device.type]
        folder = stage(shop.root, f"{shop.name}-costs-blk.{index}", key, make, shop.say)
        costs |= msgspec.json.decode((folder / _COSTS).read_bytes(), type=dict[str, dict[str, float]])
        tick(index + 1, n_blocks, f"blk.{index}")
    return costs


def outer_costs(
    checkpoint: Checkpoint, base: Base, felt: Sensitivity, candidates: Sequence[str], shop: Workshop
) -> plan_costs.Costs:
    """{embeddings or output matrix: {candidate format: nats}}."""
    tensors = gguf_tensors(checkpoint)
    choices = plans.choices(base, felt.outer, candidates)
    known = outer_stats(felt)
    costs: plan_costs.Costs = {}
    for name, terms in felt.outer.items():

        def make(folder: Path, name: str = name, terms: list[Term] = terms) -> None:
            found = _drawn_costs(tensors[name], terms, known[name], choices[name], shop.device)
            (folder / _COSTS).write_bytes(msgspec.json.encode(found))

        key = [shop.weights_key, shop.outer_key, candidates, DRAWN_ROWS, shop.device.type]
        folder = stage(shop.root, f"{shop.name}-costs-{name.removesuffix('.weight')}", key, make, shop.say)
        costs[name] = msgspec.json.decode((folder / _COSTS).read_bytes(), type=dict[str, float])
    return costs


def _drawn_costs(
    tensor: Tensor, terms: Sequence[Term], stats: Stats, kinds: Sequence[str], device: torch.device
) -> dict[str, float]:
    """The terms' sum over all rows, from DRAWN_ROWS of them drawn with probability as their weight."""
    share = torch.stack([term.weights * term.hessian.trace() for term in terms]).sum(0).double()
    share = share.clamp(min=1e-12 * float(share.sum()))  # what never came may still be drawn
    share /= share.sum()
    drawn = torch.multinomial(share, min(DRAWN_ROWS, len(share)), True, generator=torch.Generator().manual_seed(0))
    w = tensor.read()[drawn].float().to(device)
    found = {}
    for kind in kinds:
        error = (w - search.quantize(w, stats, FORMATS[kind])[0].dequantize()).double()
        losses = [((error @ t.hessian.double().to(device)) * error).sum(1).cpu() * t.weights[drawn] for t in terms]
        found[kind] = 0.5 * float((torch.stack(losses).sum(0) / share[drawn]).mean())
    return found


def gains(
    checkpoint: Checkpoint,
    base: Base,
    stats: Mapping[str, Stats],
    method: str,
    candidates: Sequence[str],
    shop: Workshop,
) -> dict[str, float]:
    """{format: the method's output error over the search's}, on some rows of a matrix halfway through the model.

    With noise added: weights of a quantized source lie on a grid, which one of the two may find and the other not.
    """
    if METHODS[method].run is METHODS[_METHOD].run:
        return dict.fromkeys(candidates, 1.0)
    index = checkpoint.config["num_hidden_layers"] // 2
    layer = read_layer(gguf_tensors(checkpoint), index, (), shop.device)
    filled = [name for name, w in layer.matrices.items() if w.any()] or list(layer.matrices)
    name = min(filled, key=lambda n: (layer.matrices[n].shape[1], n))
    w = layer.matrices[name][:: max(1, len(layer.matrices[name]) // GAIN_ROWS)]
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w.device)
    part = replace(layer, matrices={name: w + GAIN_NOISE * w.std() * noise}, vectors={})
    full = f"blk.{index}.{name}"
    known = _read_once({name: stats[full]}) if full in stats else {}
    choices = plans.choices(base, [full], candidates)
    ours, searched = (
        plan_costs.layer_errors(
            part, known, choices, METHODS[m].run, plan_costs.output if known else plan_costs.frobenius
        )
        for m in (method, _METHOD)
    )
    found = {kind: ours[full][kind] / max(searched[full][kind], 1e-30) for kind in choices[full]}
    return {kind: found.get(kind, 1.0) for kind in candidates}


def scaled(costs: plan_costs.Costs, by: Mapping[str, float]) -> plan_costs.Costs:
    return {name: {kind: cost * by[kind] for kind, cost in row.items()} for name, row in costs.items()}


def _layer_costs(
    layer: Layer,
    stats: Mapping[str, Stats],
    sensitivity: Mapping[str, torch.Tensor],
    choices: Mapping[str, Sequence[str]],
) -> plan_costs.Costs:
    prefix = f"blk.{layer.index}."
    sampled, scale = {}, {}
    for name, w in layer.matrices.items():
        step = max(1, w.shape[0] // SAMPLED_ROWS)
        weight = sensitivity[prefix + name][::step].to(w.device)
        # A row's share of the divergence goes with the square of its values: in the row it is counted by any measure.
        sampled[name] = w[::step] * weight.sqrt()[:, None] / weight.max().clamp(min=_TINY).sqrt()
        scale[prefix + name] = 0.5 * float(weight.max()) * w.shape[0] / len(weight)
    known = _read_once({name: stats[prefix + name] for name in layer.matrices})
    part = replace(layer, matrices=sampled)
    errors = plan_costs.layer_errors(part, known, choices, METHODS[_METHOD].run, plan_costs.output)
    return {name: {kind: error * scale[name] for kind, error in row.items()} for name, row in errors.items()}


def _read_once(stats: Mapping[str, Stats]) -> dict[str, Stats]:
    """The same statistics with Hessians that stay in memory; matrices that share one go on sharing it."""
    by_input = {id(s): replace(s, hessian=cache(s.hessian)) for s in stats.values()}
    return {name: by_input[id(s)] for name, s in stats.items()}
