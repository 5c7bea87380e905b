"""Quantizations of one matrix put together: cells that share nothing can each come from another.

A cell is what has one float scale d: a block of a row, or a group of all rows of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from pipeline.formats import QTensor, Scales


def per_cell(values: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Sums over each cell, shape of scales.d, of values (rows, columns)."""
    blocks = values.reshape(values.shape[0], scales.d.shape[1], -1).sum(2)
    short = -values.shape[0] % scales.pool
    return torch.nn.functional.pad(blocks, (0, 0, 0, short)).reshape(-1, scales.pool, blocks.shape[1]).sum(1)


def where(first: torch.Tensor, a: QTensor, b: QTensor) -> QTensor:
    """Cells of `a` where `first`, bool of the shape of scales.d or broadcastable to it, else those of `b`."""
    by_cell = first.expand(a.scales.d.shape)
    rows = a.codes.shape[0]

    def pick(x: Any, y: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        mask = by_cell.repeat_interleave(x.shape[1] // by_cell.shape[1], 1)
        return torch.where(mask.repeat_interleave(a.scales.pool, 0)[:rows] if len(x) == rows else mask, x, y)

    return _combined(pick, a, b)


def stacked(parts: list[QTensor]) -> QTensor:
    """Rows of the parts, one after the other; all but the last have whole pools."""
    return _combined(lambda *x: torch.cat(x) if isinstance(x[0], torch.Tensor) else x[0], *parts)


def _combined(combine: Callable[..., Any], *parts: QTensor) -> QTensor:
    scales = {f.name: combine(*(getattr(part.scales, f.name) for part in parts)) for f in fields(Scales)}
    return QTensor(parts[0].format, combine(*(part.codes for part in parts)), Scales(**scales))
