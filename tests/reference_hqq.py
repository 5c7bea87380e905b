"""HQQ's iterations on one group, weight by weight in float64 (Badri & Shaji 2023)."""

from __future__ import annotations

from collections.abc import Sequence


def nearest_value(x: float, grid: Sequence[int]) -> int:
    return min(grid, key=lambda value: (abs(x - value), value))


def soft(e: float, beta: float, p: float) -> float:
    """argmin over v of |v|^p + beta/2 (v - e)^2, by the paper's approximation."""
    if e == 0:
        return 0.0
    size = max(0.0, abs(e) - abs(e) ** (p - 1) / beta)
    return size if e > 0 else -size


def group(
    x: Sequence[float],
    scale: float,
    offset: float | None,
    grid: Sequence[int],
    offset_at_most: float,
    scale_moves: bool,
    p: float,
    beta: float,
    growth: float,
    iterations: int,
) -> tuple[float, float | None]:
    """(scale, offset) with the smallest sum |x - scale q - offset|^p over the start and `iterations` updates."""
    best: tuple[float, float, float] | None = None
    s, z = scale, 0.0 if offset is None else offset
    for _ in range(iterations + 1):
        q = [nearest_value((v - z) / s, grid) for v in x]
        errors = [v - z - s * k for v, k in zip(x, q, strict=True)]
        total = sum(abs(e) ** p for e in errors)
        if best is None or total < best[0]:
            best = (total, s, z)
        kept = [abs(s) * soft(e / abs(s), beta, p) for e in errors]
        if not scale_moves:
            z = min(offset_at_most, sum(v - e - s * k for v, e, k in zip(x, kept, q, strict=True)) / len(x))
        elif any(k + z / s for k in q):
            zero = z / s
            s = sum((k + zero) * (v - e) for v, e, k in zip(x, kept, q, strict=True)) / sum((k + zero) ** 2 for k in q)
            z = zero * s
        beta *= growth
    assert best is not None
    return best[1], None if offset is None else best[2]
