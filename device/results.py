"""The contract's answers: what a task measured, what the machine said of itself, and report.json.

The tasks are in device/schema.py, with the history of SCHEMA_VERSION, which counts for these too. Raw samples are
stored; means and errors are computed when read.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from device.records import Count, Positive, Record
from device.schema import Artifact, Provenance, Task


class Measurement(Record, frozen=True, kw_only=True):
    """One metric's raw samples, warm-ups apart, with the conditions they hold under."""

    metric: str
    unit: str
    samples: list[float]
    warmup: list[float] = []
    higher_is_better: bool
    conditions: dict[str, Any] = {}
    provenance: Provenance

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def mean(self) -> float:
        return math.fsum(self.samples) / len(self.samples)

    @property
    def stderr(self) -> float:
        """Standard error of the mean; NaN for fewer than two samples."""
        if self.n < 2:
            return math.nan
        centre = self.mean
        return math.sqrt(math.fsum((x - centre) ** 2 for x in self.samples) / (self.n - 1) / self.n)


class Memory(Record, frozen=True, kw_only=True):
    """Peak memory of one task's process. Anonymous and file-backed apart: a mapped GGUF inflates RSS."""

    peak_rss_bytes: Count
    peak_pss_bytes: Count
    rss_anon_bytes: Count
    rss_file_bytes: Count
    swap_bytes: Count
    major_faults: Count


class Facts(Record, frozen=True, kw_only=True):
    """What the machine said of itself at one moment. None = the machine does not tell."""

    time_unix_s: float
    machine: str
    board: str
    cpu: str
    cores: Positive
    os: str
    kernel: str
    python: str
    page_size_bytes: Positive
    mem_total_bytes: Count
    mem_available_bytes: Count
    swap_used_bytes: Count
    load_1min: float
    cpu_busy_percent: float
    clock_mhz: float | None = None
    governor: str | None = None
    temperature_c: float | None = None
    throttled_bits: int | None = None
    runtimes: dict[str, str] = {}
    board_revision: str | None = None
    firmware: str | None = None
    storage: str | None = None
    swap_total_bytes: Count = 0
    under_voltage_alarm: bool | None = None


class TracePoint(Record, frozen=True, kw_only=True):
    """What the machine said while a task ran, time_s after its worker started; about one a second."""

    time_s: float
    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled_bits: int | None = None
    cpu_busy_percent: float | None = None
    mem_available_bytes: Count = 0
    worker_rss_bytes: Count = 0
    worker_rss_anon_bytes: Count = 0
    power_w: float | None = None


class TaskResult(Record, frozen=True, kw_only=True):
    """What one task gave: measurements, or the error that ended it, and what it was run in.

    duration_s counts from started_unix_s; waiting to cool (cool_wait_s) comes before. worker_peak_rss_bytes is known
    even of a worker that was killed. trace_cpu_s: CPU time that taking the trace cost, on any core.
    """

    task: Task
    status: Literal["ok", "failed"]
    error: str = ""
    measurements: list[Measurement] = []
    memory: Memory | None = None
    facts_before: Facts
    facts_after: Facts
    duration_s: float
    resumed: bool = False
    warnings: list[str] = []
    started_unix_s: float = 0.0
    cool_wait_s: float = 0.0
    worker_peak_rss_bytes: Count = 0
    trace: list[TracePoint] = []
    trace_cpu_s: float = 0.0


class Report(Record, frozen=True, kw_only=True):
    """report.json: the answer to one job."""

    schema: Literal[1] = 1
    job_id: str
    artifact: Artifact
    threads: Positive
    provenance: Provenance
    results: list[TaskResult]


class Sample(Record, frozen=True, kw_only=True, tag="sample", tag_field="event"):
    """One value as it is taken. `index` counts within (task, series); a resumed task starts at the next one."""

    task: Count
    series: str
    index: Count
    value: float
    warmup: bool = False


class TaskStarted(Record, frozen=True, kw_only=True, tag="task_started", tag_field="event"):
    task: Count
    name: str
    total: Count
    facts: Facts


class TaskEnded(Record, frozen=True, kw_only=True, tag="task_ended", tag_field="event"):
    task: Count
    result: TaskResult


class Note(Record, frozen=True, kw_only=True, tag="note", tag_field="event"):
    """Something worth saying while a job runs; no measurement hangs on it."""

    message: str


class Done(Record, frozen=True, kw_only=True, tag="done", tag_field="event"):
    report: Report


Event = Sample | TaskStarted | TaskEnded | Note | Done
