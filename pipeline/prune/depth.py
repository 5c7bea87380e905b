"""Which layers, or parts of layers, to drop whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from device.records import SlimpiError
from pipeline.progress import Tick, quiet
from pipeline.prune.cut import Cut, Dims, LayerCut
from pipeline.prune.stream import Judge

_GONE = LayerCut((), ())
_SWAP_ROUNDS = 2


def n_dropped(dims: Dims, share: float) -> int:
    """Layers to drop for a share of the blocks' weights; SlimpiError if that is none or all."""
    count = round(dims.n_layers * share)
    if not 0 < count < dims.n_layers:
        raise SlimpiError(
            f"{share:.0%} of {dims.n_layers} layers is {count}: from {1 / dims.n_layers:.0%} on one can be dropped, "
            "and one must stay. Prune widths instead, or another share."
        )
    return count


def without(dims: Dims, gone: Iterable[int]) -> Cut:
    """The whole model but these layers."""
    return dropped(dims, map(Unit, gone))


def influence(judge: Judge, share: float, tick: Tick = quiet) -> Cut:
    """Layers whose output is most like their input: least block influence 1 - E[cos(h, h')] (ShortGPT, Men et al. 2024,
    eq. 1)."""
    scores = [
        1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
        for before, after in pairwise(judge.whole)
    ]
    dims = judge.stream.dims
    order = sorted(range(dims.n_layers), key=lambda index: scores[index])
    return without(dims, order[: n_dropped(dims, share)])


def contiguous(judge: Judge, share: float, tick: Tick = quiet) -> Cut:
    """The run of consecutive layers whose loss costs least, by measured divergence (Gromov et al. 2024; Kim et al.
    2024, Shortened LLaMA, measure perplexity)."""
    dims = judge.stream.dims
    count = n_dropped(dims, share)
    best, least = dims.whole, float("inf")
    starts = range(dims.n_layers - count + 1)
    for done, first in enumerate(starts, 1):
        cut = without(dims, range(first, first + count))
        if (found := judge.divergence(cut, start=first)) < least:
            best, least = cut, found
        tick(done, len(starts), "runs of layers")
    return best


@dataclass(frozen=True)
class Unit:
    """Something to drop whole: a layer, or one of its parts."""

    layer: int
    part: str = ""

    def dropped(self, cut: Cut) -> Cut:
        old = cut.layers[self.layer]
        kept = {
            "": _GONE,
            "attention": LayerCut((), old.channels),
            "mlp": LayerCut(old.groups, ()),
        }[self.part]
        return cut.replaced(self.layer, kept)


def layers(judge: Judge, share: float, tick: Tick = quiet) -> Cut:
    """Layer after layer the one whose loss costs least, or the best run, or those of least influence: what diverges
    least of these three, as measured; then layers are exchanged for kept ones while that helps.

    Greedy alone may end in a poor set: layers that cost nothing one by one may do the same work.
    """
    dims = judge.stream.dims
    units = [Unit(index) for index in range(dims.n_layers)]
    greedy = _greedy(judge, units, lambda found: len(found) == n_dropped(dims, share), tick)
    starts = [dropped(dims, greedy), contiguous(judge, share, tick), influence(judge, share)]
    best = min(starts, key=judge.divergence)
    chosen = [unit for unit in units if best.layers[unit.layer].gone]
    return dropped(dims, exchanged(judge, units, chosen, tick))


def blocks(judge: Judge, share: float, tick: Tick = quiet) -> Cut:
    """Attention parts and MLPs: one by one, by measured divergence for a weight removed, until the share is reached, or
    those of the layers that `layers` drops; what diverges least, as measured. Then parts are exchanged for kept ones of
    their kind while that helps.

    Greedy alone may end in a worse set than whole layers, of which this is the finer choice.
    """
    dims = judge.stream.dims
    units = [Unit(index, part) for index in range(dims.n_layers) for part in ("attention", "mlp")]

    def enough(found: list[Unit]) -> bool:
        return dims.share_removed(dropped(dims, found)) >= share - 1e-9

    starts = [_greedy(judge, units, enough, tick)]
    if 0 < round(dims.n_layers * share) < dims.n_layers:
        gone = layers(judge, share, tick).layers
        starts.append(_greedy(judge, units, enough, tick, [unit for unit in units if gone[unit.layer].gone]))
    best = min(starts, key=lambda found: judge.divergence(dropped(dims, found)))
    return dropped(dims, exchanged(judge, units, best, tick))


def dropped(dims: Dims, units: Iterable[Unit]) -> Cut:
    """What is left without these units."""
    cut = dims.whole
    for unit in units:
        cut = unit.dropped(cut)
    return cut


def _greedy(
    judge: Judge,
    units: list[Unit],
    enough: Callable[[list[Unit]], bool],
    tick: Tick,
    gone: Sequence[Unit] = (),
) -> list[Unit]:
    """Units in the order they are dropped, after those that are gone. Lazy: what a unit cost earlier is taken for a
    bound of what it costs now (Minoux 1978), since losses mostly add up; swaps make good for when they do not."""
    dims = judge.stream.dims
    whole_weights = dims.weights(dims.whole)
    chosen = list(gone)
    cut, now, states = dims.whole, 0.0, judge.whole
    if gone:
        cut = dropped(dims, gone)
        now, states = _measured(judge, cut)
    known = dict.fromkeys(units, -1.0)
    while not enough(chosen):
        fresh: set[Unit] = set()
        while True:
            best = min((u for u in units if u not in chosen), key=lambda unit: known[unit])
            if best in fresh:
                break
            tried = best.dropped(cut)
            saved = (dims.weights(cut) - dims.weights(tried)) / whole_weights
            known[best] = (judge.divergence(tried, states, best.layer) - now) / saved
            fresh.add(best)
        tried = best.dropped(cut)
        now += known[best] * (dims.weights(cut) - dims.weights(tried)) / whole_weights
        chosen.append(best)
        cut = tried
        judge.stream.set(cut)
        states = judge.stream.all_states()
        tick(len(chosen), len(units), "dropped")
    return chosen


def exchanged(judge: Judge, units: list[Unit], chosen: list[Unit], tick: Tick) -> list[Unit]:
    """`chosen` after exchanges of a dropped unit for a neighbour of its kind that was kept, while one helps, at most a
    few rounds. Only the layers from the first that an exchange changes are computed for it."""
    dims = judge.stream.dims
    chosen = list(chosen)
    least, states = _measured(judge, dropped(dims, chosen))
    for turn in range(_SWAP_ROUNDS):
        before = least
        for place, out in enumerate(list(chosen)):
            near = (u for u in units if u.part == out.part and abs(u.layer - out.layer) <= 1)
            for unit in (u for u in near if u not in chosen):
                tried = [*chosen[:place], unit, *chosen[place + 1 :]]
                if judge.divergence(dropped(dims, tried), states, min(chosen[place].layer, unit.layer)) < least:
                    chosen = tried
                    least, states = _measured(judge, dropped(dims, chosen))
        tick(turn + 1, _SWAP_ROUNDS, "rounds of exchanges")
        if least == before:
            break
    return chosen


def _measured(judge: Judge, cut: Cut) -> tuple[float, list[torch.Tensor]]:
    """A cut's divergence and its hidden states before each layer and after the last."""
    judge.stream.set(cut)
    states = judge.stream.all_states()
    return judge.divergence_of(states[-1]), states
