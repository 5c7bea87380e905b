"""Which key-value groups and MLP channels to keep: the same number in every layer, or each layer its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from device.schema import SlimpiError
from pipeline import plan_milp
from pipeline.progress import Tick, quiet
from pipeline.prune.cut import ATTENTION, MLP, Cut, Dims, LayerCut, rounded
from pipeline.prune.scores import SCORES, Evidence, Scores
from pipeline.prune.stream import Judge
from pipeline.prune.surgery import Surgery, operate

_LEVELS = 8
"""Steps of an MLP's width among which the measured allocation chooses."""


@dataclass(frozen=True)
class Pruned:
    """A cut, and tensors that get other values than a slice of the old ones: see `cut.apply`."""

    cut: Cut
    new: dict[str, torch.Tensor] = field(default_factory=dict)


def top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest, ascending."""
    return tuple(sorted(torch.topk(scores, count).indices.tolist()))


def by_score(name: str, judge: Judge, evidence: Evidence, share: float, tick: Tick = quiet) -> Pruned:
    """Uniform widths: of every number of groups with the channels that reach the share, what diverges least."""
    scores = SCORES[name](evidence, tick)

    def cut_to(groups: int, channels: int) -> Pruned:
        return Pruned(Cut(tuple(LayerCut(top(g, groups), top(c, channels)) for g, c in scores)))

    return _best_uniform(judge, share, cut_to, tick)


def _best_uniform(judge: Judge, share: float, cut_to: Callable[[int, int], Pruned], tick: Tick) -> Pruned:
    widths = uniform_widths(judge.stream.dims, share)
    best, least = None, float("inf")
    for done, (groups, channels) in enumerate(widths, 1):
        tried = cut_to(groups, channels)
        if (found := judge.divergence(tried.cut)) < least:
            best, least = tried, found
        tick(done, len(widths), "widths")
    assert best is not None
    return best


def uniform_widths(dims: Dims, share: float) -> list[tuple[int, int]]:
    """(groups, channels) of a layer that remove about the share; SlimpiError if rounding leaves nothing to remove."""
    layer = dims.weights(dims.whole) / dims.n_layers
    found = []
    for groups in range(dims.groups, 0, -1):
        channels = (layer * (1 - share) - groups * dims.group_weights) / dims.channel_weights
        if dims.multiple / 2 <= channels < dims.channels + dims.multiple / 2:
            found.append((groups, rounded(channels, dims.multiple, dims.channels)))
    found = [width for width in found if width != (dims.groups, dims.channels)]
    if not found:
        raise SlimpiError(
            f"no width is {share:.0%} less: {dims.channels} channels come in multiples of {dims.multiple}, "
            f"{dims.groups} key-value groups stay whole. Prune another share, or uneven widths."
        )
    return found


def uneven_by_score(name: str, judge: Judge, evidence: Evidence, share: float, tick: Tick = quiet) -> Pruned:
    """Uneven widths from one threshold for all layers' scores, standardized within each layer (FLAP, section 3.3)."""
    dims = judge.stream.dims
    scores = SCORES[name](evidence, tick)
    units = []
    for index, (groups, channels) in enumerate(scores):
        units += [(value, dims.group_weights, index, 0) for value in _standard(groups)]
        units += [(value, dims.channel_weights, index, 1) for value in _standard(channels)]
    removed, wanted = 0, share * dims.weights(dims.whole)
    kept = [[dims.groups, dims.channels] for _ in range(dims.n_layers)]
    for _, weights, index, part in sorted(units):
        if removed >= wanted:
            break
        removed += weights
        kept[index][part] -= 1
    return Pruned(_round_widths(dims, scores, kept))


def _standard(scores: torch.Tensor) -> list[float]:
    if len(scores) == 1:
        return [0.0]
    return ((scores - scores.mean()) / scores.std().clamp_min(1e-30)).tolist()


def _round_widths(dims: Dims, scores: Scores, kept: Sequence[Sequence[int]]) -> Cut:
    layers = []
    for (groups, channels), (n_groups, n_channels) in zip(scores, kept, strict=True):
        n_channels = min(dims.channels, round(n_channels / dims.multiple) * dims.multiple)
        layers.append(LayerCut(top(groups, n_groups), top(channels, n_channels)))
    return Cut(tuple(layers))


def uniform_surgery(judge: Judge, evidence: Evidence, share: float, tick: Tick = quiet) -> Pruned:
    """Uniform widths by the optimal brain surgeon, the matrices that read them made to fit (see `surgery`)."""
    dims = judge.stream.dims
    widths = uniform_widths(dims, share)
    done = _operate(evidence, [g for g, _ in widths], [c for _, c in widths], tick)

    def cut_to(groups: int, channels: int) -> Pruned:
        return _pruned(done, [(groups, channels)] * dims.n_layers, dims)

    return _best_uniform(judge, share, cut_to, tick)


def measured(judge: Judge, evidence: Evidence, share: float, tick: Tick = quiet) -> Pruned:
    """Uneven widths: each part of each layer at several widths, what that alone does to the output is measured, and the
    widths with the least sum under the share are a mixed-integer program's answer.

    Units go in the optimal brain surgeon's order, and the matrices that read them are made to fit, as they are while
    measuring. Sums of divergences are the best guess there is at that of many cuts at once.
    """
    dims = judge.stream.dims
    groups, channels = list(range(dims.groups + 1)), levels(dims)
    done = _operate(evidence, groups, channels, tick)
    errors, sizes = _measure(judge, done, groups, channels, tick)
    budget = int(dims.weights(dims.whole) * (1 - share))
    chosen = plan_milp.solve(errors, sizes, budget, relative_gap=1e-4).formats
    widths = [(int(chosen[f"{i}.attention"]), int(chosen[f"{i}.mlp"])) for i in range(dims.n_layers)]
    return _pruned(done, widths, dims)


def levels(dims: Dims) -> list[int]:
    """Numbers of channels an MLP may keep, none and all among them."""
    steps = min(_LEVELS, max(1, dims.channels // dims.multiple))
    return sorted(
        {round(dims.channels * k / steps / dims.multiple) * dims.multiple for k in range(steps)} | {dims.channels}
    )


def _operate(
    evidence: Evidence, groups: Sequence[int], channels: Sequence[int], tick: Tick
) -> list[tuple[Surgery, Surgery]]:
    dims, found = evidence.stream.dims, []
    for index, (ends, (attention, mlp)) in enumerate(zip(evidence.stream.ends, evidence.moments, strict=True), 1):
        width = dims.head * dims.queries_per_group
        found.append(
            (
                operate(ends.attention.weight.detach().cpu(), attention.hessian, width, groups),
                operate(ends.mlp.weight.detach().cpu(), mlp.hessian, 1, channels),
            )
        )
        tick(index, dims.n_layers, "layers operated on")
    return found


def _measure(
    judge: Judge, done: list[tuple[Surgery, Surgery]], groups: Sequence[int], channels: Sequence[int], tick: Tick
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """(divergence, weights) of each part at each level, everything else whole."""
    stream, dims = judge.stream, judge.stream.dims
    errors: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for index, (attention, mlp) in enumerate(done):
        parts = (
            ("attention", stream.ends[index].attention, attention, groups, dims.group_weights),
            ("mlp", stream.ends[index].mlp, mlp, channels, dims.channel_weights),
        )
        for part, module, surgery, counts, weights in parts:
            name, whole = f"{index}.{part}", module.weight.detach().clone()
            errors[name] = {str(counts[-1]): 0.0}
            sizes[name] = {str(count): float(count * weights) for count in counts}
            for count in counts[:-1]:
                module.weight.data.copy_(surgery.matrices[count])
                errors[name][str(count)] = judge.divergence(dims.whole, start=index)
            module.weight.data.copy_(whole)
        tick(index + 1, dims.n_layers, "layers measured")
    return errors, {name: {count: sizes[name][count] for count in row} for name, row in errors.items()}


def _pruned(done: list[tuple[Surgery, Surgery]], widths: Sequence[tuple[int, int]], dims: Dims) -> Pruned:
    layers, new = [], {}
    for index, ((attention, mlp), (n_groups, n_channels)) in enumerate(zip(done, widths, strict=True)):
        layer = LayerCut(attention.kept(n_groups), mlp.kept(n_channels))
        layers.append(layer)
        width = dims.head * dims.queries_per_group
        columns = (
            (torch.tensor(layer.groups)[:, None] * width + torch.arange(width)).reshape(-1) if layer.groups else None
        )
        if columns is not None and n_groups < dims.groups:
            new[f"model.layers.{index}.{ATTENTION}"] = attention.matrices[n_groups][:, columns].contiguous()
        if 0 < n_channels < dims.channels:
            new[f"model.layers.{index}.{MLP}"] = mlp.matrices[n_channels][:, list(layer.channels)].contiguous()
    return Pruned(Cut(tuple(layers)), new)
