"""Equivalent transformations: scaling the inputs of linear layers, and undoing it in what produces those inputs.

y = W x = (W diag(s)) (diag(1/s) x): the second factor is folded into the producer of x, a norm's gain or the rows of
a linear layer, so that the file runs as any other (Lin et al. 2023, AWQ, section 3.2; Shao et al. 2023, OmniQuant,
eq. 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from device.records import SlimpiError
from pipeline.layers import Fold, Layer, Stats


def bias_of(name: str) -> str:
    """Name of the vector that is added to what `name` produces."""
    return name.removesuffix(".weight") + ".bias"


def n_scales(layer: Layer, fold: Fold) -> int:
    """How many different scales the fold takes: the producer's outputs. SlimpiError if the shapes do not fit it."""
    producer = layer.matrices[fold.producer] if fold.producer in layer.matrices else layer.vectors[fold.producer]
    n_rows = producer.shape[0]
    for name in fold.consumers:
        columns = layer.matrices[name].shape[1]
        if columns != n_rows and (columns % n_rows or n_rows % fold.head_size):
            raise SlimpiError(
                f"blk.{layer.index}.{fold.producer} makes {n_rows} values in heads of {fold.head_size}, which do not "
                f"feed the {columns} columns of {name}. Check the model's config."
            )
    return n_rows


def per_column(scales: torch.Tensor, columns: int, head_size: int) -> torch.Tensor:
    """The scales (n,) of a fold as its consumers' columns (columns,) see them: repeated for heads that share one."""
    heads = scales.reshape(-1, head_size if len(scales) != columns else 1)
    return heads.repeat_interleave(columns // len(scales), 0).reshape(-1)


def per_producer(columns: torch.Tensor, n: int, head_size: int) -> torch.Tensor:
    """Values of the consumers' columns (columns,) averaged over the columns that share one of the fold's n scales."""
    size = head_size if n != len(columns) else 1
    return columns.reshape(n // size, -1, size).mean(1).reshape(-1)


def fold_in(layer: Layer, fold: Fold, scales: torch.Tensor) -> Layer:
    """The layer with its consumers' columns multiplied by `scales` (n_scales,) and its producer divided by them."""
    matrices, vectors = dict(layer.matrices), dict(layer.vectors)
    if fold.producer in matrices:
        matrices[fold.producer] = matrices[fold.producer] / scales[:, None]
    else:
        vectors[fold.producer] = vectors[fold.producer] / scales
    if (bias := bias_of(fold.producer)) in vectors:
        vectors[bias] = vectors[bias] / scales
    for name in fold.consumers:
        w = matrices[name]
        matrices[name] = w * per_column(scales, w.shape[1], fold.head_size)
    return replace(layer, matrices=matrices, vectors=vectors)


def scaled_stats(stats: Stats, by_column: torch.Tensor) -> Stats:
    """The statistics of x / by_column, from those of x."""
    return Stats(
        stats.mean_x2 / by_column**2,
        stats.mean_abs_x / by_column,
        stats.n_tokens,
        lambda: stats.hessian() / (by_column[:, None] * by_column),
    )


def changed_vectors(before: Layer, after: Layer) -> dict[str, torch.Tensor]:
    """The vectors that folding replaced."""
    return {name: v for name, v in after.vectors.items() if v is not before.vectors[name]}


def possible(layer: Layer, planned: Mapping[str, object]) -> tuple[list[Fold], list[str]]:
    """(folds that can be applied, why the others cannot). Only planned matrices may change: the rest of the layer is
    written as it was."""
    found, notes = [], []
    for fold in layer.folds:
        n_scales(layer, fold)
        fixed = [name for name in (fold.producer, *fold.consumers) if name in layer.matrices and name not in planned]
        if fixed:
            notes.append(f"blk.{layer.index}.{fold.producer}: not scaled, {', '.join(fixed)} keeps its float weights")
        else:
            found.append(fold)
    return found, notes
