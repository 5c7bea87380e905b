"""AWQ: input scales from activations' magnitude, hidden in what precedes; then clipped rounding, or any other method.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", eq. 4 and 5: s = mean|x|^alpha, alpha on a grid, by the
error of the output. Its mean square is tr(E H E^T) with H = E[x x^T] and E the weights' error, so that no sample is run
again. Differences from the paper: attention is judged by the outputs of q, k and v, not of the block; alpha is searched
on a part of the rows and its best is taken only if the finished layer loses less than without; q and k are clipped too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from device.records import SlimpiError
from pipeline.folds import changed_vectors, fold_in, n_scales, per_column, per_producer, possible, scaled_stats
from pipeline.formats import Format, QTensor, Quantized
from pipeline.layers import Fold, Layer, Method, QuantizedLayer, Stats
from pipeline.methods import rtn
from pipeline.methods.blend import where

Probe = Callable[[torch.Tensor, Stats | None, Format], tuple[Quantized, list[str]]]
Refine = Callable[["Scaled", "Scaled", Fold | None, list[str], Mapping[str, Format]], "Scaled"]
"""(before the fold's scales, with them and in codes, the fold, its matrices, formats) -> with others. Without a fold:
a matrix whose inputs cannot be scaled."""

ALPHAS = tuple(i / 20 for i in range(1, 21))
CLIPS = tuple(1 - i / 20 for i in range(1, 10))
N_ROWS = 256
"""Rows of each matrix on which alpha is searched, spread evenly."""
_ALL = slice(None)
_SMALLEST = 1e-4  # of the largest mean |x|: a column that is never active gets a scale too


@dataclass(frozen=True)
class Scaled:
    """A layer after folding, and its matrices in codes.

    scales: by producer, those that were taken. stats, inputs: by matrix, of its input as it came, and scaled.
    column_scales, row_scales: by matrix, what its columns were multiplied with and its rows divided by.
    """

    layer: Layer
    scales: dict[str, torch.Tensor]
    stats: dict[str, Stats]
    inputs: dict[str, Stats]
    column_scales: dict[str, torch.Tensor]
    row_scales: dict[str, torch.Tensor]
    tensors: dict[str, Quantized]
    notes: list[str]


def unscaled(layer: Layer, stats: Mapping[str, Stats]) -> Scaled:
    """The layer as it came."""
    return Scaled(layer, {}, dict(stats), dict(stats), {}, {}, {}, [])


def method(final: Method, probe: Probe) -> Method:
    """AWQ around the method `final`; `probe` is what alpha is judged by, many times."""

    def run(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
        found = scale(layer, stats, formats, final, probe)
        return QuantizedLayer(found.tensors, changed_vectors(layer, found.layer), found.notes)

    return run


def scale(
    layer: Layer,
    stats: Mapping[str, Stats],
    formats: Mapping[str, Format],
    final: Method,
    probe: Probe,
    refine: Refine | None = None,
) -> Scaled:
    """Search the scales of every fold and quantize with `final`; what `refine` makes of it is taken where it loses
    less. Folds that feed from a matrix come first: what divides the rows of a matrix is known before its columns are
    scaled and its codes are chosen."""
    folds, notes = possible(layer, formats)
    state = replace(unscaled(layer, _remembering(stats, folds)), notes=notes)
    kept = []
    for fold in reversed(folds):
        state = _settled(_refined(state, _fold(state, fold, formats, final, probe), fold, formats, refine), fold)
        kept += [] if fold.producer in state.scales else [fold.producer]
    for name in [name for name in formats if name not in state.tensors]:
        alone = _finished(state, [name], formats, final)
        state = _refined(state, alone, None, {name: formats[name]}, refine)
    if kept:
        state.notes.append(
            f"blk.{layer.index}: {len(kept)} of {len(folds)} folds not scaled, as it does not help: {', '.join(kept)}"
        )
    return replace(state, tensors={name: state.tensors[name] for name in formats})


def _fold(state: Scaled, fold: Fold, formats: Mapping[str, Format], final: Method, probe: Probe) -> Scaled:
    """The state with the best scales of a fold, or without scales, and in codes."""
    judged = _judged(fold, formats)
    rows = {name: _some_rows(state.layer.matrices[name], formats[name]) for name in judged}
    best_loss, best = _loss(state, judged, formats, probe, rows), None
    for scales in candidates(state, fold):
        loss = _loss(applied(state, fold, scales), judged, formats, probe, rows)
        if loss < best_loss:
            best_loss, best = loss, scales
    plain = _finished(state, judged, formats, final)
    if best is None:
        return plain
    scaled = _finished(applied(state, fold, best), judged, formats, final)
    return scaled if finished_loss(scaled, judged) < finished_loss(plain, judged) else plain


def _refined(
    before: Scaled, after: Scaled, fold: Fold | None, formats: Mapping[str, Format], refine: Refine | None
) -> Scaled:
    if refine is None:
        return after
    judged = list(formats) if fold is None else _judged(fold, formats)
    other = refine(before, after, fold, judged, formats)
    return other if finished_loss(other, judged) < finished_loss(after, judged) else after


def candidates(state: Scaled, fold: Fold) -> list[torch.Tensor]:
    """Scales (n_scales,) to try: mean |x|^alpha, of geometric mean 1."""
    n = n_scales(state.layer, fold)
    size = per_producer(state.stats[fold.consumers[0]].mean_abs_x.to(_device(state)), n, fold.head_size)
    if not size.any():
        return []
    log_size = size.clamp(min=_SMALLEST * size.max().item()).log()
    return [((log_size - log_size.mean()) * alpha).exp() for alpha in ALPHAS]


def applied(state: Scaled, fold: Fold, scales: torch.Tensor) -> Scaled:
    """The state with a fold's scales in its weights and statistics; codes are not chosen anew."""
    consumer = fold.consumers[0]
    by_column = per_column(scales, state.layer.matrices[consumer].shape[1], fold.head_size)
    columns = {**state.column_scales, **dict.fromkeys(fold.consumers, by_column)}
    inputs = {**state.inputs, **dict.fromkeys(fold.consumers, scaled_stats(state.stats[consumer], by_column))}
    rows = dict(state.row_scales)
    if fold.producer in state.layer.matrices:
        rows[fold.producer] = scales
    return replace(
        state,
        layer=fold_in(state.layer, fold, scales),
        scales={**state.scales, fold.producer: scales},
        inputs=inputs,
        column_scales=columns,
        row_scales=rows,
    )


def row_losses(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Mean square of each output's error, float32 (rows,): the diagonal of E H E^T, E (rows, columns)."""
    return ((error @ hessian) * error).sum(1).clamp(min=0)


def finished_loss(state: Scaled, names: list[str]) -> float:
    """Summed mean square output error of matrices in codes, in the units of the layer as it came."""
    errors = {name: state.tensors[name].dequantize() - state.layer.matrices[name] for name in names}
    return sum(losses_of(state, name, error).sum().item() for name, error in errors.items())


def losses_of(state: Scaled, name: str, error: torch.Tensor, rows: torch.Tensor | slice = _ALL) -> torch.Tensor:
    """Mean square output error (rows,) that an error of the scaled weights of these rows makes, in the units of the
    layer as it came."""
    if name in state.column_scales:
        error = error / state.column_scales[name]
    losses = row_losses(error, state.stats[name].hessian())
    return losses * state.row_scales[name][rows] ** 2 if name in state.row_scales else losses


def _loss(
    state: Scaled, names: list[str], formats: Mapping[str, Format], probe: Probe, rows: Mapping[str, torch.Tensor]
) -> float:
    """As finished_loss, of `probe` on some rows."""
    total = 0.0
    for name in names:
        w = state.layer.matrices[name][rows[name]]
        q, _ = probe(w, state.inputs[name], formats[name])
        total += losses_of(state, name, q.dequantize() - w, rows[name]).sum().item()
    return total


def _finished(state: Scaled, names: list[str], formats: Mapping[str, Format], final: Method) -> Scaled:
    made = final(replace(state.layer, folds=()), state.inputs, {name: formats[name] for name in names})
    return replace(state, tensors={**state.tensors, **made.tensors}, notes=[*state.notes, *made.notes])


def _settled(state: Scaled, fold: Fold) -> Scaled:
    """Without the codes of the producer, which its own fold will choose."""
    return replace(state, tensors={name: q for name, q in state.tensors.items() if name != fold.producer})


def _remembering(stats: Mapping[str, Stats], folds: list[Fold]) -> dict[str, Stats]:
    """Statistics whose Hessian is read once, and one object for all matrices that share an input."""
    found = {name: replace(known, hessian=functools.cache(known.hessian)) for name, known in stats.items()}
    for fold in folds:
        found |= dict.fromkeys(fold.consumers, found[fold.consumers[0]])
    return found


def _judged(fold: Fold, formats: Mapping[str, Format]) -> list[str]:
    """The matrices whose errors a fold's scales change: its consumers, and its producer where rows share scales."""
    kind = formats.get(fold.producer)
    pooled = kind is not None and kind.codes is not None and kind.codes.pool > 1
    return [*fold.consumers, *([fold.producer] if pooled else [])]


def _some_rows(w: torch.Tensor, kind: Format) -> torch.Tensor:
    """Indices of about N_ROWS rows spread evenly, whole pools where rows share scales."""
    pool = 1 if kind.codes is None else kind.codes.pool
    pools = -(-w.shape[0] // pool)
    chosen = torch.linspace(0, pools - 1, min(pools, -(-N_ROWS // pool)), device=w.device).round().long()
    rows = (chosen[:, None] * pool + torch.arange(pool, device=w.device)).reshape(-1)
    return rows[rows < w.shape[0]]


def _device(state: Scaled) -> torch.device:
    return next(iter(state.layer.matrices.values())).device


def clipped(w: torch.Tensor, stats: Stats | None, kind: Format) -> tuple[Quantized, list[str]]:
    """Round to nearest after clipping each group at the share of its largest magnitude with the smallest output error.

    The errors of other groups are left out while a group is clipped (section 3.2 and the reference's auto_clip); rows
    whose whole output is then no better than without are left unclipped.
    """
    if stats is None:
        raise SlimpiError("AWQ needs statistics of each layer's input. Calibrate first.")
    codes = rtn.codes_of(w, kind)
    hessian = stats.hessian()
    plain, _ = rtn.quantize(w, None, kind)
    corners = _diagonal_blocks(hessian, codes.group_size)
    limit = w.reshape(w.shape[0], -1, codes.group_size).abs().amax(2)
    best, share = _group_losses(plain.dequantize() - w, corners), torch.ones_like(limit)
    for ratio in CLIPS:
        q = _rounded(w, limit * ratio, kind)
        losses = _group_losses(q.dequantize() - w, corners)
        better = losses < best
        best, share = torch.where(better, losses, best), torch.where(better, ratio, share)
    found = _rounded(w, limit * share, kind)
    better = _by_pool(row_losses(found.dequantize() - w, hessian), found) < _by_pool(
        row_losses(plain.dequantize() - w, hessian), plain
    )
    return where(better, found, plain), []


def _rounded(w: torch.Tensor, limit: torch.Tensor, kind: Format) -> QTensor:
    """Round to nearest of w with each group clipped to +-limit (rows, groups)."""
    wide = limit.repeat_interleave(w.shape[1] // limit.shape[1], 1)
    return rtn.quantize(w.clamp(-wide, wide), None, kind)[0]


def _diagonal_blocks(hessian: torch.Tensor, size: int) -> torch.Tensor:
    """(groups, size, size)"""
    groups = len(hessian) // size
    at = torch.arange(groups, device=hessian.device)
    return hessian.reshape(groups, size, groups, size)[at, :, at]


def _group_losses(error: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """(rows, groups): mean square of what each group of weights alone does to the output."""
    e = error.reshape(error.shape[0], *corners.shape[:2]).transpose(0, 1)
    return (torch.bmm(e, corners) * e).sum(2).T


def _by_pool(losses: torch.Tensor, q: QTensor) -> torch.Tensor:
    """Losses of rows (rows,) summed over those that share scales: (pools, 1)."""
    short = -len(losses) % q.scales.pool
    return torch.nn.functional.pad(losses, (0, short)).reshape(-1, q.scales.pool).sum(1, keepdim=True)
