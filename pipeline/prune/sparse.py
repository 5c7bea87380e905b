"""Unstructured and 2:4 sparsity: zeros where they cost least, in matrices of the old size.

Baselines of quality only. Neither llama.cpp nor onnxruntime skips zeros, and a Cortex-A72 has no instruction for 2:4:
files, memory and speed are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.progress import Tick, quiet
from pipeline.prune.moments import Sums
from pipeline.prune.stream import BATCH, Stream
from pipeline.prune.widths import Pruned

_BLOCK = 128
_DAMPING = 0.01


@dataclass(frozen=True)
class Pattern:
    """Which weights may stay: a share of each row (kept_of 0), or `kept` of every `kept_of` neighbours."""

    share: float
    kept: int = 0
    kept_of: int = 0


Sparsify = Callable[[torch.Tensor, torch.Tensor, Pattern], torch.Tensor]
"""(matrix, E[x x^T] of its input, pattern) -> the sparse matrix."""


def mask_of(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """True where a weight goes: in every row the lowest scores, or in every group of neighbours."""
    if pattern.kept_of:
        rows, columns = scores.shape
        groups = scores[:, : columns - columns % pattern.kept_of].reshape(rows, -1, pattern.kept_of)
        lowest = groups.argsort(dim=-1)[..., : pattern.kept_of - pattern.kept]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).reshape(rows, -1)
        return torch.nn.functional.pad(mask, (0, columns % pattern.kept_of))
    count = round(pattern.share * scores.shape[1])
    lowest = scores.argsort(dim=1)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def magnitude(matrix: torch.Tensor, hessian: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Smallest |w| of each row."""
    return matrix.masked_fill(mask_of(matrix.abs(), pattern), 0)


def wanda(matrix: torch.Tensor, hessian: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Smallest |w| sqrt(E x^2) of each row (Sun et al. 2023, eq. 1)."""
    return matrix.masked_fill(mask_of(matrix.abs() * hessian.diagonal().sqrt(), pattern), 0)


def sparsegpt(matrix: torch.Tensor, hessian: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Column by column, what is removed made good by later columns; masks chosen block by block by w^2 / [H^-1]_jj^2
    (Frantar & Alistarh 2023, algorithm 1)."""
    w = matrix.clone()
    h = hessian.double().clone()
    h.diagonal().add_(_DAMPING * h.diagonal().mean() + 1e-30)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).to(w.dtype)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        block, errors = w[:, start:stop], torch.zeros(len(w), stop - start, dtype=w.dtype)
        diagonal = factor.diagonal()[start:stop]
        mask = mask_of(block.square() / diagonal.square(), pattern)
        for i in range(stop - start):
            error = block[:, i] * mask[:, i] / diagonal[i]
            block[:, i:] -= error[:, None] * factor[start + i, start + i : stop]
            errors[:, i] = error
        block.masked_fill_(mask, 0)
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w


def sparse(sparsify: Sparsify, kept_of: int, stream: Stream, share: float, tick: Tick = quiet) -> Pruned:
    """Every matrix of the blocks, layer by layer on inputs of the layers that are sparse already. With `kept_of` 4 two
    stay of four, whatever the share."""
    pattern = Pattern(share, kept_of // 2, kept_of)
    stream.set(stream.dims.whole)
    hidden, new = stream.embedded, {}
    for index, layer in enumerate(stream.layers):
        modules = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        sums = {name: Sums() for name in modules}
        hooks = [m.register_forward_pre_hook(_Add(sums[name])) for name, m in modules.items()]
        _run(stream, index, hidden)
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            made = sparsify(module.weight.detach().cpu(), sums[name].moments().hessian, pattern)
            new[f"model.layers.{index}.{name}.weight"] = made
            module.weight.data.copy_(made)
        hidden = _run(stream, index, hidden)
        tick(index + 1, len(stream.layers), "layers")
    return Pruned(stream.dims.whole, new)


class _Add:
    def __init__(self, sums: Sums) -> None:
        self.sums = sums

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.sums.add(args[0].detach())


@torch.no_grad()
def _run(stream: Stream, index: int, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([stream.run(index, part.to(stream.device)).cpu() for part in hidden.split(BATCH)])
