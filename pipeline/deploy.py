"""Run jobs on devices and bring their reports back: on this machine, or on any that ssh reaches (transport.run).

Over the seam go only files named by their hash, a job on standard input, and events, one JSON line each.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from device import schema
from device.records import SlimpiError, decode, encode, sha256_file, write_atomic
from device.results import Done, Event, Report
from device.schema import Artifact, Choices, Divergence, File, Job, Perplexity, Profile, Provenance, Task, Tweets
from pipeline import board, energy, fit, follow, hosts, remote
from pipeline.hosts import LOCAL, Host
from pipeline.jobs import bench_settings, tasks_for
from pipeline.progress import Progressor
from pipeline.remote import Device, Goods
from pipeline.replies import Status
from pipeline.store import Places, digest, load_artifact
from pipeline.transport import run

OnEvent = Callable[[Event], None]
Watch = Callable[[str], AbstractContextManager[OnEvent | None]]
"""Called with the name of what is measured; what it gives takes the events."""

DEFAULT_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Settings:
    """How the command line wants artifacts measured. threads 0 = chosen for the machine; wanted = task names;
    divergence: the task against each model's recorded reference, by model."""

    threads: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    wanted: list[str] | None = None
    again: bool = False
    force: bool = False
    timeout_s: int = DEFAULT_TIMEOUT_S
    memory_limit_bytes: int = 0
    wait_cool_c: float | None = None
    governor: str = ""
    meter: str = ""
    divergence: Mapping[str, Divergence] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One artifact to be measured: where it lies here, its tasks and its job's id."""

    folder: Path
    artifact: Artifact
    tasks: list[Task]
    job_id: str


def run_job(name: str, job: Job, on_event: OnEvent | None = None, cancel: threading.Event | None = None) -> Report:
    """Run one job on this machine's own agent, a separate process. SlimpiError if it ends without a report."""
    reports: list[Report] = []

    def take(line: bytes) -> None:
        event: Event = decode(line, cast(Any, Event), f"an event from {name}")
        if isinstance(event, Done):
            reports.append(event.report)
        if on_event:
            on_event(event)

    code, errors = run(LOCAL, [sys.executable, "-m", "device", "-"], encode(job), take, cancel=cancel)
    if not reports:
        last = errors.splitlines()[-1] if errors else "it said nothing"
        raise SlimpiError(f"the agent on {name} ended with code {code} and no report: {last}")
    return reports[-1]


@cache
def device_code_version() -> str:
    """Hash of the agent's code: a changed agent measures again instead of replaying old samples."""
    root = Path(schema.__file__).parent
    return digest({p.name: sha256_file(p) for p in sorted(root.rglob("*.py"))})


def bench(
    host: str,
    folder: Path,
    places: Places,
    *,
    threads: int,
    overrides: dict[str, Any],
    wanted: list[str] | None = None,
    again: bool = False,
    on_event: OnEvent | None = None,
) -> Report:
    """Run an artifact's tasks here; a job already measured is replayed from its journal unless `again`."""
    if host != LOCAL.name:
        raise SlimpiError(f"host {host!r} is not this machine. Use bench_all for hosts that ssh reaches.")
    settings = Settings(threads=threads, overrides=overrides, wanted=wanted, again=again)
    return _bench_here(folder, places, settings, on_event, threading.Event())


def bench_all(
    devices: Sequence[Host],
    folders: Sequence[Path],
    places: Places,
    settings: Settings,
    progress: Progressor,
    watch: Watch,
) -> tuple[dict[str, list[Report]], list[SlimpiError]]:
    """Measure every artifact on every device, several devices side by side: (reports by host, errors).

    An error of one device leaves the others alone. Ctrl-C stops the jobs on all of them.
    """
    cancel = threading.Event()
    reports: dict[str, list[Report]] = {host.name: [] for host in devices}
    errors: list[SlimpiError] = []
    with ExitStack() as links:
        runs: list[Callable[[], None]] = []
        for host in devices:  # one after the other: ssh may ask something on the terminal
            try:
                runs.append(_runner(host, links, folders, places, settings, progress, cancel, watch, reports))
            except SlimpiError as error:
                errors.append(error)
        if len(runs) == 1:
            try:
                runs[0]()
            except SlimpiError as error:
                errors.append(error)
        elif runs:
            errors += _side_by_side(runs, cancel, progress)
    return reports, errors


def _runner(
    host: Host,
    links: ExitStack,
    folders: Sequence[Path],
    places: Places,
    settings: Settings,
    progress: Progressor,
    cancel: threading.Event,
    watch: Watch,
    reports: dict[str, list[Report]],
) -> Callable[[], None]:
    """What measures one device; its link is opened here."""
    found = reports[host.name]
    if host.is_local:

        def here() -> None:
            with _metered(host, places, settings, 0.0, progress):
                for folder in folders:
                    with watch(load_artifact(folder).name) as on_event:
                        found.append(_bench_here(folder, places, settings, on_event, cancel))

        return here
    device = links.enter_context(remote.attach(host, progress, cancel))

    def there() -> None:
        with _metered(host, places, settings, device.clock_ahead_s, progress):
            _bench_there(device, folders, places, settings, watch, found)

    return there


def _metered(
    host: Host, places: Places, settings: Settings, ahead_s: float, progress: Progressor
) -> AbstractContextManager[None]:
    """A meter's command runs beside the job and leaves its readings with the results; a CSV is the user's own."""
    if not settings.meter or energy.is_csv(settings.meter):
        return nullcontext()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    out = places.results / host.name / energy.POWER_FOLDER / f"{stamp}.csv"
    return energy.metered(settings.meter, out, ahead_s, progress.say)


def _side_by_side(
    runs: Sequence[Callable[[], None]], cancel: threading.Event, progress: Progressor
) -> list[SlimpiError]:
    errors: list[SlimpiError] = []
    with ThreadPoolExecutor(len(runs)) as pool:
        pending: set[Future[None]] = {pool.submit(one) for one in runs}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    error = future.exception()
                    if isinstance(error, SlimpiError):
                        progress.say(f"  {error}")
                        errors.append(error)
                    elif error:
                        raise error
        finally:
            cancel.set()  # only those that still run notice: the user interrupted, or one of them has a bug
    return errors


def _plan(folder: Path, places: Places, settings: Settings, where: Path, conditions: Sequence[Any]) -> Plan:
    """The job's id hashes what its samples depend on; `.N` counts the times it was asked for anew."""
    artifact = load_artifact(folder)
    tasks = tasks_for(
        artifact,
        bench_settings(artifact, settings.overrides),
        places,
        settings.wanted,
        settings.divergence.get(artifact.model),
        _profile(folder, artifact) if "profile" in (settings.wanted or ()) and artifact.kind == "gguf" else None,
    )
    plain = artifact.name[:60].replace("+", "_")  # a variant's name may have a plus sign, a job's id may not
    name = f"{plain}-{digest([artifact.id, tasks, *conditions, device_code_version()])[:12]}"
    latest = max((_run_number(path) for path in where.glob(f"{name}.*")), default=0)
    return Plan(folder, artifact, tasks, f"{name}.{latest + 1 if settings.again else max(1, latest)}")


def _profile(folder: Path, artifact: Artifact) -> Profile:
    from pipeline.plan_costs import profile_task  # torch loads in seconds

    return profile_task(folder / artifact.entry)


def _job(plan: Plan, folders: tuple[str, str, str], threads: int, kind: Provenance, settings: Settings) -> Job:
    """folders: of the artifact, of the data, and to work in, as the device calls them."""
    artifact_dir, data_dir, work_dir = folders
    return Job(
        id=plan.job_id,
        artifact=plan.artifact,
        artifact_dir=artifact_dir,
        data_dir=data_dir,
        work_dir=work_dir,
        tasks=plan.tasks,
        threads=threads,
        provenance=kind,
        timeout_s=settings.timeout_s,
        memory_limit_bytes=settings.memory_limit_bytes,
        wait_cool_c=settings.wait_cool_c,
    )


def _bench_here(
    folder: Path, places: Places, settings: Settings, on_event: OnEvent | None, cancel: threading.Event
) -> Report:
    threads = settings.threads or max(1, (os.cpu_count() or 1) // 2)
    kind = hosts.provenance(LOCAL, "", "")
    results = places.results / LOCAL.name
    plan = _plan(folder, places, settings, results, [threads, kind])
    dirs = (str(folder), str(places.datasets), str(results / plan.job_id))
    job = _job(plan, dirs, threads, kind, settings)
    return run_job(LOCAL.name, job, on_event, cancel)


def _bench_there(
    device: Device, folders: Sequence[Path], places: Places, settings: Settings, watch: Watch, found: list[Report]
) -> None:
    """Plan, check that it fits, send what is missing, run: every artifact on one device; reports go to `found`."""
    host, contact = device.host, device.contact
    kind = hosts.provenance(host, contact.machine, contact.board)
    threads = settings.threads or (1 if kind == "emulated" else contact.cores)
    wheels, unpacked_bytes = board.wheels(device, places)
    conditions = [threads, kind, [g.sha256 for g in wheels], settings.governor]
    results = places.results / host.name
    plans = [_plan(folder, places, settings, results, conditions) for folder in folders]
    goods = [*wheels, *(g for plan in plans for g in _goods(plan, places))]
    seen = remote.status(device, goods)
    refuse_if_busy(device, seen, {plan.job_id for plan in plans})
    _check_memory(device, seen, plans, settings)
    remote.supply(device, goods, seen, unpacked_bytes)
    device.say(remote.describe_sent(device))
    site = board.site(device, wheels, unpacked_bytes)
    with board.governor(device, settings.governor) if settings.governor else nullcontext():
        # A job that an earlier run left running is followed before others are started beside it.
        for plan in sorted(plans, key=lambda plan: plan.job_id not in seen.running):
            (results / plan.job_id).mkdir(parents=True, exist_ok=True)  # its number is taken, finished or not
            with watch(f"{host.name} {plan.artifact.name}") as on_event:
                report = _measure(device, plan, places, [device.code_path, *site], threads, kind, settings, on_event)
            write_atomic(results / plan.job_id / "report.json", encode(report))
            found.append(report)
    order = {plan.artifact.id: i for i, plan in enumerate(plans)}
    found.sort(key=lambda report: order[report.artifact.id])


def _measure(
    device: Device,
    plan: Plan,
    places: Places,
    pythonpath: list[str],
    threads: int,
    kind: Provenance,
    settings: Settings,
    on_event: OnEvent | None,
) -> Report:
    """Run one job there. A file that the agent finds damaged on the device is dropped and sent again, once."""
    goods = _goods(plan, places)
    for attempt in (1, 2):
        artifact_dir = remote.place(device, f"artifacts/{plan.artifact.id}", plan.artifact.files)
        data_dir = remote.place(device, "data", _data_files(plan))
        work_dir = f"{device.contact.home}/jobs/{plan.job_id}/work"
        job = _job(plan, (artifact_dir, data_dir, work_dir), threads, kind, settings)
        report, ended = follow.run_job(device, job, pythonpath, on_event)
        if report:
            return report
        if attempt == 2 or not remote.replace_damaged(device, plan.artifact.name, goods, ended.stderr):
            break
    how = "without an exit code" if ended.exit is None else f"with code {ended.exit}"
    last = ended.stderr.splitlines()[-1] if ended.stderr else "it said nothing"
    raise SlimpiError(f"the agent on {device.host.name} ended {how} and no report of {plan.job_id}: {last}")


def _goods(plan: Plan, places: Places) -> list[Goods]:
    artifact = [remote.goods_of(plan.folder / f.path, f, "artifact") for f in plan.artifact.files]
    return artifact + [remote.goods_of(places.datasets / f.path, f, "data") for f in _data_files(plan)]


def _data_files(plan: Plan) -> list[File]:
    return [task.dataset.file for task in plan.tasks if isinstance(task, Perplexity | Tweets | Divergence | Choices)]


def refuse_if_busy(device: Device, seen: Status, own: set[str]) -> None:
    """SlimpiError if jobs other than our own run there."""
    others = sorted(set(seen.running) - own)
    if others:
        name = device.host.name
        raise SlimpiError(
            f"{name} is measuring {remote.printable(', '.join(others))}; two runs would spoil each other. "
            f"Wait for it, or `slimpi stop {name}`."
        )


def _check_memory(device: Device, seen: Status, plans: Sequence[Plan], settings: Settings) -> None:
    if settings.force or seen.running:  # what runs already takes its memory from the figure
        return
    for plan in plans:
        wanted = fit.footprints(plan.artifact, plan.folder, plan.tasks)
        fit.check(device.host.name, plan.artifact, wanted, seen.mem_available_bytes)


def _run_number(path: Path) -> int:
    suffix = path.name.rpartition(".")[2]
    return int(suffix) if suffix.isdigit() else 0
