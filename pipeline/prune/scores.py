"""SCORES: how much each key-value group and each MLP channel matters, by what others prune widths by.

A score has a value for every unit of a layer, larger = keep: (groups,), (channels,). Those of groups are sums over the
columns of o_proj that a group feeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pipeline.progress import Tick, quiet
from pipeline.prune.moments import Moments
from pipeline.prune.stream import Stream

Scores = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer (of groups, of channels)."""

Column = Callable[[torch.Tensor, Moments], torch.Tensor]
"""(matrix (rows, columns), its input's moments) -> (columns,)"""


@dataclass(frozen=True)
class Evidence:
    """What scores are made from: the whole model in a stream, and the moments of its parts' last inputs. scratch: where
    large results may be put aside."""

    stream: Stream
    moments: list[tuple[Moments, Moments]]
    scratch: Path | None = None


def magnitude(matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
    """|W_:j|^2, data-free."""
    return matrix.square().sum(0)


def activation(matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
    """E|x_j| (Minitron, Muralidharan et al. 2024, section 2.2)."""
    return moments.mean_abs


def wanda(matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
    """|W_:j|^2 E[x_j^2]: the squared form, summed over rows, of |W_ij| |X_j| (Sun et al. 2023, eq. 1; Wanda-sp)."""
    return matrix.square().sum(0) * moments.mean_x2


def flap(matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
    """|W_:j|^2 Var[x_j]: what is lost once the mean is made good by a bias (An et al. 2023, FLAP, eq. 5)."""
    return matrix.square().sum(0) * (moments.mean_x2 - moments.mean.square()).clamp_min(0)


def by_column(score: Column, evidence: Evidence, tick: Tick = quiet) -> Scores:
    """[(KV groups' (groups,), channels' (channels,))] by layer: a column score of the parts' last matrices, for groups
    summed over their columns."""
    dims = evidence.stream.dims
    found = []
    for ends, (attention, mlp) in zip(evidence.stream.ends, evidence.moments, strict=True):
        columns = score(ends.attention.weight.detach().cpu().float(), attention)
        found.append((columns.reshape(dims.groups, -1).sum(1), score(ends.mlp.weight.detach().cpu().float(), mlp)))
    return found


def taylor(order: int, evidence: Evidence, tick: Tick = quiet) -> Scores:
    """What the loss of next tokens changes by, to first order |sum of w g|, or to second with the Fisher diagonal
    |sum of w g - w^2 g^2 / 2|, over all weights coupled with a unit (LLM-Pruner, Ma et al. 2023, eq. 3 to 5)."""
    stream, dims = evidence.stream, evidence.stream.dims
    stream.set(dims.whole)
    sums = [(torch.zeros(dims.groups), torch.zeros(dims.channels)) for _ in stream.layers]
    for done, chunk in enumerate(stream.chunks, 1):
        _add_gradients(stream, chunk, order, sums)
        tick(done, len(stream.chunks), "chunks")
    return [(attention.abs(), mlp.abs()) for attention, mlp in sums]


def _add_gradients(stream: Stream, chunk: torch.Tensor, order: int, sums: Scores) -> None:
    weights = [p for layer in stream.layers for p in _coupled(layer)]
    for weight in weights:
        weight.requires_grad_(True)
    tokens = chunk[None].to(stream.device)
    logits = stream.model(tokens, use_cache=False).logits[0, :-1].float()
    torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
    for layer, (groups, channels) in zip(stream.layers, sums, strict=True):
        q, k, v, o, gate, up, down = (_change(weight, order) for weight in _coupled(layer))
        n_groups = len(groups)
        groups += sum(part.reshape(n_groups, -1).sum(1) for part in (q, k, v, o.T.contiguous()))
        channels += gate.sum(1) + up.sum(1) + down.sum(0)
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None


def _coupled(layer: torch.nn.Module) -> tuple[torch.nn.Parameter, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)  # type: ignore[union-attr]
    return tuple(m.weight for m in (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj))  # type: ignore[union-attr,misc]


def _change(weight: torch.nn.Parameter, order: int) -> torch.Tensor:
    assert weight.grad is not None
    first = (weight * weight.grad).detach().cpu()
    return first if order == 1 else first - first.square() / 2


SCORES: dict[str, Callable[..., Scores]] = {
    "magnitude": partial(by_column, magnitude),
    "activation": partial(by_column, activation),
    "wanda": partial(by_column, wanda),
    "flap": partial(by_column, flap),
    "taylor": partial(taylor, 1),
    "taylor2": partial(taylor, 2),
}
