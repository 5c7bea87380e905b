"""Scales that minimise sum importance * (w - w^)^2, found by search, group by group."""

from __future__ import annotations

import torch

from pipeline.formats import Format, QTensor, Scales
from pipeline.layers import Stats
from pipeline.methods.rtn import codes_of, nearest, store, to_grid


def quantize(w: torch.Tensor, stats: Stats | None, kind: Format) -> tuple[QTensor, list[str]]:
    """w float32 (rows, columns); the importance of a column is its mean x^2, 1 without stats."""
    importance = torch.ones(1, device=w.device) if stats is None else stats.mean_x2
    return choose(w, importance, kind), []


def choose(w: torch.Tensor, importance: torch.Tensor, kind: Format) -> QTensor:
    """Scales from `fit`, codes from `nearest`."""
    scales = fit(w, importance, kind)
    return QTensor(kind, nearest(w, scales, kind), scales)


def fit(w: torch.Tensor, importance: torch.Tensor, kind: Format) -> Scales:
    """w float32 (rows, columns), importance broadcastable to it."""
    codes = codes_of(w, kind)
    x = w.reshape(w.shape[0], -1, codes.group_size)
    weight = importance.expand(w.shape).reshape(x.shape).clamp(min=1e-30)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    if codes.has_offset and not codes.any_offset:
        low, high = low.clamp(max=0), high.clamp(min=0)
    grid = torch.tensor(codes.grid, dtype=torch.float32, device=w.device)
    first = (high - low) / (grid[-1] - grid[0]) if codes.has_offset else torch.maximum(-low, high) / -grid[0]
    best = torch.full_like(first, torch.inf)
    best_scale, best_offset = torch.zeros_like(first), torch.zeros_like(first)
    for factor in torch.linspace(0.6, 1.2, 13).tolist():
        for sign in (1.0,) if codes.has_offset else (1.0, -1.0):
            scale = first * factor * sign
            offset = low * factor if codes.has_offset else torch.zeros_like(low)
            for _ in range(3):
                q = grid[to_grid((x - offset) * torch.where(scale == 0, 0, 1 / scale), codes).long()]
                if codes.has_offset:
                    total, mean_q = weight.sum(2, keepdim=True), (weight * q).sum(2, keepdim=True)
                    mean_x = (weight * x).sum(2, keepdim=True) / total
                    mean_q = mean_q / total
                    above = (weight * (q - mean_q) * (x - mean_x)).sum(2, keepdim=True)
                    below = (weight * (q - mean_q).square()).sum(2, keepdim=True)
                    scale = torch.where(below > 0, above / below, scale)
                    offset = mean_x - scale * mean_q
                    if not codes.any_offset:
                        offset = offset.clamp(max=0)
                else:
                    below = (weight * q * q).sum(2, keepdim=True)
                    scale = torch.where(below > 0, (weight * q * x).sum(2, keepdim=True) / below, scale)
                error = (weight * (x - offset - scale * q).square()).sum(2, keepdim=True)
                better = error < best
                best = torch.where(better, error, best)
                best_scale = torch.where(better, scale, best_scale)
                best_offset = torch.where(better, offset, best_offset)
    return store(best_scale.squeeze(2), best_offset.squeeze(2) if codes.has_offset else None, kind)
