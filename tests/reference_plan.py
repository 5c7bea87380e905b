"""Naive twins of planning: every choice enumerated, a greedy choice, and Lagrange's bound by trying multipliers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

Tables = dict[str, dict[str, float]]


def total(table: Tables, chosen: dict[str, str]) -> float:
    return math.fsum(table[tensor][kind] for tensor, kind in chosen.items())


def every_choice(errors: Tables) -> Iterator[dict[str, str]]:
    tensors = list(errors)
    for kinds in itertools.product(*(list(errors[tensor]) for tensor in tensors)):
        yield dict(zip(tensors, kinds, strict=True))


def best_error(
    errors: Tables, sizes: Tables, budget: float, latency: Tables | None, budget_ns: float, shared: list[list[str]]
) -> float | None:
    """Least total error of all choices that keep the budgets and give a shared group one format; None = none does."""
    best = None
    for chosen in every_choice(errors):
        if any(len({chosen[tensor] for tensor in group}) > 1 for group in shared):
            continue
        if total(sizes, chosen) > budget or (latency is not None and total(latency, chosen) > budget_ns):
            continue
        error = total(errors, chosen)
        best = error if best is None else min(best, error)
    return best


def greedy(errors: Tables, sizes: Tables, budget: float) -> dict[str, str]:
    """From the smallest formats, buy the most error per byte while it fits."""
    chosen = {t: min(row, key=lambda kind: (sizes[t][kind], errors[t][kind])) for t, row in errors.items()}
    used = total(sizes, chosen)
    while True:
        best: Any = None
        for tensor, row in errors.items():
            for kind in row:
                more = sizes[tensor][kind] - sizes[tensor][chosen[tensor]]
                gain = errors[tensor][chosen[tensor]] - row[kind]
                if gain > 0 and used + more <= budget and (best is None or gain / max(more, 1e-9) > best[0]):
                    best = (gain / max(more, 1e-9), tensor, kind)
        if best is None:
            return chosen
        used += sizes[best[1]][best[2]] - sizes[best[1]][chosen[best[1]]]
        chosen[best[1]] = best[2]


def lagrange_bound(errors: Tables, sizes: Tables, budget: float) -> float:
    """max over price of min over choices of error + price * (bytes - budget): below every choice within the budget."""
    bounds = []
    for step in range(-60, 61):
        price = 2.0 ** (step / 2)
        relaxed = math.fsum(min(row[kind] + price * sizes[t][kind] for kind in row) for t, row in errors.items())
        bounds.append(relaxed - price * budget)
    return max(bounds)


def file_size(metadata: int, tensors: list[tuple[tuple[int, ...], int, int]]) -> int:
    """(shape, block, bytes a block) of each tensor: laid out one after the other at multiples of 32."""
    at = metadata
    for shape, block, block_bytes in tensors:
        rows = 1
        for n in shape[:-1]:
            rows *= n
        at += rows * (shape[-1] // block) * block_bytes
        while at % 32:
            at += 1
    return at
