"""The agent: reads a job, runs its tasks one fresh worker process each, and says what happens as it happens.

    python -m device [JOB.json]      no argument or `-`: the job comes on stdin

stdout: schema.Event, one JSON line each, every one of them on disk before it is said. work_dir: journal.jsonl,
report.json, task-N.log (what the runtimes printed). Run the same job again to resume or to replay it.
Exit code: 0 all tasks ok, 3 some failed, 1 an error (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from device import facts
from device.checks import warnings
from device.cooling import Cooling, wait_cool
from device.journal import Journal
from device.process import Worker
from device.records import SlimpiError, decode, encode, encode_line, write_atomic, write_remedy
from device.results import Done, Event, Memory, Note, Report, TaskEnded, TaskResult, TaskStarted
from device.sampler import Sampler, machine_reader
from device.schema import File, Job, Task, verify_file
from device.tasks import TASKS, check_fit, task_name
from device.wire import Failed, Finished, Request, Started

Emit = Callable[[Event], None]

EXIT_OK, EXIT_ERROR, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 0, 1, 3, 130


def run(job: Job, emit: Emit) -> Report:
    """Run what the journal lacks, write report.json, emit every event. SlimpiError if the job as a whole cannot run."""
    check(job)
    work = Path(job.work_dir)
    results = []
    with Journal(work, job) as journal:
        for note in journal.notes:
            emit(Note(message=note))
        for index in range(len(job.tasks)):
            if index not in journal.results:
                result = measure(job, index, journal, emit)
                journal.append([TaskEnded(task=index, result=result)])
            else:
                result = journal.results[index]
            emit(TaskEnded(task=index, result=result))
            results.append(result)
        report = Report(
            job_id=job.id, artifact=job.artifact, threads=job.threads, provenance=job.provenance, results=results
        )
        write_atomic(work / "report.json", encode(report))
    emit(Done(report=report))
    return report


def check(job: Job) -> None:
    """Everything that can be known before a task runs: provenance, tasks that fit, files whole and unchanged."""
    if not job.tasks:
        raise SlimpiError(f"job {job.id} has no tasks. Give it at least one.")
    if job.provenance == "measured" and platform.machine() != "aarch64":
        raise SlimpiError(
            f"provenance `measured` is for the real board, this machine is {platform.machine()}. Use `host` here."
        )
    for task in job.tasks:
        check_fit(task, job.artifact)
    files = [(Path(job.artifact_dir), file) for file in job.artifact.files]
    files += [(Path(job.data_dir), task.dataset.file) for task in job.tasks if hasattr(task, "dataset")]
    for folder, file in files:
        verify(folder, file)


def measure(job: Job, index: int, journal: Journal, emit: Emit) -> TaskResult:
    """Run one task in a worker, each sample journaled as it comes; how it failed is part of the result."""
    task, work = job.tasks[index], Path(job.work_dir)
    cooling = _cool(job, task, emit)
    taken = journal.samples.setdefault(index, {})
    request = Request(
        job=job, index=index, done={series: len(samples) for series, samples in taken.items()}, agent_pid=os.getpid()
    )
    before = facts.collect(work)
    started_unix_s, begin_s = time.time(), time.monotonic()
    memory: Memory | None = None
    error = ""
    with Worker(request, work / f"task-{index}.log") as worker, Sampler(machine_reader(worker.pid)) as sampler:
        for messages in worker.messages():
            events: list[Event] = []
            for message in messages:
                if isinstance(message, Started):
                    events.append(TaskStarted(task=index, name=task_name(task), total=message.total, facts=before))
                elif isinstance(message, Finished):
                    memory = message.memory
                elif isinstance(message, Failed):
                    error = message.message
                else:
                    events.append(message)
            journal.append(events)
            for event in events:
                emit(event)
        if memory is None:
            error = error or worker.obituary()
    duration_s = time.monotonic() - begin_s
    after = facts.collect(work)
    measurements = TASKS[type(task)].summarize(task, taken, job) if memory else []
    return TaskResult(
        task=task,
        status="ok" if memory else "failed",
        error=error,
        measurements=measurements,
        memory=memory,
        facts_before=before,
        facts_after=after,
        duration_s=duration_s,
        resumed=bool(request.done),
        warnings=[
            *([str(cooling)] if cooling and not cooling.reached else []),
            *warnings(before, after, measurements, memory, sampler.points),
        ],
        started_unix_s=started_unix_s,
        cool_wait_s=cooling.waited_s if cooling else 0.0,
        worker_peak_rss_bytes=worker.peak_rss_bytes,
        trace=sampler.points,
        trace_cpu_s=sampler.cpu_s,
    )


def _cool(job: Job, task: Task, emit: Emit) -> Cooling | None:
    if job.wait_cool_c is None or not TASKS[type(task)].timed:
        return None
    cooling = wait_cool(job.wait_cool_c, job.wait_cool_max_s)
    emit(Note(message=str(cooling)))
    return cooling


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        report = run(_read_job(arguments), _say)
    except SlimpiError as error:
        _complain(" ".join(str(error).split()))
        return EXIT_ERROR
    except (KeyboardInterrupt, BrokenPipeError):
        _complain("interrupted; run the same job again to go on from the last sample")
        return EXIT_INTERRUPTED
    return EXIT_OK if all(result.status == "ok" for result in report.results) else EXIT_SOME_FAILED


def _read_job(arguments: Sequence[str]) -> Job:
    if len(arguments) > 1:
        raise SlimpiError(f"got {len(arguments)} arguments, expected one job file. Usage: python -m device [JOB.json]")
    origin = arguments[0] if arguments else "-"
    if origin == "-":
        return decode(sys.stdin.buffer.read(), Job, "the job on stdin")
    try:
        return decode(Path(origin).read_bytes(), Job, origin)
    except OSError as error:
        raise SlimpiError(f"cannot read {origin}: {error.strerror}. Check the path.") from error


def verify(folder: Path, file: File) -> None:
    """verify_file, its other errors as SlimpiError, too."""
    try:
        verify_file(folder, file)
    except OSError as error:
        raise SlimpiError(f"cannot read {folder / file.path}: {error.strerror}. Check its permissions.") from error
    except RuntimeError as error:  # pathlib before Python 3.13
        raise SlimpiError(f"cannot read {folder / file.path}: its links go round in a circle. Remove them.") from error


def _say(event: Event) -> None:
    """Unbuffered: what a full disk or a closed pipe refused must not be tried again at exit."""
    line = memoryview(encode_line(event))
    try:
        while line:
            line = line[os.write(1, line) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SlimpiError(
            f"cannot write events: {error.strerror}. {write_remedy(error)} Then run the same job again: it goes on "
            "from the last sample."
        ) from error


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a file on the very disk that is full
        os.write(2, f"slimpi agent: {message}\n".encode())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
