"""PRUNERS: which parts of a model go. One file a family of methods, one line here a method.

A pruner takes a Subject and a share of the decoder blocks' weights and gives a `Pruned`: what stays, and what changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from device.records import SlimpiError
from pipeline.checkpoint import Checkpoint
from pipeline.progress import Tick, quiet
from pipeline.prune import allocate, bias, depth, distill, hidden, moments, repair, sparse, widths
from pipeline.prune.cut import Cut, apply, describe, dims_of
from pipeline.prune.scores import SCORES, Evidence, Scores
from pipeline.prune.stream import Judge, Stream
from pipeline.prune.widths import Pruned
from pipeline.torch_model import in_transformers

AUTO = "AUTO"
"""In place of a percentage."""


@dataclass
class Subject:
    """A whole model, and the chunks (n, n_ctx) of text by which cuts are measured, by which moments are taken and
    repairs fit, which a distillation goes through, and by which the result is judged: `unseen` are none of the others,
    None = there are none to spare. What is made of them is made once, when it is asked for; what is large is put aside
    in the folder `scratch`, if there is one."""

    checkpoint: Checkpoint
    measured: torch.Tensor
    fitted: torch.Tensor
    device: torch.device
    tick: Tick = quiet
    taught: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    distill_steps: int = 0
    unseen: torch.Tensor | None = None
    scratch: Path | None = None
    _scores: dict[str, Scores] = field(default_factory=dict, init=False)

    @cached_property
    def judge(self) -> Judge:
        return Judge(Stream(self.checkpoint, self.measured, self.device))

    @cached_property
    def verdict(self) -> Judge:
        """Of results. What was fit on some text diverges less there: of a repaired SmolLM2 half as much."""
        return self.judge if self.unseen is None else Judge(Stream(self.checkpoint, self.unseen, self.device))

    @cached_property
    def evidence(self) -> Evidence:
        stream = Stream(self.checkpoint, self.fitted, self.device)
        return Evidence(stream, moments.collect(stream, self.tick, self.scratch), self.scratch)

    def scores(self, name: str) -> Scores:
        """One of SCORES: the same for uniform and uneven widths, and for every share."""
        if name not in self._scores:
            self._scores[name] = SCORES[name](self.evidence, self.tick)
        return self._scores[name]

    @cached_property
    def measured_widths(self) -> allocate.Operated:
        return allocate.measured(self.judge, self.evidence, self.tick)

    @cached_property
    def predicted_widths(self) -> allocate.Operated:
        return allocate.predicted(self.evidence, self.tick)


Pruner = Callable[[Subject, float], Pruned]


def _cut(choose: Callable[[Judge, float, Tick], Cut]) -> Pruner:
    return lambda subject, share: Pruned(choose(subject.judge, share, subject.tick))


def _uniform(score: str) -> Pruner:
    return lambda subject, share: widths.by_score(subject.scores(score), subject.judge, share, subject.tick)


def _uneven(score: str) -> Pruner:
    return lambda subject, share: widths.uneven_by_score(subject.scores(score), dims_of(subject.checkpoint), share)


def _sparse(sparsify: sparse.Sparsify, kept_of: int = 0) -> Pruner:
    def run(subject: Subject, share: float) -> Pruned:
        if kept_of and share != 0.5:
            raise SlimpiError(f"of 2:4 two of four stay, which is 50 %, not {100 * share:g}. Ask for 50.")
        stream = Stream(subject.checkpoint, subject.fitted, subject.device)  # its weights are changed on the way
        return sparse.sparse(sparsify, kept_of, stream, share, subject.tick)

    return run


PRUNERS: Mapping[str, Pruner] = MappingProxyType(
    {
        # Whole layers: least block influence; a run of neighbours; one by one by measured divergence.
        "layers_influence": _cut(depth.influence),
        "layers_run": _cut(depth.contiguous),
        "layers": _cut(depth.layers),
        # Attention parts and MLPs one by one, by measured divergence a weight.
        "blocks": _cut(depth.blocks),
        # Channels and key-value groups: the same number in each layer, or each layer its own, by others' scores.
        **{f"width_{name}": _uniform(name) for name in SCORES},
        **{f"widths_{name}": _uneven(name) for name in SCORES},
        # By the optimal brain surgeon; uneven by measured divergence, or predicted from the output's curvature.
        "width": lambda subject, share: widths.uniform_surgery(subject.judge, subject.evidence, share, subject.tick),
        "widths": lambda subject, share: allocate.within(subject.measured_widths, share),
        "widths_fisher": lambda subject, share: allocate.within(subject.predicted_widths, share),
        # Narrower hidden states.
        "hidden": lambda subject, share: hidden.hidden(subject.judge, share, subject.tick),
        # Zeros in matrices of the old size, of each row or two of four: nothing gets smaller or faster.
        "sparse_magnitude": _sparse(sparse.magnitude),
        "sparse_wanda": _sparse(sparse.wanda),
        "sparse_gpt": _sparse(sparse.sparsegpt),
        "sparse24_magnitude": _sparse(sparse.magnitude, 4),
        "sparse24_wanda": _sparse(sparse.wanda, 4),
        "sparse24_gpt": _sparse(sparse.sparsegpt, 4),
    }
)


Repair = Callable[[Subject, Pruned], tuple[Checkpoint, dict[str, Any]]]


def _plain(subject: Subject, pruned: Pruned) -> tuple[Checkpoint, dict[str, Any]]:
    return apply(subject.checkpoint, pruned.cut, pruned.new), {}


def _biased(subject: Subject, pruned: Pruned) -> tuple[Checkpoint, dict[str, Any]]:
    return bias.compensated(subject.checkpoint, subject.evidence, pruned), {}


def _refit(subject: Subject, pruned: Pruned) -> tuple[Checkpoint, dict[str, Any]]:
    begin_s = time.monotonic()
    stream = Stream(subject.checkpoint, subject.fitted, subject.device)
    made = repair.least_squares(stream, pruned, subject.tick)
    return apply(subject.checkpoint, made.cut, made.new), {"repair_s": round(time.monotonic() - begin_s, 1)}


def _patched(subject: Subject, pruned: Pruned) -> tuple[Checkpoint, dict[str, Any]]:
    cut = repair.patched(pruned.cut)
    made, cost = _refit(subject, replace(pruned, cut=cut))
    return made, {**describe(cut, dims_of(subject.checkpoint)), **cost}


def _distilled(rate: float, ends_only: bool) -> Repair:
    """Refit first where the family allows it."""

    def run(subject: Subject, pruned: Pruned) -> tuple[Checkpoint, dict[str, Any]]:
        start, facts = (_refit if repair.fits(subject.checkpoint) else _plain)(subject, pruned)
        schedule = distill.Schedule(subject.distill_steps, rate=rate, ends_only=ends_only)
        judged = subject.measured if subject.unseen is None else subject.unseen
        made, more = distill.distill(
            subject.checkpoint, start, subject.taught, judged, schedule, subject.device, subject.tick
        )
        return made, {**facts, **more}

    return run


REPAIRS: Mapping[str, Repair] = MappingProxyType(
    {
        "": _plain,
        "bias": _biased,
        "repair": _refit,
        "patch": _patched,
        "distill": _distilled(rate=5e-4, ends_only=False),
        "distill_ends": _distilled(rate=1.5e-3, ends_only=True),
    }
)
"""What is done with what is left: nothing, FLAP's biases, least squares; those and a linear layer over every gap, or a
short distillation, of all of the blocks or of the matrices that least squares fit. With what it cost."""


@dataclass(frozen=True)
class PruneSpec:
    """A key of PRUNERS, one of REPAIRS, and the share of the blocks' weights to remove; None = to be chosen together
    with the bits, under a budget."""

    pruner: str
    repair: str
    percent: float | None

    @property
    def name(self) -> str:
        repair = f"+{self.repair}" if self.repair else ""
        return f"{self.pruner}{repair}-{AUTO if self.percent is None else f'{self.percent:g}'}".upper()


def parse_prune(
    method: str,
    percent: str,
    pruners: Collection[str] = PRUNERS,
    repairs: Collection[str] = REPAIRS,
    of: str = "the blocks' weights",
    auto: bool = True,
) -> PruneSpec:
    """Of `LAYERS+REPAIR` and `25`; SlimpiError says which part is unknown and what is known. of: what the percentage
    is of; auto: whether it may be left to a budget."""
    pruner, plus, mend = method.lower().partition("+")
    if pruner not in pruners:
        raise SlimpiError(f"unknown pruner {pruner.upper()!r}. Known: {', '.join(pruners).upper()}.")
    if plus and not (mend and mend in repairs):
        known = ", ".join(filter(None, repairs)).upper()
        raise SlimpiError(f"unknown repair {mend.upper()!r} after {pruner.upper()}. Known: {known}.")
    if percent == AUTO and auto:
        return PruneSpec(pruner, mend, None)
    try:
        share = float(percent)
    except ValueError:
        share = 0.0
    if not 0 < share < 100:
        raise SlimpiError(f"{method}-{percent}: give the percentage of {of} to remove, above 0, below 100.")
    return PruneSpec(pruner, mend, share)


def prune(subject: Subject, spec: PruneSpec) -> tuple[Checkpoint, dict[str, Any]]:
    """The pruned checkpoint, and what a manifest says of it."""
    return finish(subject, spec, choose(subject, spec))


def choose(subject: Subject, spec: PruneSpec) -> Pruned:
    """What goes; the spec's repair does not matter."""
    if spec.percent is None:
        raise ValueError("a share that is still to be chosen")  # a bug of the caller
    return PRUNERS[spec.pruner](subject, spec.percent / 100)


def finish(subject: Subject, spec: PruneSpec, pruned: Pruned) -> tuple[Checkpoint, dict[str, Any]]:
    """Repair what is left: the checkpoint, and what a manifest says of it."""
    dims = dims_of(subject.checkpoint)
    facts = {"pruner": spec.pruner, "percent": spec.percent, "repair": spec.repair, **describe(pruned.cut, dims)}
    if pruned.cut == dims.whole:
        zeros = sum(int((matrix == 0).sum()) for matrix in pruned.new.values())
        facts["share_of_zeros"] = round(zeros / dims.weights(dims.whole), 4)
    found, cost = REPAIRS[spec.repair](subject, pruned)
    if "kld" not in cost:  # a distillation has it, on the same chunks
        cost["kld"] = subject.verdict.divergence_of_model(in_transformers(found).to(subject.device))
    return found, {**facts, **cost, "kld_unseen": subject.unseen is not None}
