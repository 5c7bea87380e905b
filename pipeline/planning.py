"""A variant's plan: uniform, one of llama-quantize's mixes, or the best under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from device.records import SlimpiError, read_record
from device.results import Report
from device.schema import Step
from pipeline import checkpoint, plan_costs, predicted_costs, quantize, sensitivity
from pipeline import plan as plans
from pipeline.calibration_stages import importance_matrix, output_sensitivity
from pipeline.exporter import Context, Prepared
from pipeline.formats import FORMATS
from pipeline.gguf_file import is_gguf, read_gguf
from pipeline.layers import Stats
from pipeline.methods import METHODS
from pipeline.plan_budgets import Budget, best_plan
from pipeline.variants import VariantSpec

_EMBEDDINGS_BESIDE_A_BUDGET = "Q4_K"


@dataclass(frozen=True)
class Planned:
    """A plan, the steps that led to it, and what a budget of a whole file was chosen by: the statistics of the matrices
    outside the blocks, and the settings that made them. predicted: of a budget's plan, the divergence in nats a
    token."""

    plan: plans.Plan
    steps: list[Step]
    predicted: float = math.nan
    outer: dict[str, Stats] = field(default_factory=dict)
    outer_key: Any = None


def chosen_plan(
    context: Context,
    prepared: Prepared,
    spec: VariantSpec,
    budget: Budget | None,
    model: checkpoint.Checkpoint,
    stats: dict[str, Stats],
    shop: quantize.Workshop,
) -> Planned:
    """The spec's plan, resolved to exact tensors."""
    if spec.mix:
        # Some mixes have other types with an importance matrix; llama-quantize's own variants have one.
        importance, step = importance_matrix(context, prepared.base)
        return Planned(plans.mix(prepared.base, spec.mix, importance), [step])
    base = plans.read_base(prepared.base)
    kind = FORMATS[spec.uniform or _EMBEDDINGS_BESIDE_A_BUDGET]
    output = "Q6_K" if kind.bits_per_weight < FORMATS["Q6_K"].bits_per_weight else kind.name
    fixed = plans.uniform(base, kind.name, embeddings=kind.name, output=output)
    if budget is None:
        return Planned(fixed, [])
    felt, step = output_sensitivity(context, model)
    types = _types(context, spec)
    with context.progress.step("predict each matrix's divergence in each type") as tick:
        costs = predicted_costs.predicted_divergence(model, base, stats, felt, types, shop, tick)
    gains = predicted_costs.gains(model, base, stats, spec.method, types, shop)
    costs = predicted_costs.scaled(costs, gains)
    if spec.mib:  # of a budget in bits per linear weight the others are no part
        outer = predicted_costs.outer_costs(model, base, felt, types, replace(shop, outer_key=step.settings))
        costs |= predicted_costs.scaled(outer, gains) if METHODS[spec.method].outside else outer
    if context.recipe.plan.avoid_source_types:
        costs = without(costs, source_types(context.source.path))
    found, choice = best_plan(base, fixed, costs, budget, latency=_latency(context, base, costs))
    if choice.latency_ns is not None:
        context.progress.say(f"    products of a token: {choice.latency_ns / 1e6:.2f} ms predicted")
    if not spec.mib:
        return Planned(found, [step], choice.error)
    return Planned(found, [step], choice.error, sensitivity.outer_stats(felt), step.settings)


_HELD_BY = {
    "Q4_0": ("Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    "Q4_1": ("Q4_1", "Q5_1"),
    "Q5_0": ("Q5_0", "Q5_1"),
    "Q4_K": ("Q4_K", "Q5_K", "Q4_1", "Q5_1"),
    "Q5_K": ("Q5_K", "Q5_1"),
}
"""Types whose codes hold a type's values exactly, or but for a rounding of the scales to 16 bits."""


def source_types(path: Path) -> dict[str, tuple[str, ...]]:
    """{tensor: types that hold what it was} of a GGUF source; nothing of another."""
    if not (path.is_file() and is_gguf(path)):
        return {}
    types = {name: tensor.type.name for name, tensor in read_gguf(path).tensors.items()}
    return {name: _HELD_BY.get(kind, (kind,)) for name, kind in types.items()}


def without(costs: plan_costs.Costs, types: Mapping[str, Sequence[str]]) -> plan_costs.Costs:
    """SlimpiError if nothing is left of a tensor's choice."""
    left = {name: {k: c for k, c in row.items() if k not in types.get(name, ())} for name, row in costs.items()}
    if empty := [name for name, row in left.items() if not row]:
        raise SlimpiError(f"{empty[0]} has no type left but those of its source. Name more types in [plan].")
    return left


def _latency(context: Context, base: plans.Base, costs: plan_costs.Costs) -> plan_costs.Costs | None:
    path = context.recipe.plan.profile
    return plan_costs.latencies(read_record(Path(path), Report), base, costs) if path else None


def budget_of(context: Context, base: Path, spec: VariantSpec) -> Budget | None:
    """SlimpiError if a context alone takes the memory."""
    tokens_per_s = context.recipe.plan.tokens_per_s
    latency_ns = 1e9 / tokens_per_s if tokens_per_s else math.inf
    if not spec.mib:
        return Budget(linear_bits=spec.bits, latency_ns=latency_ns) if spec.bits else None
    limit = int(spec.mib * 2**20)
    return Budget(
        file_bytes=plans.memory_limit(base, spec.n_ctx, limit) if spec.n_ctx else limit, latency_ns=latency_ns
    )


def _types(context: Context, spec: VariantSpec) -> list[str]:
    """What a budget chooses from: of the recipe's types those that the method takes."""
    types = context.recipe.plan.types or predicted_costs.CANDIDATES
    lattices = METHODS[spec.method].lattices
    found = [t for t in types if FORMATS[t].codes is not None or lattices]
    if not found:
        raise SlimpiError(f"{spec.method} chooses codes for none of {', '.join(types)}. Name other types in [plan].")
    return found
