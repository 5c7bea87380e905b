"""Uneven widths: how many key-value groups and MLP channels each layer keeps, so that the output changes least.

Units go in the optimal brain surgeon's order, layer by layer, and the matrix that reads them is made to fit (see
`surgery`). What each part at each width does to the output is measured or predicted with everything else whole; the
widths of least sum under the share are the answer of a mixed-integer program. That sums of divergences stand for what
many cuts do at once is an assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeline import plan_milp, sensitivity
from pipeline.progress import Tick, quiet
from pipeline.prune.cut import ATTENTION, MLP, Cut, Dims, LayerCut, indices_of
from pipeline.prune.scores import Evidence
from pipeline.prune.spill import spilled
from pipeline.prune.stream import Judge
from pipeline.prune.surgery import Surgery, operate
from pipeline.prune.widths import Pruned

_LEVELS = 8
"""Steps of an MLP's width among which the program chooses."""
_SMALL = 1e-12
_FELT_CHUNKS = 8


@dataclass(frozen=True)
class Part:
    """A part of a layer that was operated on: numbers of units that it may keep, ascending, and weights of a unit."""

    layer: int
    name: str
    surgery: Surgery
    counts: list[int]
    unit_weights: int


@dataclass(frozen=True)
class Operated:
    """All parts of a model, and nats a token that the output loses with each number of units of each: what is chosen
    from at any share."""

    dims: Dims
    parts: list[Part]
    nats: list[dict[int, float]]


Errors = Callable[[Part], dict[int, float]]
"""Nats a token that the output loses with each number of units."""


def measured(judge: Judge, evidence: Evidence, tick: Tick = quiet) -> Operated:
    """Every second width is measured; between them the divergence's logarithm goes with that of the surgeon's loss."""
    stream, dims = judge.stream, judge.stream.dims

    def errors(part: Part) -> dict[int, float]:
        ends = stream.ends[part.layer]
        module = ends.attention if part.name == ATTENTION else ends.mlp
        whole = module.weight.detach().clone()
        found = {}
        for count in part.counts[:-1:2]:
            module.weight.data.copy_(part.surgery.matrices[count])
            found[count] = max(_SMALL, judge.divergence(dims.whole, start=part.layer))
        module.weight.data.copy_(whole)
        tick(part.layer + 1, dims.n_layers, "layers measured")
        return interpolated(found, part.surgery.losses)

    return _operated(evidence, errors, tick)


def predicted(evidence: Evidence, tick: Tick = quiet) -> Operated:
    """To second order: 1/2 sum over rows of the output's Fisher information and E[(row of W - W') x]^2, from one
    backward pass (see pipeline.sensitivity). A quarter of the time that measuring takes."""
    stream = evidence.stream
    chunks = stream.chunks[:_FELT_CHUNKS]
    felt = sensitivity.collect(stream.checkpoint, chunks, stream.device, tick=tick, model=stream.model).rows

    def errors(part: Part) -> dict[int, float]:
        rows = felt[f"blk.{part.layer}.{'attn_output' if part.name == ATTENTION else 'ffn_down'}.weight"]
        return {count: 0.5 * float(rows.double() @ part.surgery.row_losses[count]) for count in part.counts}

    return _operated(evidence, errors, tick)


def interpolated(known: dict[int, float], losses: dict[int, float]) -> dict[int, float]:
    """Divergence at every count of `losses` from those that are known, piecewise linear between logarithms; below the
    smallest known one it is proportional to the loss. Nothing is lost where all is kept."""
    order = sorted(known, reverse=True)  # less and less is kept: the loss grows
    xs = [np.log(max(losses[count], _SMALL)) for count in order]
    ys = [np.log(known[count]) for count in order]
    found = {}
    for count, loss in losses.items():
        x = np.log(max(loss, _SMALL))
        found[count] = known.get(count, float(np.exp(ys[0] + x - xs[0] if x < xs[0] else np.interp(x, xs, ys))))
    return {**found, max(losses): 0.0}


def levels(dims: Dims) -> list[int]:
    """Numbers of channels an MLP may keep, none and all among them."""
    steps = min(_LEVELS, max(1, dims.channels // dims.multiple))
    lower = {round(dims.channels * k / steps / dims.multiple) * dims.multiple for k in range(steps)}
    return sorted(lower | {dims.channels})


def within(operated: Operated, share: float) -> Pruned:
    """The widths of least sum without `share` of the blocks' weights."""
    parts = {f"{part.layer}.{part.name}": part for part in operated.parts}
    table = {
        key: {str(count): error for count, error in of.items()} for key, of in zip(parts, operated.nats, strict=True)
    }
    sizes = {key: {count: float(int(count) * parts[key].unit_weights) for count in of} for key, of in table.items()}
    budget = int(operated.dims.weights(operated.dims.whole) * (1 - share))
    chosen = plan_milp.solve(table, sizes, budget, relative_gap=1e-4).formats
    return _pruned(operated.parts, {key: int(count) for key, count in chosen.items()}, operated.dims)


def _operated(evidence: Evidence, errors: Errors, tick: Tick) -> Operated:
    dims = evidence.stream.dims
    parts, nats = [], []
    for index in range(dims.n_layers):
        for part in _parts(evidence, index):
            parts.append(part)
            nats.append(errors(part))
        tick(index + 1, dims.n_layers, "layers operated on")
    return Operated(dims, parts, nats)


def _parts(evidence: Evidence, index: int) -> tuple[Part, Part]:
    dims, ends, (attention, mlp) = evidence.stream.dims, evidence.stream.ends[index], evidence.moments[index]
    groups, channels, width = list(range(dims.groups + 1)), levels(dims), dims.head * dims.queries_per_group
    first = operate(ends.attention.weight.detach().cpu(), attention.hessian, width, groups)
    second = operate(ends.mlp.weight.detach().cpu(), mlp.hessian, 1, channels)
    first, second = (_aside(surgery, evidence.scratch) for surgery in (first, second))
    return (
        Part(index, ATTENTION, first, groups, dims.group_weights),
        Part(index, MLP, second, channels, dims.channel_weights),
    )


def _aside(surgery: Surgery, scratch: Path | None) -> Surgery:
    return replace(surgery, matrices={count: spilled(matrix, scratch) for count, matrix in surgery.matrices.items()})


def _pruned(parts: list[Part], counts: dict[str, int], dims: Dims) -> Pruned:
    kept = {(part.layer, part.name): part.surgery.kept(counts[f"{part.layer}.{part.name}"]) for part in parts}
    layers = [LayerCut(kept[index, ATTENTION], kept[index, MLP]) for index in range(dims.n_layers)]
    new = {}
    for part in parts:
        count = counts[f"{part.layer}.{part.name}"]
        if 0 < count < part.counts[-1]:
            columns = indices_of("q" if part.name == ATTENTION else "f", dims, layers[part.layer], None)
            matrix = part.surgery.matrices[count][:, torch.from_numpy(columns)]
            new[f"model.layers.{part.layer}.{part.name}"] = matrix.contiguous()
    return Pruned(Cut(tuple(layers)), new)
