"""What the agent and its worker say to each other: a Request on stdin, then one JSON line a message on stdout.

Private to one version of slimpi (both ends come from the same folder), so it carries no version of its own.
"""

from __future__ import annotations

from typing import Literal

from device.records import Count, Record
from device.results import Memory, Note, Sample
from device.schema import Job, Task

Series = Literal[
    "nll",
    "load_ms",
    "prefill_ms",
    "ttft_ms",
    "decode_ms",
    "latency_ms",
    "cpu_ms",
    "predicted",
    "label",
    "pass_ms",
    "padding",
    "max_abs_logit_diff",
    "kl_nats",
    "top1",
    "recorded",
    "kld",
    "nll_difference",
    "same_top",
    "ns_per_weight",
    "product_error",
    "correct",
    "correct_norm",
    "margin",
    "cut_tokens",
]


class Request(Record, frozen=True, kw_only=True):
    """One task of a job, and how many samples of each series the journal already holds."""

    job: Job
    index: Count
    done: dict[str, Count]
    agent_pid: Count

    @property
    def task(self) -> Task:
        return self.job.tasks[self.index]

    def first_missing(self, *series: Series, warmup: int = 0) -> int:
        """The first repetition, warm-ups not counted, that some of these series still lack."""
        return max(0, min(self.done.get(name, 0) for name in series) - warmup)

    def sample(self, series: Series, index: int, value: float, warmup: bool = False) -> Sample:
        return Sample(task=self.index, series=series, index=index, value=float(value), warmup=warmup)


class Started(Record, frozen=True, kw_only=True, tag="started", tag_field="event"):
    """The worker has read its inputs and will take `total` samples, warm-ups and journaled ones included."""

    total: Count


class Finished(Record, frozen=True, kw_only=True, tag="finished", tag_field="event"):
    memory: Memory


class Failed(Record, frozen=True, kw_only=True, tag="failed", tag_field="event"):
    """The message of the SlimpiError that ended the task."""

    message: str


Message = Sample | Note | Started | Finished | Failed
