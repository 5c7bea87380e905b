"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes column by column, each error made good by later columns.

In place of the paper's Cholesky factor of H^-1 this takes H = R R^T with R upper triangular: the same algorithm
without an inverse (Chee et al. 2023, arXiv 2307.13304, theorem 6). The loss tr(E H E^T), E = W - W^, is |E R|^2, and
column k of E R is E_k R_kk + sum_{j<k} E_j R_jk: W^_k is best what is nearest to W_k + sum_{j<k} E_j R_jk / R_kk, and
what is left counts R_kk^2. That is the importance with which a block's scales are fitted, at its turn, to the goal
that the errors before it have moved; within a block the loss is that of R_bb R_bb^T, H's Schur complement, since
later columns will compensate. `polish` lowers it there, and then the loss of the whole H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from device.records import SlimpiError
from pipeline.formats import Format, Packed, QTensor, Scales, side_by_side
from pipeline.layers import Layer, QuantizedLayer, Stats
from pipeline.methods import llama_codes, polish, search
from pipeline.methods.polish import Coded, from_scales, rounder
from pipeline.methods.rtn import codes_of, inverse

Order = Literal["columns", "activation"]

# On SmolLM2 calibrated on WikiText-2 validation: against 0.01, 1 to 9% less loss on its test, 0 to 12% more on its own.
DAMPING = 0.1
TRIES = 4
"""Damping is raised tenfold after each failure but the last of so many."""
ROUNDS = 1
SWEEPS = 2


@dataclass(frozen=True)
class Curvature:
    """H with damping on its diagonal, and its upper factor R, H = R R^T; float32 (columns, columns)."""

    h: torch.Tensor
    r: torch.Tensor
    notes: list[str]


def run(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
    """The method: `quantize` on every matrix. Those with one input share its factor, and those of one format are then
    solved as one matrix, since rows do not depend on each other (unless the format pools them)."""
    missing = [name for name in formats if name not in stats]
    if missing:
        raise SlimpiError(f"blk.{layer.index}.{missing[0]} has no calibration statistics. Calibrate this model again.")
    by_input: dict[int, list[str]] = {}
    for name in formats:
        by_input.setdefault(id(stats[name]), []).append(name)
    tensors: dict[str, QTensor | Packed] = {}
    notes: list[str] = []
    for names in by_input.values():
        curvature = factorize(stats[names[0]].hessian().to(layer.matrices[names[0]].device))
        notes += [f"blk.{layer.index}.{name}: {note}" for name in names for note in curvature.notes]
        for together in _stackable(names, formats):
            rows = [layer.matrices[name] for name in together]
            whole = solve(torch.cat(rows), curvature, formats[together[0]])
            start = 0
            for name, part in zip(together, rows, strict=True):
                tensors[name] = whole if len(rows) == 1 else _rows(whole, start, start + len(part))
                start += len(part)
    return QuantizedLayer({name: tensors[name] for name in formats}, notes=notes)


def quantize(
    w: torch.Tensor,
    stats: Stats | None,
    kind: Format,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
    order: Order = "columns",
) -> tuple[QTensor | Packed, list[str]]:
    """w float32 (rows, columns). See `factorize` for damping and errors, `solve` for the rest."""
    if stats is None:
        raise SlimpiError("GPTQ needs a Hessian of each layer's input. Calibrate first.")
    curvature = factorize(stats.hessian().to(w.device), damping)
    return solve(w, curvature, kind, rounds, sweeps, order), curvature.notes


def factorize(hessian: torch.Tensor, damping: float = DAMPING) -> Curvature:
    """H with `damping` times its mean diagonal added, and its factor. Inputs that were never active have only that.

    Where Cholesky fails damping is raised tenfold, which the notes say. SlimpiError after TRIES failures, or for a
    Hessian that is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise SlimpiError("A Hessian is not finite. Calibrate again.")
    mean = float(hessian.diagonal().mean())
    if mean <= 0:
        eye = torch.eye(len(hessian), device=hessian.device)
        return Curvature(eye, eye, ["no calibration token reached it, so that all its columns count alike"])
    notes: list[str] = []
    for attempt in range(TRIES):
        share = damping * 10**attempt
        h = hessian.clone()
        h.diagonal().add_(share * mean)
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not int(info):
            return Curvature(h, lower.flip(0, 1), notes)
        notes.append(f"Cholesky failed with damping {share:g} of the mean diagonal; raised to {10 * share:g}")
    raise SlimpiError(
        f"Cholesky of a {len(hessian)} x {len(hessian)} Hessian fails even with damping {share:g} of its mean "
        "diagonal: it is no mean of x x^T. Calibrate again."
    )


def solve(
    w: torch.Tensor,
    curvature: Curvature,
    kind: Format,
    rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
    order: Order = "columns",
) -> QTensor | Packed:
    """Codes and scales of w. rounds: of `polish.improve` each time a block is visited; sweeps: visits to all blocks
    with the whole H, after the pass that is GPTQ. Both 0 give the paper's algorithm.

    order "activation" takes columns by falling diagonal of H, with scales fixed beforehand (act-order with static
    groups); scales then move in sweeps only.
    """
    target = w.T.contiguous()
    if kind.codes is None:
        return _in_llamas_blocks(target, curvature, kind)
    codes_of(w, kind)
    forward = _in_columns_order if order == "columns" else _in_activation_order
    coded, scales = forward(target, curvature, kind, rounds)
    error = target - coded.weights()
    size = kind.block_size
    for _ in range(sweeps):
        for index in range(len(error) // size):
            columns = slice(index * size, (index + 1) * size)
            gradient = curvature.h[columns] @ error
            corner = curvature.h[columns, columns].contiguous()
            polish.improve(coded.block(index), error[columns], gradient, corner, rounds)
    return coded.to_qtensor(scales)


def _in_columns_order(target: torch.Tensor, curvature: Curvature, kind: Format, rounds: int) -> tuple[Coded, Scales]:
    importance = curvature.r.diagonal().square()
    parts: list[Coded] = []
    scales: list[Scales] = []

    def settle(low: int, high: int, goal: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        scales.append(search.fit(goal.T.contiguous(), importance[low:high], kind))
        part = from_scales(kind, scales[-1])
        groups = [k // part.codes.group_size for k in range(high - low)]
        q, error = _round(part, goal, corner, groups)
        part.q.copy_(q)
        if rounds:
            h = corner @ corner.T
            polish.improve(part, error, h @ error, h, rounds)
        parts.append(part)
        return part.weights()

    _forward(target, curvature.r, kind.block_size, settle)
    return polish.stack(parts), side_by_side(scales)


def _in_llamas_blocks(target: torch.Tensor, curvature: Curvature, kind: Format) -> Packed:
    """Blocks are settled by llama.cpp's search; feedback goes from block to block, none within one, so that a column
    counts what it does in R_bb R_bb^T, before any compensation by its neighbours."""
    parts: list[Packed] = []

    def settle(low: int, high: int, goal: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        parts.append(llama_codes.choose(goal.T, corner.square().sum(1), kind))
        return parts[-1].dequantize().T.to(goal.device)

    _forward(target, curvature.r, kind.block_size, settle)
    return Packed(kind, np.concatenate([part.data for part in parts], 1), len(target))


def _in_activation_order(target: torch.Tensor, curvature: Curvature, kind: Format, rounds: int) -> tuple[Coded, Scales]:
    importance = curvature.h.diagonal()
    order = importance.argsort(descending=True, stable=True)
    lower = torch.linalg.cholesky(curvature.h[order][:, order].flip(0, 1))
    scales = search.fit(target.T.contiguous(), importance, kind)
    coded = from_scales(kind, scales)
    group_of = [k // coded.codes.group_size for k in order.tolist()]

    def settle(low: int, high: int, goal: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        q, error = _round(coded, goal, corner, group_of[low:high])
        coded.q[order[low:high]] = q
        return goal - error

    _forward(target[order], lower.flip(0, 1), polish.PANEL, settle)
    return coded, scales


Settle = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(low, high, goal of columns low...high, R's corner there) -> W^ of these columns; columns first."""


def _forward(target: torch.Tensor, r: torch.Tensor, size: int, settle: Settle) -> None:
    """Settle `size` columns at a time, in order. The effect of settled columns on the others is one product for each
    node of a binary tree over the columns, so that most of the work is in large products."""
    error, moved = torch.zeros_like(target), torch.zeros_like(target)  # E, and of each column of E R what is known

    def walk(low: int, high: int) -> None:
        if high - low > size:
            middle = low + size * (((high - low + size - 1) // size + 1) // 2)
            walk(low, middle)
            moved[middle:high].addmm_(r[low:middle, middle:high].T, error[low:middle])
            walk(middle, high)
            return
        corner = r[low:high, low:high]
        goal = target[low:high] + torch.linalg.solve_triangular(corner.T, moved[low:high], upper=False)
        error[low:high] = target[low:high] - settle(low, high, goal, corner)

    walk(0, len(target))


def _round(
    part: Coded, goal: torch.Tensor, corner: torch.Tensor, groups: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grid values of columns in order, and goal - W^; groups: of each column, the row of part's scales it has."""
    nearest = rounder(part.codes, goal.device)
    scales, offsets, inverses = (of_group.unbind() for of_group in (part.scale(), part.offset(), inverse(part.scale())))
    feedback = (corner / corner.diagonal()).T.contiguous()  # row k: the share of each earlier error that k takes
    q, error, now = torch.empty_like(goal), torch.empty_like(goal), goal.clone()
    for low in range(0, len(goal), polish.PANEL):
        high = min(low + polish.PANEL, len(goal))
        panels = (tensor[low:high].unbind() for tensor in (now, goal, q, error))
        for k, (wanted, aim, value, left) in enumerate(zip(*panels, strict=True), low):
            group = groups[k]
            nearest(torch.sub(wanted, offsets[group], out=value).mul_(inverses[group]))
            torch.sub(aim, torch.addcmul(offsets[group], value, scales[group]), out=left)
            now[k + 1 : high].addr_(feedback[k + 1 : high, k], left)
        now[high:].addmm_(feedback[high:, low:high], error[low:high])
    return q, error


def _stackable(names: list[str], formats: Mapping[str, Format]) -> list[list[str]]:
    together: dict[str, list[str]] = {}
    for name in names:
        codes = formats[name].codes
        pooled = codes is not None and codes.pool > 1
        together.setdefault(name if pooled else formats[name].name, []).append(name)
    return list(together.values())


def _rows(q: QTensor | Packed, start: int, stop: int) -> QTensor | Packed:
    if isinstance(q, Packed):
        return replace(q, data=q.data[start:stop])
    s = q.scales
    dmin, min_codes = s.dmin, s.min_codes
    cut = replace(
        s,
        d=s.d[start:stop],
        scale_codes=s.scale_codes[start:stop],
        dmin=None if dmin is None else dmin[start:stop],
        min_codes=None if min_codes is None else min_codes[start:stop],
    )
    return QTensor(q.format, q.codes[start:stop], cut)
