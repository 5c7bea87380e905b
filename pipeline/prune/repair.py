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

from collections.abc import Callable
from dataclasses import dataclass

import torch

from device.records import SlimpiError
from pipeline.architectures import ARCHITECTURES
from pipeline.checkpoint import Checkpoint
from pipeline.progress import Tick, quiet
from pipeline.prune.cut import ATTENTION, LINEAR, MLP, Cut, Dims, LayerCut, apply, indices_of
from pipeline.prune.stream import BATCH, Stream
from pipeline.prune.widths import Pruned

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean diagonal of E[x x^T]
_HELD_OUT = 8  # every n-th token of the chunks' end


@dataclass
class _Pass:
    """The model under repair: its stream, what it keeps, and its hidden state so far (chunks, n_ctx, d)."""

    stream: Stream
    cut: Cut
    hidden: torch.Tensor
    new: dict[str, torch.Tensor]
    fitted: int = 0


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
    targets = _targets(whole, tick)
    if pruned.cut.hidden is not None:
        kept = list(pruned.cut.hidden)
        targets = [target[..., kept] for target in targets]
        small = Stream(apply(whole.checkpoint, pruned.cut, pruned.new), whole.chunks, whole.device)
        state = _Pass(small, small.dims.whole, small.embedded, dict(pruned.new))
    else:
        whole.set(pruned.cut)
        state = _Pass(whole, pruned.cut, whole.embedded, dict(pruned.new))
        _install(state)
    kept_parts = [(layer.groups or layer.linear, layer.channels) for layer in state.cut.layers]
    parts = [(index, part) for index, both in enumerate(kept_parts) for part in (0, 1) if both[part]]
    ends = [2 * index + part for index, part in parts[1:]] + [2 * len(whole.layers)]
    wanted = dict(zip(parts, ends, strict=True))
    start = first_to_fit(pruned, whole.dims)
    for index, layer in enumerate(state.cut.layers):
        if 2 * index + 1 < start:
            state.hidden = targets[2 * index + 2]
            continue
        if layer.linear:
            _fit_linear(state, index, targets[wanted[index, 0]])
        if layer.groups and 2 * index >= start:
            _fit_attention(state, index, layer, targets[wanted[index, 0]])
        if layer.channels:
            _fit_mlp(state, index, layer, targets[wanted[index, 1]])
        elif layer.groups:
            state.hidden = state.stream.layer(index, state.hidden)
        tick(index + 1, len(state.cut.layers), "layers repaired")
    return Pruned(pruned.cut, state.new)


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


@torch.no_grad()
def _targets(whole: Stream, tick: Tick) -> list[torch.Tensor]:
    """The whole model's stream before every part, and at the end: 2 n_layers + 1 tensors (chunks, n_ctx, d)."""
    whole.set(whole.dims.whole)
    found, hidden = [], whole.embedded
    for index in range(len(whole.layers)):
        inputs, outs = _last_inputs(whole, index, 1, hidden)
        module = whole.ends[index].mlp
        added = [_applied(module, x) for x in inputs]
        out = torch.cat(outs)
        found += [hidden, out - torch.cat(added).reshape(out.shape)]
        hidden = out
        tick(index + 1, len(whole.layers), "layers of the whole model")
    return [*found, hidden]


def _applied(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The matrix times its input, without the gates."""
    bias = module.bias.cpu() if module.bias is not None else None
    return torch.nn.functional.linear(x, module.weight.cpu(), bias)  # type: ignore[arg-type]


@torch.no_grad()
def _last_inputs(
    stream: Stream, index: int, part: int, hidden: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs (tokens, columns) of the matrix that ends a part, and the layer's outputs, batch by batch."""
    inputs: list[torch.Tensor] = []
    gate = stream.gates[index][part]
    gate.seen = lambda x: inputs.append(x.detach().reshape(-1, x.shape[-1]).cpu())
    outs = [stream.run(index, part_.to(stream.device)).cpu() for part_ in hidden.split(BATCH)]
    gate.seen = None
    return inputs, outs


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


def _fit_attention(state: _Pass, index: int, layer: LayerCut, target: torch.Tensor) -> None:
    inputs, _ = _last_inputs(state.stream, index, 0, state.hidden)
    module = state.stream.ends[index].attention
    wanted = (target - state.hidden).reshape(-1, target.shape[-1])
    if module.bias is not None:
        wanted = wanted - module.bias.detach().cpu()
    _fit(state, index, 0, layer, torch.cat(inputs), wanted)


def _fit_mlp(state: _Pass, index: int, layer: LayerCut, target: torch.Tensor) -> None:
    inputs, outs = _last_inputs(state.stream, index, 1, state.hidden)
    x, out = torch.cat(inputs), torch.cat(outs)
    module = state.stream.ends[index].mlp
    before = module.weight.detach().cpu().clone()
    stream_before = out.reshape(-1, out.shape[-1]) - x @ before.T
    _fit(state, index, 1, layer, x, target.reshape(-1, target.shape[-1]) - stream_before)
    state.hidden = (stream_before + x @ module.weight.detach().cpu().T).reshape(out.shape)


@torch.no_grad()
def _fit_linear(state: _Pass, index: int, target: torch.Tensor) -> None:
    """A linear layer from nothing: it sees the hidden state through the norm of the layer that it replaces."""
    norm, width = state.stream.layers[index].input_layernorm, target.shape[-1]
    rows = state.hidden.reshape(-1, width)
    x = torch.cat([norm(part.to(state.stream.device)).cpu() for part in rows.split(4096)])
    old = torch.zeros(width, width)
    fitted = ridge(x, target.reshape(-1, width) - rows, old)
    matrix = old if fitted is None else fitted
    state.new[f"model.layers.{index}.{LINEAR}"] = matrix
    state.hidden = (rows + x @ matrix.T).reshape(target.shape)


def _fit(state: _Pass, index: int, part: int, layer: LayerCut, x: torch.Tensor, wanted: torch.Tensor) -> None:
    """Refit the columns that are kept; x (tokens, all columns), wanted (tokens, d)."""
    columns = _columns(state, layer, part)
    ends = state.stream.ends[index]
    old = (ends.attention, ends.mlp)[part].weight.detach().cpu()
    if columns is not None:
        x, old = x[:, columns], old[:, columns]
    fitted = ridge(x, wanted, old)
    if fitted is None:
        return
    _write(state, index, part, layer, fitted)
    state.new[f"model.layers.{index}.{(ATTENTION, MLP)[part]}"] = fitted
    state.fitted += 1


def ridge(x: torch.Tensor, wanted: torch.Tensor, old: torch.Tensor) -> torch.Tensor | None:
    """W (rows, columns) with least |wanted - x W^T|^2 + penalty |W - old|^2, None if no penalty helps on held-out rows.

    x float32 (tokens, columns), wanted (tokens, rows). The penalty is chosen on the last eighth of the tokens, then the
    fit is made on all.
    """
    split = len(x) - len(x) // _HELD_OUT
    residual = wanted - x @ old.T
    xx, xr = x[:split].T @ x[:split], x[:split].T @ residual[:split]

    def loss(place: int) -> float:
        return float((residual[split:] - x[split:] @ _solve(xx, xr, _PENALTIES[place])).square().sum())

    place, least = downhill(loss, len(_PENALTIES))
    if not least < float(residual[split:].square().sum()):
        return None
    best = _PENALTIES[place]
    xx.addmm_(x[split:].T, x[split:])
    xr.addmm_(x[split:].T, residual[split:])
    return (old + _solve(xx, xr, best).T).contiguous()


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


def _solve(xx: torch.Tensor, xr: torch.Tensor, penalty: float) -> torch.Tensor:
    damped = xx.clone()
    damped.diagonal().add_(penalty * xx.diagonal().mean() + 1e-30)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.linalg.lstsq(damped.double(), xr.double(), driver="gelsd").solution.float()
    return torch.cholesky_solve(xr, factor)
