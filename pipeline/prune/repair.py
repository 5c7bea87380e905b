"""Repair without gradients: the matrices that end a layer's parts, refit one after another so that the pruned model's
residual stream is the whole model's again.

For every kept part in order, with x its last input and h the stream before it in the model repaired so far,
min over W of E|t - h - W x|^2 + penalty |W - W0|^2, t being the whole model's stream before the next part that is kept:
so a part also stands in for what was dropped behind it (least squares as SliceGPT's and LLM-Streamline's, but
sequential and towards the whole model, so that errors do not add up). The penalty is chosen for each matrix on chunks
that took no part in the fit, and where none is better than W0 there, W0 stays. Parts before the first change need
none: their error is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from device.records import SlimpiError
from pipeline.architectures import ARCHITECTURES
from pipeline.checkpoint import Checkpoint
from pipeline.progress import Tick, quiet
from pipeline.prune.cut import ATTENTION, LINEAR, MLP, Cut, Dims, LayerCut, apply, indices_of
from pipeline.prune.moments import add_gram
from pipeline.prune.stream import Stream
from pipeline.prune.widths import Pruned

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean diagonal of E[x x^T]
_HELD_OUT = 8  # one token of so many, at the chunks' end
_SKETCH = 256


@dataclass
class _Pass:
    """The model under repair: its stream, what it keeps, and its hidden state so far (chunks, n_ctx, d)."""

    stream: Stream
    cut: Cut
    hidden: torch.Tensor
    new: dict[str, torch.Tensor]


def fits(checkpoint: Checkpoint) -> bool:
    """Whether what a part adds to the stream is linear in its last matrix."""
    return "post_feedforward_layernorm.weight" not in ARCHITECTURES[checkpoint.architecture].layer_tensors


def patched(cut: Cut) -> Cut:
    """The cut with one linear layer in the place of every run of layers that are gone.

    SlimpiError if none is, or the hidden state is narrower.
    """
    firsts = [i for i, layer in enumerate(cut.layers) if layer.gone and not (i and cut.layers[i - 1].gone)]
    if not firsts or cut.hidden is not None:
        raise SlimpiError("a patch takes the place of whole layers, and none is gone. Prune LAYERS, or take +REPAIR.")
    for index in firsts:
        cut = cut.replaced(index, LayerCut((), (), linear=True))
    return cut


def least_squares(whole: Stream, pruned: Pruned, tick: Tick = quiet) -> Pruned:
    """The pruned model with its parts' last matrices refit on the stream's chunks, and linear layers fit. The stream's
    weights are changed.

    SlimpiError for families that normalize a part's output before adding it, where the fit is not linear.
    """
    if not fits(whole.checkpoint):
        raise SlimpiError(
            f"{whole.checkpoint.architecture} normalizes what a part adds, so that no least squares repairs it. "
            "Leave +REPAIR out."
        )
    dims, start = whole.dims, first_to_fit(pruned, whole.dims)
    cut = dims.whole if pruned.cut.hidden is not None else pruned.cut
    kept_parts = [(layer.groups or layer.linear, layer.channels) for layer in cut.layers]
    parts = [(index, part) for index, both in enumerate(kept_parts) for part in (0, 1) if both[part]]
    ends = [2 * index + part for index, part in parts[1:]] + [2 * len(whole.layers)]
    wanted = {part: end for part, end in zip(parts, ends, strict=True) if end > start}
    targets = _targets(whole, {*wanted.values(), 2 * (start // 2)}, tick)
    state = _begun(whole, pruned, targets)
    for index in range(start // 2, len(cut.layers)):
        layer = state.cut.layers[index]
        if layer.linear:
            _fit_linear(state, index, targets.pop(wanted[index, 0]))
        if layer.groups and 2 * index >= start:
            _fit_part(state, index, 0, layer, targets.pop(wanted[index, 0]))
        if layer.channels:
            _fit_part(state, index, 1, layer, targets.pop(wanted[index, 1]))
        tick(index + 1, len(cut.layers), "layers repaired")
    return Pruned(pruned.cut, state.new)


def _begun(whole: Stream, pruned: Pruned, targets: dict[int, torch.Tensor]) -> _Pass:
    """The pruned model before the first layer that has a target; targets lose the hidden channels that are gone."""
    new = dict(pruned.new)
    if pruned.cut.hidden is None:
        whole.set(pruned.cut)
        state = _Pass(whole, pruned.cut, targets[min(targets)], new)
        _install(state)
        return state
    for place, target in targets.items():
        targets[place] = target[..., list(pruned.cut.hidden)]
    small = Stream(apply(whole.checkpoint, pruned.cut, pruned.new), whole.chunks, whole.device)
    return _Pass(small, small.dims.whole, small.embedded, new)


def first_to_fit(pruned: Pruned, dims: Dims) -> int:
    """The first part, counted as 2 layer + (0 attention, 1 MLP), whose least squares have an error to mend: a narrower
    or changed one, or the last before one that is gone. 0 where the hidden state is narrower."""
    if pruned.cut.hidden is not None:
        return 0
    whole = dims.whole.layers[0]
    for index, layer in enumerate(pruned.cut.layers):
        prefix = f"model.layers.{index}."
        changed = any(name.startswith(prefix) for name in pruned.new)
        for part, (kept, old) in enumerate(((layer.groups, whole.groups), (layer.channels, whole.channels))):
            if changed or kept != old:
                gone = not kept and not layer.linear
                return max(0, 2 * index + part - gone)
    return 2 * dims.n_layers


def _targets(whole: Stream, places: Collection[int], tick: Tick) -> dict[int, torch.Tensor]:
    """The whole model's stream (chunks, n_ctx, d) at these places: before part p of layer i at 2 i + p, at the end at
    2 n_layers."""
    whole.set(whole.dims.whole)
    found, hidden = {}, whole.embedded
    for index in range(len(whole.layers)):
        middle, out = whole.between(index, hidden)
        found.update({2 * index: hidden, 2 * index + 1: middle, 2 * index + 2: out})
        found = {place: state for place, state in found.items() if place in places}
        hidden = out
        tick(index + 1, len(whole.layers), "layers of the whole model")
    return found


def _install(state: _Pass) -> None:
    """Put matrices that pruning changed already into the masked model."""
    for index, layer in enumerate(state.cut.layers):
        for part, name in ((0, ATTENTION), (1, MLP)):
            value = state.new.get(f"model.layers.{index}.{name}")
            if value is not None:
                _write(state, index, part, layer, value)


def _columns(state: _Pass, layer: LayerCut, part: int) -> torch.Tensor | None:
    kept = indices_of("q" if part == 0 else "f", state.stream.dims, layer, None)
    return None if kept is None else torch.from_numpy(kept)


def _write(state: _Pass, index: int, part: int, layer: LayerCut, value: torch.Tensor) -> None:
    ends = state.stream.ends[index]
    weight, columns = (ends.attention, ends.mlp)[part].weight, _columns(state, layer, part)
    if columns is None:
        weight.data.copy_(value)
    else:
        weight.data[:, columns.to(weight.device)] = value.to(weight.device)


def _fit_part(state: _Pass, index: int, part: int, layer: LayerCut, target: torch.Tensor) -> None:
    """Refit the columns that are kept of the matrix that ends a part, by what the stream behind it lacks. The state is
    behind the layer then where it has no other part."""
    x, after = state.stream.behind(index, part, state.hidden)
    columns = _columns(state, layer, part)
    x = x if columns is None else x[:, columns]
    change = _ridge_on(state.stream.device, x, (target - after).reshape(-1, target.shape[-1]))
    if change is not None:
        ends = state.stream.ends[index]
        old = (ends.attention, ends.mlp)[part].weight.detach().cpu()
        fitted = (old if columns is None else old[:, columns]) + change
        _write(state, index, part, layer, fitted)
        state.new[f"model.layers.{index}.{(ATTENTION, MLP)[part]}"] = fitted
        after += (x @ change.T).reshape(after.shape)
    if part == 1 or not layer.channels:
        state.hidden = after


@torch.no_grad()
def _fit_linear(state: _Pass, index: int, target: torch.Tensor) -> None:
    """A linear layer from nothing: it sees the hidden state through the norm of the layer that it replaces."""
    norm, width = state.stream.layers[index].input_layernorm, target.shape[-1]
    rows = state.hidden.reshape(-1, width)
    x = torch.cat([norm(part.to(state.stream.device)).cpu() for part in rows.split(4096)])
    change = _ridge_on(state.stream.device, x, target.reshape(-1, width) - rows)
    matrix = torch.zeros(width, width) if change is None else change
    state.new[f"model.layers.{index}.{LINEAR}"] = matrix
    state.hidden = (rows + x @ matrix.T).reshape(target.shape)


def _ridge_on(device: torch.device, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
    change = ridge(x.to(device), residual.to(device))
    return None if change is None else change.cpu()


def ridge(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
    """The change D (rows, columns) of a matrix with least |residual - x D^T|^2 + penalty |D|^2, None if no penalty
    helps on held-out tokens.

    x float32 (tokens, columns), residual (tokens, rows). The penalty is chosen on the last eighth of the tokens, in a
    sketch of the outputs, then the fit is made on all. By the Gram matrix of the tokens where they are fewer than the
    columns: D^T = x^T (x x^T + penalty)^-1 residual.
    """
    tokens, columns = x.shape
    split = tokens - tokens // _HELD_OUT
    sketch = _sketched(residual)
    by_tokens = tokens < columns
    gram = _gram(x.T) if by_tokens else _gram(x[:split])
    known = sketch[:split] if by_tokens else x[:split].T @ sketch[:split]
    left, unseen = (gram[:split, :split], gram[split:, :split]) if by_tokens else (gram, x[split:])

    def loss(place: int) -> float:
        found = _solve(left, known, _PENALTIES[place], columns)
        return float((sketch[split:] - unseen @ found).square().sum())

    place, least = downhill(loss, len(_PENALTIES))
    if not least < float(sketch[split:].square().sum()):
        return None
    if by_tokens:
        return _solve(gram, residual, _PENALTIES[place], columns).T @ x
    add_gram(gram, x[split:])
    return _solve(gram, x.T @ residual, _PENALTIES[place], columns).T.contiguous()


def _sketched(residual: torch.Tensor) -> torch.Tensor:
    """At most _SKETCH sums of the outputs with random signs: sums of squares stay what they are in expectation, those
    of one output alone exactly (Achlioptas 2003, theorem 1.1)."""
    rows = residual.shape[1]
    if rows <= _SKETCH:
        return residual
    signs = torch.randint(0, 2, (rows, _SKETCH), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return residual @ (signs / _SKETCH**0.5).to(residual.device)


def _gram(x: torch.Tensor) -> torch.Tensor:
    """The lower triangle of x^T x, x (n, columns)."""
    gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    add_gram(gram, x)
    return gram


def downhill(loss: Callable[[int], float], count: int) -> tuple[int, float]:
    """The place among `count` of least loss, and that loss, where losses fall and then rise: from the middle on while
    they fall, since each costs a factorization."""
    place = count // 2
    least = loss(place)
    for step in (-1, 1):
        while 0 <= place + step < count and (found := loss(place + step)) < least:
            place, least = place + step, found
        if place != count // 2:
            break
    return place, least


def _solve(gram: torch.Tensor, known: torch.Tensor, penalty: float, columns: int) -> torch.Tensor:
    """(gram + penalty)^-1 known, of gram's lower triangle; the penalty is a share of its trace over the columns."""
    damped = gram.clone()
    damped.diagonal().add_(penalty * gram.diagonal().sum() / columns + 1e-30)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        damped = damped.tril() + damped.tril(-1).T
        found = torch.linalg.lstsq(damped.double().cpu(), known.double().cpu(), driver="gelsd").solution
        return found.to(known)
    return torch.cholesky_solve(known, factor)
