"""HQQ: offsets (or scales) that minimise the L_p norm of the weights' error, p < 1, by half-quadratic splitting.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": min over z, e of
|e|_p^p + beta/2 |W - W^(z) - e|_2^2, alternating the generalized soft threshold of e (their eq. 4) with the closed form
of z (eq. 5), beta growing. No data. Differences: errors are measured in steps of their group, so that the result does
not depend on the weights' unit (in that of language models' weights the published beta never lets any error through,
and z is a plain mean); formats without an offset, or with whole zero points, have their scale solved instead,
by least squares; and of the iterates, the starting point included, each group keeps the best, and rounding's where
storing it loses more.
"""

from __future__ import annotations

import torch

from pipeline.formats import Codes, Format, QTensor
from pipeline.layers import Stats
from pipeline.methods.blend import per_cell, stacked, where
from pipeline.methods.rtn import codes_of, extremes, inverse, nearest, store, to_grid

NORM = 0.7
BETA = 10.0
GROWTH = 1.01
ITERATIONS = 20
_CHUNK = 1 << 21  # weights at a time: bounds the memory of the temporaries


def quantize(w: torch.Tensor, stats: Stats | None, kind: Format) -> tuple[QTensor, list[str]]:
    """w float32 (rows, columns); stats are not looked at."""
    pool = codes_of(w, kind).pool
    rows = max(1, _CHUNK // w.shape[1] // pool) * pool
    return stacked([_quantize(part, kind) for part in w.split(rows)]), []


def _quantize(w: torch.Tensor, kind: Format) -> QTensor:
    codes = codes_of(w, kind)
    start = extremes(w, kind)
    plain = QTensor(kind, nearest(w, start, kind), start)
    scale, offset = solve(w.reshape(w.shape[0], -1, codes.group_size), start.values(), start.offsets(), codes)
    scales = store(scale, offset, kind)
    solved = QTensor(kind, nearest(w, scales, kind), scales)
    return where(cell_error(w, solved) < cell_error(w, plain), solved, plain)


def solve(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, codes: Codes
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale, offset) of groups after the iterations, floats (rows, groups); x (rows, groups, group size).

    Each group keeps the iterate with the smallest sum |error|^p.
    """
    grid = torch.tensor(codes.grid, dtype=x.dtype, device=x.device)
    s = scale[:, :, None]
    z = torch.zeros_like(s) if offset is None else offset[:, :, None]
    best, best_s, best_z = torch.full_like(s, torch.inf), s, z
    beta = BETA
    for _ in range(ITERATIONS + 1):
        q = grid[to_grid((x - z) * inverse(s), codes).long()]
        residual = x - z - s * q
        error = residual.abs().pow(NORM).sum(2, keepdim=True)
        better = error < best
        best, best_s, best_z = (torch.where(better, a, b) for a, b in ((error, best), (s, best_s), (z, best_z)))
        target = x - shrink(residual, s.abs(), beta)
        if offset is None or codes.zero_point:
            steps = q + z * inverse(s)
            below = (steps * steps).sum(2, keepdim=True)
            scaled = torch.where(below > 0, (steps * target).sum(2, keepdim=True) / below, s)
            s, z = scaled, z * inverse(s) * scaled
        else:
            z = (target - s * q).mean(2, keepdim=True)
            z = z if codes.any_offset else z.clamp(max=0)
        beta *= GROWTH
    return best_s.squeeze(2), None if offset is None else best_z.squeeze(2)


def shrink(e: torch.Tensor, step: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalized soft threshold of errors e, counted in `step`: sign(e) max(0, |e| - |e|^(p-1) / beta)."""
    size = e.abs() * inverse(step)
    return e.sign() * step * (size - size.pow(NORM - 1) / beta).clamp(min=0)


def cell_error(w: torch.Tensor, q: QTensor) -> torch.Tensor:
    """sum |w - w^|^p over what has one float scale: shape of q.scales.d."""
    return per_cell((w - q.dequantize()).abs().pow(NORM), q.scales)
