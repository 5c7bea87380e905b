"""Follow a job on a device over links that may drop, and take what comes back as data from a stranger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta

from device.records import Record, SlimpiError, decode
from device.results import Done, Event, Measurement, Note, Report, TaskStarted
from device.schema import Job
from pipeline import remote, transport
from pipeline.remote import Device, printable

OnEvent = Callable[[Event], None]

MAX_EVENTS_BYTES = 1 << 30
MAX_RESTARTS = 3
MAX_VALUE = 1e12
EXIT_INTERRUPTED = 130
_LATEST_UNIX_S = 4e9
_EVENT = cast(Any, Event)  # a union is no type[...] to mypy


class Alive(Record, frozen=True, kw_only=True, tag="alive", tag_field="follow"):
    """The job runs and has nothing new to say."""


class Ended(Record, frozen=True, kw_only=True, tag="ended", tag_field="follow"):
    """The agent is gone. exit: None = it left no code (killed, power cut)."""

    exit: Annotated[int, Meta(ge=-999, le=999)] | None
    stderr: str


def run_job(device: Device, job: Job, pythonpath: list[str], on_event: OnEvent | None) -> tuple[Report | None, Ended]:
    """Run a job there, or attach to it if it runs already; its report if it came to one, and how it ended.

    An agent that was killed (power cut, out of memory) is started again and goes on from its journal. Ctrl-C
    stops the job; what it measured stays on the device.
    """
    reports: list[Report] = []

    def take(line: bytes) -> None:
        event: Event = decode(line, _EVENT, f"an event from {device.host.name}")
        if isinstance(event, Done):
            check_report(event.report, job, device.host.name)
            event = Done(report=msgspec.structs.replace(clean(event.report, Report), artifact=job.artifact))
            reports.append(event.report)
        elif isinstance(event, Note | TaskStarted):
            event = clean(event, type(event))
        if on_event:
            on_event(event)

    try:
        for _ in range(1 + MAX_RESTARTS):
            if remote.start(device, job, pythonpath) == "running":
                device.say(f"{job.id} is running there already: attached to it")
            ended = follow(device, job.id, take)
            killed = ended.exit is None or ended.exit < 0
            if reports or not killed:
                break
            device.say(f"the agent of {job.id} was killed ({ended.stderr or 'it said nothing'}); it goes on")
    except (transport.Interrupted, KeyboardInterrupt):
        remote.stop(device, job.id)
        raise
    return (reports[-1] if reports else None), ended


def follow(device: Device, job_id: str, take: Callable[[bytes], None]) -> Ended:
    """Hand over every event line of the job once, from the first on, whatever the link does; how the agent ended."""
    outage = remote.Outage(device)
    offset = 0
    last: list[Ended] = []

    def on_line(line: bytes) -> None:
        nonlocal offset
        if not line.endswith(b"\n"):
            return  # cut off with the link; it comes again whole
        if line.startswith(b'{"follow"'):
            said = decode(line, cast(Any, Alive | Ended), f"what {device.host.name} says of {job_id}")
            if isinstance(said, Ended):
                last.append(said)
            return
        take(line)
        offset += len(line)
        if offset > MAX_EVENTS_BYTES:
            raise SlimpiError(f"{device.host.name} sent over {MAX_EVENTS_BYTES} bytes of events. Check the device.")

    while not last:
        begun = offset
        request = msgspec.json.encode({"job": job_id, "offset": offset})
        argv = remote.depot_argv(device, "follow")
        code, errors = transport.run(
            device.host, argv, request, on_line, silence_s=remote.SILENCE_S, cancel=device.cancel
        )
        if last:
            break
        if code == 1 and errors:
            # The depot refuses: after a power cut the file may be shorter than what was told. Start the job again.
            last.append(Ended(exit=None, stderr=errors))
        else:
            outage.wait(errors or f"exit code {code}", progressed=offset > begun)
    return clean(last[0], Ended)


def check_report(report: Report, job: Job, name: str) -> None:
    """Is this an answer to this job, with figures that can be counted with? SlimpiError if not.

    The schema was checked when it was decoded; here, what it cannot say.
    """
    given = (report.job_id, report.artifact, report.threads, report.provenance, [r.task for r in report.results])
    asked = (job.id, job.artifact, job.threads, job.provenance, job.tasks)
    for what, got, wanted in zip(("id", "artifact", "threads", "provenance", "tasks"), given, asked, strict=True):
        if got != wanted:
            raise SlimpiError(f"the report of {name} is not of job {job.id}: its {what} differ(s). Measure again.")
    for result in report.results:
        for facts in (result.facts_before, result.facts_after):
            if not 0 <= facts.time_unix_s < _LATEST_UNIX_S:
                raise SlimpiError(f"the report of {name} is from {facts.time_unix_s} s. Set its clock.")
        for m in result.measurements:
            if problem := _problem(m, job):
                raise SlimpiError(f"the report of {name} has a `{printable(m.metric)}` {problem}. Measure again.")


def _problem(m: Measurement, job: Job) -> str:
    """What makes a measurement unfit to be counted with; empty = nothing."""
    if m.provenance != job.provenance:
        return f"of provenance {m.provenance}"
    if not m.samples:
        return "without samples"
    if any(isinstance(value, dict | list) for value in m.conditions.values()):
        return "under conditions that are no plain values"
    rate = m.unit == "ms" or m.unit.endswith("/s")
    worst = min(m.samples) if rate else 1.0
    return "with impossible values" if worst <= 0 or max(map(abs, m.samples)) >= MAX_VALUE else ""


def clean(record: Any, kind: Any) -> Any:
    """A record with every string fit for a terminal."""
    return msgspec.convert(_clean(msgspec.to_builtins(record)), kind)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isprintable() else printable(value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value
