"""From tables and a budget to a plan: what a size in bits, bytes or memory leaves for each tensor, and the best use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from device.records import SlimpiError
from pipeline import plan, plan_milp
from pipeline.plan import Base, Plan
from pipeline.plan_milp import Choice, Table


@dataclass(frozen=True)
class Budget:
    """Exactly one of linear_bits (per weight, over the linear layers) and file_bytes (the whole file), and
    nanoseconds for the products of a decoded token. What fits in memory is a file's size: `plan.memory_limit`."""

    linear_bits: float | None = None
    file_bytes: int | None = None
    latency_ns: float = math.inf

    def __post_init__(self) -> None:
        if (self.linear_bits is None) == (self.file_bytes is None):
            raise SlimpiError(f"{self} is no budget: give either bits per linear weight or bytes of the file.")


def best_plan(
    base: Base,
    fixed: Plan,
    errors: Table,
    budget: Budget,
    *,
    latency: Table | None = None,
    shared: Sequence[Iterable[str]] = (),
    relative_gap: float = 1e-6,
) -> tuple[Plan, Choice]:
    """The plan of least total error within the budget; tensors without errors stay as in `fixed`.

    budget.latency_ns is for the tensors with errors; a budget in bits wants the errors of all linear layers and of
    nothing else. SlimpiError as `plan_milp.solve`, and for errors of tensors or formats that the base cannot have.
    """
    if budget.linear_bits is not None:
        _check_linear(base, errors)
        sizes = plan.sizes(base, errors, padded=False)
        limit = plan.bits_budget(base, budget.linear_bits)
    else:
        assert budget.file_bytes is not None
        sizes = plan.sizes(base, errors)
        limit = plan.file_budget(base, fixed, errors, budget.file_bytes)
    choice = plan_milp.solve(
        errors, sizes, limit, latency=latency, budget_ns=budget.latency_ns, shared=shared, relative_gap=relative_gap
    )
    kept = tuple(fallback for fallback in fixed.fallbacks if fallback.tensor not in errors)
    return Plan({**fixed.formats, **choice.formats}, kept), choice


def _check_linear(base: Base, errors: Table) -> None:
    unlike = errors.keys() ^ set(base.linear)
    if unlike:
        raise SlimpiError(
            f"bits per linear weight are over all linear layers and nothing else, but {min(unlike)} is on one side "
            "only. Take errors of exactly those, or a budget in bytes of the file."
        )
