"""The mixed-integer program against enumeration, a greedy choice and Lagrange's bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference_plan as twin
from hypothesis import given, settings
from hypothesis import strategies as st

from device.records import SlimpiError
from pipeline import plan_milp
from pipeline.plan_milp import smallest, solve

KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q6_K"]


@st.composite
def problems(draw: Any) -> Any:
    """Tables of a few tensors; error and size are unrelated, so that some formats are beaten by others."""
    numbers = st.integers(1, 40)
    tensors = [f"t{i}" for i in range(draw(st.integers(1, 4)))]
    kinds = {t: draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True)) for t in tensors}
    errors = {t: {k: draw(st.floats(0, 100, allow_subnormal=False)) for k in kinds[t]} for t in tensors}
    sizes = {t: {k: draw(numbers) for k in kinds[t]} for t in tensors}
    latency = {t: {k: float(draw(numbers)) for k in kinds[t]} for t in tensors} if draw(st.booleans()) else None
    shared = [tensors[:2]] if len(tensors) > 2 and set(kinds["t0"]) & set(kinds["t1"]) and draw(st.booleans()) else []
    return errors, sizes, draw(st.integers(1, 160)), latency, float(draw(st.integers(1, 160))), shared


@given(problems())
@settings(max_examples=120, deadline=None)
def test_the_optimum_is_enumerations(problem: Any) -> None:
    errors, sizes, budget, latency, budget_ns, shared = problem
    budget_ns = budget_ns if latency is not None else math.inf
    expected = twin.best_error(errors, sizes, budget, latency, budget_ns, shared)

    def ours() -> plan_milp.Choice:
        return solve(errors, sizes, budget, latency=latency, budget_ns=budget_ns, shared=shared, relative_gap=0.0)

    if expected is None:
        with pytest.raises(SlimpiError, match=r"too few|no choice takes"):
            ours()
        return
    got = ours()
    assert got.error == pytest.approx(expected, rel=1e-9, abs=1e-7)
    assert got.error == pytest.approx(twin.total(errors, got.formats))
    assert got.size_bytes == twin.total(sizes, got.formats) <= budget
    assert got.lower_bound <= got.error
    if latency is not None:
        assert got.latency_ns == pytest.approx(twin.total(latency, got.formats))
        assert got.latency_ns <= budget_ns
    for group in shared:
        assert len({got.formats[tensor] for tensor in group}) == 1


def model_like(n: int, seed: int) -> tuple[twin.Tables, dict[str, dict[str, int]], twin.Tables]:
    """n tensors as a small model has: bytes by bits per weight, error falling with bits, some tensors far touchier."""
    rng = np.random.default_rng(seed)
    bits = {"Q2_K": 2.625, "Q3_K": 3.4375, "IQ4_XS": 4.25, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
    errors: twin.Tables = {}
    sizes: dict[str, dict[str, int]] = {}
    latency: twin.Tables = {}
    for i in range(n):
        weights = int(rng.choice([1536 * 256, 1536 * 1536, 1536 * 8960]))
        touchy = rng.lognormal(0, 1.5)
        errors[f"t{i}"] = {k: touchy * 4.0**-b * rng.uniform(0.8, 1.2) for k, b in bits.items()}
        sizes[f"t{i}"] = {k: round(weights * b / 8) for k, b in bits.items()}
        latency[f"t{i}"] = {k: weights * rng.uniform(0.1, 0.3) for k in bits}
    return errors, sizes, latency


@pytest.mark.parametrize("bits", [2.7, 3.1, 3.8, 5.0])
def test_a_models_worth_of_tensors_is_solved_to_the_bound(bits: float) -> None:
    errors, sizes, _ = model_like(196, seed=1)
    budget = int(sum(row["Q4_K"] for row in sizes.values()) * bits / 4.5)
    got = solve(errors, sizes, budget, relative_gap=1e-4)
    assert got.size_bytes <= budget
    bound = twin.lagrange_bound(errors, sizes, budget)
    assert bound <= got.error <= twin.total(errors, twin.greedy(errors, sizes, budget))
    assert got.error <= max(got.lower_bound, bound) * (1 + 1e-4)


def test_a_budget_of_time_changes_the_answer_and_is_kept() -> None:
    errors, sizes, latency = model_like(60, seed=2)
    budget = int(sum(row["Q4_K"] for row in sizes.values()))
    free = solve(errors, sizes, budget, latency=latency)
    assert free.latency_ns is not None
    hurried = solve(errors, sizes, budget, latency=latency, budget_ns=0.8 * free.latency_ns)
    assert hurried.latency_ns is not None
    assert hurried.latency_ns <= 0.8 * free.latency_ns
    assert hurried.error > free.error
    assert hurried.size_bytes <= budget


def test_infeasible_budgets_name_the_smallest_that_would_do() -> None:
    errors = {"a": {"x": 1.0, "y": 0.0}, "b": {"x": 1.0, "y": 0.0}}
    sizes = {"a": {"x": 10, "y": 20}, "b": {"x": 7, "y": 30}}
    latency = {"a": {"x": 9.0, "y": 1.0}, "b": {"x": 9.0, "y": 2.0}}
    assert smallest(sizes) == 17
    assert smallest(sizes, shared=[("a", "b")]) == 17
    with pytest.raises(SlimpiError, match="16 bytes are too few: the smallest choice takes 17 bytes"):
        solve(errors, sizes, 16)
    with pytest.raises(SlimpiError, match="2 ns are too few: the fastest choice takes 3 ns"):
        solve(errors, sizes, 100, latency=latency, budget_ns=2)
    with pytest.raises(SlimpiError, match="at most 30 bytes and 5 ns: within the bytes the fastest takes 10 ns"):
        solve(errors, sizes, 30, latency=latency, budget_ns=5)
    assert solve(errors, sizes, 30, latency=latency, budget_ns=10).formats == {"a": "y", "b": "x"}
    assert solve(errors, sizes, 50).formats == {"a": "y", "b": "y"}


def test_a_choice_over_the_budget_by_rounding_is_refused_for_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver sees a budget 1 byte too large, as its tolerance may; what comes out keeps the true one."""
    errors = {"a": {"x": 1.0, "y": 0.0}, "b": {"x": 1.5, "y": 0.0}}
    sizes = {"a": {"x": 10, "y": 20}, "b": {"x": 10, "y": 20}}
    optimum = plan_milp._optimum
    monkeypatch.setattr(plan_milp, "_optimum", lambda p, budget, *rest: optimum(p, budget + 1, *rest))
    got = solve(errors, sizes, 39)
    assert (got.formats, got.size_bytes) == ({"a": "x", "b": "y"}, 30)
    monkeypatch.setattr(plan_milp, "_optimum", lambda p, budget, *rest: optimum(p, budget + 100, *rest))
    monkeypatch.setattr(plan_milp, "_ROUNDS", 2)
    with pytest.raises(SlimpiError, match="keeps exceeding"):
        solve(errors, sizes, 21)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"errors": {}}, "there are no tensors"),
        ({"sizes": {"a": {"x": 1, "y": 2}}}, "the table of sizes and that of errors differ: b is in one only"),
        ({"sizes": {"a": {"x": 1}, "b": {"x": 1, "y": 2}}}, "a has sizes for x and errors for x, y"),
        ({"errors": {"a": {"x": math.nan, "y": 1.0}, "b": {"x": 1.0, "y": 2.0}}}, "errors of a in x is nan"),
        ({"errors": {"a": {"x": -1.0, "y": 1.0}, "b": {"x": 1.0, "y": 2.0}}}, "errors of a in x is -1"),
        ({"budget_ns": 5.0}, "needs a table of latencies"),
        ({"shared": [("a", "c")]}, "c is to share a format but has no errors"),
        ({"shared": [("a", "b"), ("a",)]}, "a is to share a format but is in two groups"),
    ],
)
def test_tables_that_do_not_match_are_refused(changes: dict[str, Any], says: str) -> None:
    table = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 1.0, "y": 2.0}}
    arguments: dict[str, Any] = {"errors": table, "sizes": table, "budget_bytes": 10, **changes}
    with pytest.raises(SlimpiError, match=says):
        solve(**arguments)


def test_shared_tensors_need_a_common_format() -> None:
    table = {"a": {"x": 1.0}, "b": {"y": 1.0}}
    with pytest.raises(SlimpiError, match="no format is open to all"):
        solve(table, table, 10, shared=[("a", "b")])
