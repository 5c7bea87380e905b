"""From samples to measurements: the little that every task shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from device.results import Measurement, Sample
from device.schema import Job

Taken = dict[str, list[Sample]]
"""All samples of one task by series, in order, warm-ups included."""


def values(taken: Taken, series: str) -> list[float]:
    return [sample.value for sample in taken.get(series, []) if not sample.warmup]


def measurement(
    job: Job,
    metric: str,
    unit: str,
    samples: list[Sample],
    higher_is_better: bool,
    conditions: dict[str, Any],
    convert: Callable[[float], float] = float,
) -> Measurement:
    """The samples as one metric, warm-ups apart, each through `convert`."""
    return Measurement(
        metric=metric,
        unit=unit,
        samples=[convert(sample.value) for sample in samples if not sample.warmup],
        warmup=[convert(sample.value) for sample in samples if sample.warmup],
        higher_is_better=higher_is_better,
        conditions=conditions,
        provenance=job.provenance,
    )


def from_values(
    job: Job, metric: str, unit: str, samples: list[float], higher_is_better: bool, conditions: dict[str, Any]
) -> Measurement:
    """A metric derived from other series; one value if it is of the whole data set."""
    return Measurement(
        metric=metric,
        unit=unit,
        samples=samples,
        higher_is_better=higher_is_better,
        conditions=conditions,
        provenance=job.provenance,
    )
