"""Which tensor gets which format, as a mixed-integer program: the least error under a budget of bytes, and of time.

After MXQ (Zhang et al. 2025): one binary variable a (tensor, format), each tensor has exactly one format, their bytes
stay within the budget, the sum of errors is least. Which error is up to the table: Frobenius as in the paper, output
error, or a measured divergence. A second budget bounds the nanoseconds a token takes, by what the device measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from device.records import SlimpiError

Table = Mapping[str, Mapping[str, float]]
"""{tensor: {format: number}}: errors, bytes or nanoseconds."""

_SCALE = 1e3  # of the largest error: far above HiGHS's absolute gap of 1e-6, far below where its digits end
_ROUNDS = 8
_INFEASIBLE = 2  # scipy.optimize.milp's status


@dataclass(frozen=True)
class Choice:
    """The formats chosen, their total error, a bound no choice can be below, and what they take."""

    formats: dict[str, str]
    error: float
    lower_bound: float
    size_bytes: int
    latency_ns: float | None = None


@dataclass(frozen=True)
class _Program:
    """Groups of tensors that share a choice; column j gives group of[j] the format kinds[j]."""

    groups: list[tuple[str, ...]]
    of: NDArray[np.int64]
    kinds: list[str]
    errors: NDArray[np.float64]
    sizes: NDArray[np.float64]
    latency: NDArray[np.float64] | None


def solve(
    errors: Table,
    sizes: Table,
    budget_bytes: int,
    *,
    latency: Table | None = None,
    budget_ns: float = math.inf,
    shared: Sequence[Iterable[str]] = (),
    relative_gap: float = 1e-6,
    time_limit_s: float = 60.0,
) -> Choice:
    """The choice of least total error within the budgets; HiGHS proves it to `relative_gap` or stops at the limit.

    The tables name the same tensors and formats. `shared`: sets of tensors that get one and the same format.
    SlimpiError for tables that do not match, and for a budget that nothing fits, with the smallest that would do.
    """
    program = _program(errors, sizes, latency, shared)
    _check_feasible(program, budget_bytes, budget_ns)
    kept = _undominated(program)
    refused: list[NDArray[np.bool_]] = []
    while len(refused) < _ROUNDS:
        chosen, bound = _optimum(kept, budget_bytes, budget_ns, refused, relative_gap, time_limit_s)
        choice = _choice(kept, chosen, bound)
        if choice.size_bytes <= budget_bytes and (choice.latency_ns or 0) <= budget_ns:
            return choice
        refused.append(chosen)  # over by the solver's tolerance: exclude it and solve again
    raise SlimpiError(f"HiGHS keeps exceeding the budget of {budget_bytes} bytes by rounding. Ask for a little less.")


def smallest(sizes: Table, shared: Sequence[Iterable[str]] = ()) -> int:
    """Bytes of the smallest choice: no budget below it is feasible."""
    return int(_least(_program(sizes, sizes, None, shared), "sizes"))


def _program(errors: Table, sizes: Table, latency: Table | None, shared: Sequence[Iterable[str]]) -> _Program:
    tables = {"errors": errors, "sizes": sizes, **({"latency": latency} if latency is not None else {})}
    _check_tables(tables)
    groups = _groups(list(errors), shared)
    of, kinds = [], []
    columns: dict[str, list[float]] = {name: [] for name in tables}
    for index, group in enumerate(groups):
        common = [kind for kind in errors[group[0]] if all(kind in errors[name] for name in group)]
        if not common:
            raise SlimpiError(f"{', '.join(group)} share a format but no format is open to all. Split them.")
        for kind in common:
            of.append(index)
            kinds.append(kind)
            for name, table in tables.items():
                columns[name].append(math.fsum(table[tensor][kind] for tensor in group))
    return _Program(
        groups,
        np.array(of),
        kinds,
        np.array(columns["errors"]),
        np.array(columns["sizes"]),
        np.array(columns["latency"]) if latency is not None else None,
    )


def _check_tables(tables: Mapping[str, Table]) -> None:
    first = tables["errors"]
    if not first:
        raise SlimpiError("there are no tensors to choose formats for. Give the errors of at least one.")
    for name, table in tables.items():
        if table.keys() != first.keys():
            odd = min(table.keys() ^ first.keys())
            raise SlimpiError(f"the table of {name} and that of errors differ: {odd} is in one only. Measure again.")
        for tensor, row in table.items():
            if row.keys() != first[tensor].keys() or not row:
                raise SlimpiError(
                    f"{tensor} has {name} for {', '.join(row) or 'nothing'} and errors for "
                    f"{', '.join(first[tensor]) or 'nothing'}. Give both for the same formats."
                )
            for kind, value in row.items():
                if not (math.isfinite(value) and value >= 0):
                    raise SlimpiError(
                        f"{name} of {tensor} in {kind} is {value}, not a number from 0 on. Measure again."
                    )


def _groups(tensors: list[str], shared: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
    groups = [tuple(group) for group in shared]
    taken: set[str] = set()
    for name in (name for group in groups for name in group):
        if name not in tensors or name in taken:
            why = "is in two groups" if name in taken else "has no errors"
            raise SlimpiError(f"{name} is to share a format but {why}. Correct the groups.")
        taken.add(name)
    return [group for group in groups if group] + [(name,) for name in tensors if name not in taken]


def _check_feasible(program: _Program, budget_bytes: int, budget_ns: float) -> None:
    if math.isfinite(budget_ns) and program.latency is None:
        raise SlimpiError(f"a budget of {budget_ns} ns needs a table of latencies. Run `slimpi profile` on the device.")
    least = _least(program, "sizes")
    if least > budget_bytes:
        raise SlimpiError(
            f"{budget_bytes} bytes are too few: the smallest choice takes {least:.0f} bytes. Allow that much, or add "
            "smaller formats."
        )
    if program.latency is not None:
        fastest = _least(program, "latency")
        if fastest > budget_ns:
            raise SlimpiError(f"{budget_ns:.0f} ns are too few: the fastest choice takes {fastest:.0f} ns. Allow more.")


def _least(program: _Program, column: str) -> float:
    values = getattr(program, column)
    return math.fsum(values[program.of == group].min() for group in range(len(program.groups)))


def _undominated(program: _Program) -> _Program:
    """Without formats that another one beats or equals in error, bytes and time: no optimum needs them."""
    rows = [program.errors, program.sizes] + ([program.latency] if program.latency is not None else [])
    points = np.stack(rows, axis=1)
    kept: list[int] = []
    for group in range(len(program.groups)):
        mine = np.flatnonzero(program.of == group)
        order = mine[np.lexsort(points[mine].T[::-1])]  # whatever dominates a point comes before it
        front: list[int] = []
        for j in order:
            if not any((points[i] <= points[j]).all() for i in front):
                front.append(int(j))
        kept += front
    index = np.array(kept)
    latency = program.latency[index] if program.latency is not None else None
    kinds = [program.kinds[j] for j in kept]
    return _Program(program.groups, program.of[index], kinds, program.errors[index], program.sizes[index], latency)


def _optimum(
    program: _Program,
    budget_bytes: int,
    budget_ns: float,
    refused: Sequence[NDArray[np.bool_]],
    relative_gap: float,
    time_limit_s: float,
) -> tuple[NDArray[np.bool_], float]:
    """(which columns, lower bound of the error)."""
    n_groups, n = len(program.groups), len(program.kinds)
    one_each = csr_array((np.ones(n), (program.of, np.arange(n))), shape=(n_groups, n))
    # In units near 1: bytes and nanoseconds reach 1e9, where a relative tolerance is thousands of bytes.
    bytes_unit = max(program.sizes.mean(), 1.0)
    limits = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(program.sizes[None] / bytes_unit, -np.inf, budget_bytes / bytes_unit),
    ]
    if program.latency is not None and math.isfinite(budget_ns):
        ns_unit = max(program.latency.mean(), 1e-9)
        limits.append(LinearConstraint(program.latency[None] / ns_unit, -np.inf, budget_ns / ns_unit))
    limits += [LinearConstraint(chosen[None].astype(float), -np.inf, n_groups - 1) for chosen in refused]
    unit = max(program.errors.max() / _SCALE, np.finfo(float).tiny)
    options = {"mip_rel_gap": relative_gap, "time_limit": time_limit_s}
    found = milp(
        program.errors / unit, constraints=limits, integrality=np.ones(n), bounds=Bounds(0, 1), options=options
    )
    if found.status == _INFEASIBLE:
        raise SlimpiError(_infeasible(program, budget_bytes, budget_ns, time_limit_s))
    if found.x is None:
        raise SlimpiError(f"HiGHS found no choice within {time_limit_s} s: {found.message}. Allow more time.")
    bound = 0.0 if found.mip_dual_bound is None else float(found.mip_dual_bound) * unit
    return found.x > 0.5, bound


def _infeasible(program: _Program, budget_bytes: int, budget_ns: float, time_limit_s: float) -> str:
    """Each budget alone is feasible, both together are not: how fast it gets within the bytes."""
    assert program.latency is not None
    timed = _Program(program.groups, program.of, program.kinds, program.latency, program.sizes, None)
    chosen, _ = _optimum(timed, budget_bytes, math.inf, [], 1e-6, time_limit_s)
    fastest = math.fsum(program.latency[chosen])
    return (
        f"no choice takes at most {budget_bytes} bytes and {budget_ns:.0f} ns: within the bytes the fastest takes "
        f"{fastest:.0f} ns. Allow that, or more bytes."
    )


def _choice(program: _Program, chosen: NDArray[np.bool_], bound: float) -> Choice:
    formats: dict[str, str] = {}
    for j in np.flatnonzero(chosen):
        formats |= dict.fromkeys(program.groups[program.of[j]], program.kinds[j])
    error = math.fsum(program.errors[chosen])
    return Choice(
        formats=formats,
        error=error,
        lower_bound=min(bound, error),
        size_bytes=int(program.sizes[chosen].sum()),
        latency_ns=None if program.latency is None else math.fsum(program.latency[chosen]),
    )
