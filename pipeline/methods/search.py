"""Scales that minimise sum importance * (w - w^)^2 over codes and scales, by search.

What llama.cpp's quantizers with an importance matrix do (ggml-quants.c: make_qx_quants, make_qkx3_quants), with wider
sweeps, a local search after them, both ends of the range free, signed scales wherever the format has them, and the
scales of a super-block chosen together. The error here is the plain weighted one; ggml's weights also grow with |w|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from pipeline.formats import Format, QTensor, Quantized, Scales
from pipeline.layers import Stats
from pipeline.methods import llama_codes
from pipeline.methods.rtn import codes_of, extremes, nearest
from pipeline.methods.search_blocks import store_fit
from pipeline.methods.search_groups import Groups, fit_groups

# Weights looked at at once: on CPU what stays in cache, on GPU what fills it.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}


def quantize(w: torch.Tensor, stats: Stats | None, kind: Format) -> tuple[Quantized, list[str]]:
    """w float32 (rows, columns); the importance of a column is its mean x^2, 1 without stats. Types whose codes are
    llama.cpp's own are searched by it."""
    importance = torch.ones(1, device=w.device) if stats is None else stats.mean_x2
    if kind.codes is None:
        return llama_codes.choose(w, importance, kind), []
    return choose(w, importance, kind), []


def choose(w: torch.Tensor, importance: torch.Tensor, kind: Format) -> QTensor:
    """Scales from `fit`, codes from `nearest`."""
    scales = fit(w, importance, kind)
    return QTensor(kind, nearest(w, scales, kind), scales)


def fit(w: torch.Tensor, importance: torch.Tensor, kind: Format) -> Scales:
    """Scales of w, float32 (rows, columns); importance, not negative, is broadcastable to it.

    No block (no pool of groups, where the format has pools) has a greater error than under `extremes`.
    """
    codes = codes_of(w, kind)
    importance = importance.to(w.device).expand(w.shape)
    per_chunk = max(1, _CHUNK.get(w.device.type, _CHUNK["cuda"]) // (w.shape[1] * codes.pool)) * codes.pool
    chunks = [
        _fit_rows(w[start : start + per_chunk], importance[start : start + per_chunk], kind)
        for start in range(0, w.shape[0], per_chunk)
    ]
    return _each_field(lambda *parts: torch.cat(parts), *chunks)


def _fit_rows(w: torch.Tensor, importance: torch.Tensor, kind: Format) -> Scales:
    assert kind.codes is not None
    groups = Groups(w, importance, kind.codes)
    found = store_fit(groups, fit_groups(groups), kind, w.shape[0])
    plain = extremes(w, kind)
    keep = _block_errors(groups, found) <= _block_errors(groups, plain)

    def better(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        mask = keep
        if ours.shape != keep.shape:
            mask = keep.repeat_interleave(ours.shape[1] // keep.shape[1], 1)
            mask = mask.repeat_interleave(found.pool, 0)[: len(ours)]
        return torch.where(mask, ours, theirs)

    return _each_field(better, found, plain)


def _block_errors(groups: Groups, scales: Scales) -> torch.Tensor:
    """Weighted square errors of the shape of scales.d."""
    rows, n_groups = scales.scale_codes.shape
    offsets = scales.offsets()
    errors = groups.errors(scales.values().flatten(), None if offsets is None else offsets.flatten())
    errors = errors.view(rows, scales.d.shape[1], -1).sum(2)
    if scales.pool == 1:
        return errors
    errors = torch.cat([errors, errors.new_zeros(-rows % scales.pool, n_groups)])
    return errors.view(-1, scales.pool, n_groups).sum(1)


def _each_field(combine: Callable[..., torch.Tensor], *parts: Scales) -> Scales:
    """Scales of which every tensor is made of those of parts."""
    values: dict[str, Any] = {}
    for field in fields(Scales):
        of_parts = [getattr(part, field.name) for part in parts]
        values[field.name] = combine(*of_parts) if isinstance(of_parts[0], torch.Tensor) else of_parts[0]
    return Scales(**values)
