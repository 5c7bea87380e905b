"""Which key-value groups and MLP channels to keep: the same number in every layer, or each layer its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from device.records import SlimpiError
from pipeline.progress import Tick, quiet
from pipeline.prune.cut import ATTENTION, MLP, Cut, Dims, LayerCut, indices_of, rounded
from pipeline.prune.scores import Evidence, Scores
from pipeline.prune.stream import Judge
from pipeline.prune.surgery import Surgery, operate


@dataclass(frozen=True)
class Pruned:
    """A cut, and tensors that get other values than a slice of the old ones: see `cut.apply`."""

    cut: Cut
    new: dict[str, torch.Tensor] = field(default_factory=dict)


def top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest, ascending."""
    return tuple(sorted(torch.topk(scores, count).indices.tolist()))


def by_score(scores: Scores, judge: Judge, share: float, tick: Tick = quiet) -> Pruned:
    """Uniform widths: of every number of groups with the channels that reach the share, what diverges least."""

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


def uneven_by_score(scores: Scores, dims: Dims, share: float) -> Pruned:
    """Uneven widths from one threshold for all layers' scores, standardized within each layer (FLAP, section 3.3)."""
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
    widths, width = uniform_widths(dims, share), dims.head * dims.queries_per_group
    done: list[tuple[Surgery, Surgery]] = []
    for index, (ends, (attention, mlp)) in enumerate(zip(evidence.stream.ends, evidence.moments, strict=True), 1):
        first = operate(ends.attention.weight.detach().cpu(), attention.hessian, width, [g for g, _ in widths])
        second = operate(ends.mlp.weight.detach().cpu(), mlp.hessian, 1, [c for _, c in widths])
        done.append((first, second))
        tick(index, dims.n_layers, "layers operated on")

    def cut_to(groups: int, channels: int) -> Pruned:
        layers = [LayerCut(first.kept(groups), second.kept(channels)) for first, second in done]
        new = {}
        for index, (layer, (first, second)) in enumerate(zip(layers, done, strict=True)):
            columns = indices_of("q", dims, layer, None)
            if columns is not None:
                new[f"model.layers.{index}.{ATTENTION}"] = first.matrices[groups][
                    :, torch.from_numpy(columns)
                ].contiguous()
            if channels < dims.channels:
                new[f"model.layers.{index}.{MLP}"] = second.matrices[channels][:, list(layer.channels)].contiguous()
        return Pruned(Cut(tuple(layers)), new)

    return _best_uniform(judge, share, cut_to, tick)
