"""TASKS: what each task type needs, how it is run, how its samples become measurements. One line a task."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from device.records import SlimpiError
from device.results import Measurement, Sample
from device.samples import Taken
from device.schema import (
    TOKENIZER,
    WORDS,
    Artifact,
    Choices,
    Divergence,
    Job,
    Parity,
    Perplexity,
    Profile,
    RecordGolden,
    RecordLogits,
    Task,
    Throughput,
    Tweets,
)
from device.wire import Request, Started

LM, ONNX_LM, CLASSIFIER = ("gguf", "lm"), ("onnx", "lm"), ("onnx", "classifier")
LMS = (LM, ONNX_LM)


@dataclass(frozen=True)
class TaskSpec:
    """One task type.

    `needs`: the (kind, task) pairs of artifacts it can run on.
    `run(request, task)`: yields Started once, then every sample that the journal lacks, in order within its series;
    what a sample times ends before it is yielded. Run in the worker.
    `summarize(task, samples by series, job)`: pure; needs no model. Run in the agent.
    `timed`: its samples are times, so that it matters how hot the CPU is at the start.
    """

    needs: tuple[tuple[str, str], ...]
    run: Callable[[Request, Any], Iterator[Started | Sample]]
    summarize: Callable[[Any, Taken, Job], list[Measurement]]
    timed: bool = False


def _spec(needs: tuple[tuple[str, str], ...], module: str, run: str, summarize: str, timed: bool = False) -> TaskSpec:
    """Functions of a module of `device`, imported when one of them is called: a worker loads what its task needs."""
    return TaskSpec(needs, _later(module, run), _later(module, summarize), timed)


def _later(module: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"device.{module}"), name)(*arguments)

    return call


TASKS: Mapping[type[Task], TaskSpec] = MappingProxyType(
    {
        Perplexity: _spec(LMS, "language", "run_perplexity", "summarize_perplexity"),
        Throughput: _spec(LMS, "throughput", "run_throughput", "summarize_throughput", timed=True),
        Tweets: _spec((CLASSIFIER,), "tweets", "run_tweets", "summarize_tweets", timed=True),
        Parity: _spec((*LMS, CLASSIFIER), "parity", "run_parity", "summarize_parity"),
        RecordGolden: _spec((*LMS, CLASSIFIER), "parity", "run_record_golden", "summarize_record_golden"),
        RecordLogits: _spec(LMS, "divergence", "run_record_logits", "summarize_record_logits"),
        Divergence: _spec(LMS, "divergence", "run_divergence", "summarize_divergence"),
        Choices: _spec(LMS, "choices", "run_choices", "summarize_choices"),
        Profile: _spec((LM,), "profile", "run_profile", "summarize_profile", timed=True),
    }
)


def task_name(task: Task) -> str:
    return str(task.__struct_config__.tag)


def check_fit(task: Task, artifact: Artifact) -> None:
    """SlimpiError if the task cannot run on this artifact, before anything runs."""
    have = (artifact.kind, artifact.task)
    needs = TASKS[type(task)].needs
    if have not in needs:
        wanted = " or ".join(f"{kind} {what}" for kind, what in needs)
        raise SlimpiError(
            f"task {task_name(task)} needs a {wanted}, {artifact.id} is a {artifact.kind} {artifact.task}. "
            "Leave the task out or choose another artifact."
        )
    if isinstance(task, Parity) and artifact.golden is None:
        raise SlimpiError(f"task parity needs golden outputs, {artifact.id} has none. Leave it out or build again.")
    if have == CLASSIFIER:
        check_classifier(artifact)
    if have == ONNX_LM and TOKENIZER not in {file.path for file in artifact.files}:
        raise SlimpiError(f"{artifact.id} has no {TOKENIZER} among its files. Build it again.")


def check_classifier(artifact: Artifact) -> None:
    """SlimpiError if a classifier lacks what its texts are read with; what the graph asks for is seen when it loads."""
    files = {file.path for file in artifact.files}
    if not files & {TOKENIZER, WORDS}:
        raise SlimpiError(f"{artifact.id} has no {TOKENIZER} or {WORDS} among its files. Build it again.")
    if TOKENIZER in files and artifact.max_tokens < 1:
        raise SlimpiError(f"{artifact.id} has max_tokens {artifact.max_tokens}, texts are cut there. Build it again.")
