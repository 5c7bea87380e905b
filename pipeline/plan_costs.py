"""Tables that plans are chosen by: what each tensor loses in each format, and how long the device takes over it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from device.records import SlimpiError, write_atomic
from device.results import Report
from device.schema import Product, Profile
from pipeline.formats import FORMATS
from pipeline.layers import Layer, Method, Stats
from pipeline.methods import llama_codes
from pipeline.plan import EMBEDDINGS, OUTPUT, Base, read_base
from pipeline.store import digest

Costs = dict[str, dict[str, float]]
PROFILED = (*(name for name, kind in FORMATS.items() if kind.ggml_type and kind.codes), *llama_codes.TYPES, "F16")
"""Formats that `profile` times: those that plans choose from, and half floats to compare with."""

Measure = Callable[[torch.Tensor, Stats | None], float]


def frobenius(error: torch.Tensor, stats: Stats | None) -> float:
    """||W - W^||_F, the objective of MXQ (Zhang et al. 2025)."""
    return float(torch.linalg.matrix_norm(error.double()))


def weighted(error: torch.Tensor, stats: Stats | None) -> float:
    """sum over columns j of E[x_j^2] |error_j|^2: the output's expected squared error if inputs were uncorrelated."""
    mean_x2 = _needed(stats).mean_x2.double().to(error.device)
    return float((error.double().square() * mean_x2).sum())


def output(error: torch.Tensor, stats: Stats | None) -> float:
    """E |(W - W^) x|^2 = tr(D H D^T) with D = W - W^ and H = E[x x^T]: the loss GPTQ minimises."""
    hessian = _needed(stats).hessian().double().to(error.device)
    return float(((error.double() @ hessian) * error.double()).sum())


MEASURES: Mapping[str, Measure] = {"frobenius": frobenius, "weighted": weighted, "output": output}
"""How a table of errors weighs the difference (rows, columns) between a matrix and its quantized self."""


def layer_errors(
    layer: Layer, stats: Mapping[str, Stats], choices: Mapping[str, Sequence[str]], method: Method, measure: Measure
) -> Costs:
    """{tensor: {format: error}} of the layer's matrices among `choices` (exact names), each format by `method`.

    SlimpiError for a method that folds scales into other tensors: what it makes is not to be compared with W alone.
    """
    prefix = f"blk.{layer.index}."
    mine = {name: kinds for name in layer.matrices if (kinds := choices.get(prefix + name))}
    errors: Costs = {prefix + name: {} for name in mine}
    for kind in dict.fromkeys(kind for kinds in mine.values() for kind in kinds):
        formats = {name: FORMATS[kind] for name, kinds in mine.items() if kind in kinds}
        made = method(layer, stats, formats)
        if made.vectors:
            raise SlimpiError(f"the method changes {', '.join(made.vectors)} too. Take errors with one that does not.")
        for name, tensor in made.tensors.items():
            errors[prefix + name][kind] = measure(layer.matrices[name] - tensor.dequantize(), stats.get(name))
    return errors


def sensitivities(
    choices: Mapping[str, Sequence[str]],
    reference: Mapping[str, str],
    fitness: Callable[[dict[str, str], int], float],
    n_samples: int,
    path: Path,
) -> Costs:
    """{tensor: {format: by how much fitness rises}} when that one tensor alone leaves the plan `reference`.

    fitness as for `plan_evolve.evolve`, a mean KL divergence for example; what noise makes negative counts as 0.
    Values are saved to `path` as they are measured, and an ended run goes on. SlimpiError if `path` is another run's.
    """
    of = digest([choices, dict(reference), n_samples])
    state: dict[str, Any] = _read_state(path, of) if path.exists() else {"of": of, "measured": {}}
    measured: dict[str, float] = state["measured"]

    def value(name: str, kind: str) -> float:
        key = f"{name} {kind}"
        if key not in measured:
            changed = {**reference, name: kind} if name else dict(reference)
            measured[key] = fitness(changed, n_samples)
            write_atomic(path, json.dumps(state).encode())
        return measured[key]

    least = value("", "")
    return {
        name: {kind: 0.0 if kind == reference[name] else max(0.0, value(name, kind) - least) for kind in kinds}
        for name, kinds in choices.items()
    }


def _read_state(path: Path, of: str) -> Any:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SlimpiError(f"{path} cannot be read: {error}. Remove it to measure anew.") from error
    if not isinstance(state, dict) or state.get("of") != of:
        raise SlimpiError(f"{path} was measured for other choices, reference or samples. Remove it to measure anew.")
    return state


def latencies(report: Report, base: Base, choices: Mapping[str, Iterable[str]]) -> Costs:
    """{tensor: {format: ns}} of one decoded token, from the medians of a report of the task `profile`.

    The embeddings of a model that has an output matrix are looked up, not multiplied: 0. SlimpiError for a format and
    shape that were not measured.
    """
    measured = {
        (m.conditions["format"], m.conditions["rows"], m.conditions["columns"]): statistics.median(m.samples)
        for result in report.results
        for m in result.measurements
        if m.metric == "ns_per_weight" and m.conditions["n_tokens"] == 1
    }
    found: Costs = {}
    for name, kinds in choices.items():
        rows, columns = _rows_columns(base.shapes[name])
        found[name] = {}
        for kind in kinds:
            key = (kind, rows, columns)
            if name == EMBEDDINGS and OUTPUT in base.shapes:
                found[name][kind] = 0.0
            elif key not in measured:
                raise SlimpiError(
                    f"{kind} {rows}x{columns}, of {name}, is not among the {len(measured)} products that "
                    "the report timed. Profile that format on the device with this model."
                )
            else:
                found[name][kind] = measured[key] * rows * columns
    return found


def products(base: Base, kinds: Iterable[str]) -> list[Product]:
    """What `profile` should time for plans of this model: the shapes of a decoded token's products, each once, in each
    of the formats whose blocks divide its columns."""
    looked_up = {EMBEDDINGS} if OUTPUT in base.shapes else set()
    shapes = {_rows_columns(base.shapes[name]) for name in base.matrices if name not in looked_up}
    wanted = list(kinds)
    return [
        Product(format=kind, rows=rows, columns=columns)
        for rows, columns in sorted(shapes)
        for kind in wanted
        if columns % FORMATS[kind].block_size == 0
    ]


def profile_task(path: Path) -> Profile:
    """The task `profile` for plans of the model at `path`, a GGUF of any format."""
    return Profile(products=products(read_base(path), PROFILED))


def _rows_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _needed(stats: Stats | None) -> Stats:
    if stats is None:
        raise SlimpiError("this measure of error weighs by what calibration saw. Calibrate first, or use `frobenius`.")
    return stats
