"""OmniQuant-style: clipping and input scales learned by gradient descent, weights only, one decoder block at a time.

Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models": learnable weight
clipping (their eq. 2: a group's range ends at sigmoid(gamma) max and sigmoid(beta) min) and learnable equivalent
transformation (eq. 3), with straight-through gradients and Adam. Differences: the paper minimises the error of the
block's output, run on samples; here it is the sum of the outputs' mean square errors of the block's linear layers,
tr(E H E^T), which needs no forward pass and falls apart into one problem a fold. Inputs are scaled, not shifted, as
stock files have no bias to take the shift. Scales are rounded as the format stores them at every step, so that the loss
is that of the file. It starts from AWQ's scales and clipping, and a fold keeps AWQ's codes where learning loses.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pipeline.folds import changed_vectors, n_scales, per_column
from pipeline.formats import Codes, Format, QTensor, Scales
from pipeline.layers import Fold, Layer, QuantizedLayer, Stats, each
from pipeline.methods import awq, rtn
from pipeline.methods.awq import Scaled

STEPS = 30
CLIP_RATE = 0.03
SCALE_RATE = 0.003
BETAS = (0.8, 0.9)
WIDEST = 1.2
"""The largest share of a group's range. The paper's is 1, at which a sigmoid has no gradient."""


@dataclass(frozen=True)
class Learned:
    """What is optimised. log_scales (n_scales,) of the fold, or None; clips: by matrix, gamma and where the format has
    an offset beta, (1 or 2, rows, groups). signs: of the scales (rows, groups), which are not learned."""

    log_scales: torch.Tensor | None
    clips: dict[str, torch.Tensor]
    signs: dict[str, torch.Tensor]

    def scales(self) -> torch.Tensor | None:
        """The fold's scales, of geometric mean 1."""
        return None if self.log_scales is None else (self.log_scales - self.log_scales.mean()).exp()


def quantize(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
    """The method; a note says how long it took and what it gained."""
    start, before, after = time.monotonic(), 0.0, 0.0

    def refine(
        base: Scaled, found: Scaled, fold: Fold | None, names: list[str], formats: Mapping[str, Format]
    ) -> Scaled:
        nonlocal before, after
        other = learn(base, found, fold, names, formats)
        old, new = awq.finished_loss(found, names), awq.finished_loss(other, names)
        before, after = before + old, after + min(old, new)
        return other

    made = awq.scale(layer, stats, formats, each(awq.clipped), rtn.quantize, refine)
    gain = 0.0 if before == 0 else 100 * (1 - after / before)
    seconds = time.monotonic() - start
    said = f"blk.{layer.index}: {STEPS} steps took {seconds:.1f} s, output error {gain:.1f}% below where they began"
    return QuantizedLayer(made.tensors, changed_vectors(layer, made.layer), [*made.notes, said])


def learn(base: Scaled, found: Scaled, fold: Fold | None, names: list[str], formats: Mapping[str, Format]) -> Scaled:
    """`base` with the learned scales of `fold` and the learned codes of matrices `names`; begins at `found`."""
    learned = _beginning(found, fold, names, formats)
    parameters = [{"params": list(learned.clips.values()), "lr": CLIP_RATE}]
    if learned.log_scales is not None:
        parameters.append({"params": [learned.log_scales], "lr": SCALE_RATE})
    adam = torch.optim.Adam(parameters, betas=BETAS)
    # Rounding makes the loss rough: only small steps at the end settle.
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1 / STEPS, STEPS)
    best_loss, best = float("inf"), learned
    for _ in range(STEPS):
        adam.zero_grad()
        loss = sum(_backward(base, learned, fold, name, formats[name]) for name in names)
        if loss < best_loss:
            best_loss, best = loss, _copied(learned)
        adam.step()
        decay.step()
    with torch.no_grad():
        return _in_codes(base, best, fold, names, formats)


def _beginning(found: Scaled, fold: Fold | None, names: list[str], formats: Mapping[str, Format]) -> Learned:
    """AWQ's scales, and the clips that come nearest to its codes' ranges."""
    clips, signs = {}, {}
    for name in names:
        w, start = found.layer.matrices[name], found.tensors[name]
        assert isinstance(start, QTensor)
        scales = start.scales
        clips[name] = clips_of(w, scales, rtn.codes_of(w, formats[name])).requires_grad_()
        signs[name] = torch.where(scales.values() < 0, -1.0, 1.0)
    if fold is None:
        return Learned(None, clips, signs)
    n = n_scales(found.layer, fold)
    device = found.layer.matrices[names[0]].device
    taken = found.scales.get(fold.producer, torch.ones(n, device=device))
    return Learned(taken.log().requires_grad_(), clips, signs)


def clips_of(w: torch.Tensor, scales: Scales, codes: Codes) -> torch.Tensor:
    """gamma and beta with which `ranges` gives these scales, as near as they can."""
    low, high = _extremes(w, codes)
    offset, scale = scales.offsets(), scales.values()
    if offset is None:
        shares = torch.stack([scale.abs() * -codes.grid[0] * rtn.inverse(torch.maximum(-low, high))])
    else:
        top = offset + scale * (codes.grid[-1] - codes.grid[0])
        shares = torch.stack([top * rtn.inverse(high), offset * rtn.inverse(low)])
    return (shares / WIDEST).clamp(0.01, 0.99).logit()


def ranges(
    w: torch.Tensor, clips: torch.Tensor, signs: torch.Tensor, codes: Codes
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale, offset) of groups (rows, groups) after clipping their extremes, differentiable (eq. 2). Without an
    offset the grid's longer side reaches the clipped magnitude; `signs` say in which direction."""
    low, high = _extremes(w, codes)
    shares = WIDEST * clips.sigmoid()
    if not codes.has_offset:
        return shares[0] * torch.maximum(-low, high) / -codes.grid[0] * signs, None
    return (shares[0] * high - shares[1] * low) / (codes.grid[-1] - codes.grid[0]), shares[1] * low


def _extremes(w: torch.Tensor, codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    groups = w.reshape(w.shape[0], -1, codes.group_size)
    low, high = groups.amin(2), groups.amax(2)
    return (low, high) if not codes.has_offset or codes.any_offset else (low.clamp(max=0), high.clamp(min=0))


def fake_quantized(w: torch.Tensor, clips: torch.Tensor, signs: torch.Tensor, kind: Format) -> torch.Tensor:
    """The values that the format holds with these clips; gradients go through rounding as if it were not there."""
    codes = rtn.codes_of(w, kind)
    scale, offset = ranges(w, clips, signs, codes)
    with torch.no_grad():
        stored = rtn.store(scale, offset, kind)
        grid = torch.tensor(codes.grid, dtype=torch.float32, device=w.device)
        values = grid[rtn.nearest(w, stored, kind).long()].reshape(*scale.shape, codes.group_size)
    step = (scale + (stored.values() - scale).detach())[:, :, None]
    base: torch.Tensor | float = 0.0
    if offset is not None:
        exact = stored.offsets()
        assert exact is not None
        base = (offset + (exact - offset).detach())[:, :, None]
    divisor = torch.where(step == 0, 1, step)  # a group without range has no gradient, not an infinite one
    place = ((w.reshape(values.shape) - base) / divisor).clamp(codes.grid[0], codes.grid[-1])
    return ((place + (values - place).detach()) * step + base).reshape(w.shape)


def _scaled_weights(base: Scaled, scales: torch.Tensor | None, fold: Fold | None, name: str) -> torch.Tensor:
    """A matrix with the fold's scales in it, as `awq.applied` would."""
    w = base.layer.matrices[name]
    if scales is None or fold is None:
        return w
    if name == fold.producer:
        return w / scales[:, None]
    return w * per_column(scales, w.shape[1], fold.head_size)


def _backward(base: Scaled, learned: Learned, fold: Fold | None, name: str, kind: Format) -> float:
    """A matrix' loss; adds its gradient. d tr(E H E^T) / dE = 2 E H: H is multiplied once, outside of autograd."""
    scales = learned.scales()
    w = _scaled_weights(base, scales, fold, name)
    error = fake_quantized(w, learned.clips[name], learned.signs[name], kind) - w
    if scales is not None and fold is not None:
        error = (
            error * scales[:, None] if name == fold.producer else error / per_column(scales, w.shape[1], fold.head_size)
        )
    with torch.no_grad():
        outward = error @ base.stats[name].hessian()
        if name in base.row_scales:
            outward *= base.row_scales[name][:, None] ** 2
    surrogate = (outward * error).sum()
    (2 * surrogate).backward()
    return surrogate.item()


def _copied(learned: Learned) -> Learned:
    log_scales = None if learned.log_scales is None else learned.log_scales.detach().clone()
    return Learned(log_scales, {name: clips.detach().clone() for name, clips in learned.clips.items()}, learned.signs)


def _in_codes(
    base: Scaled, learned: Learned, fold: Fold | None, names: list[str], formats: Mapping[str, Format]
) -> Scaled:
    scales = learned.scales()
    after = base if fold is None or scales is None else awq.applied(base, fold, scales)
    tensors = dict(after.tensors)
    for name in names:
        w, kind = after.layer.matrices[name], formats[name]
        stored = rtn.store(*ranges(w, learned.clips[name], learned.signs[name], rtn.codes_of(w, kind)), kind)
        tensors[name] = QTensor(kind, rtn.nearest(w, stored, kind), stored)
    return replace(after, tensors=tensors)
