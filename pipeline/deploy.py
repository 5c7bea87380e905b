"""Run jobs on a device and bring their reports back. `run(host, argv, ...)` is the seam; `local` is a host.

Over the seam go only a job on standard input and events, one JSON line each, on standard output.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from device import schema
from device.schema import (
    Artifact,
    Dataset,
    Done,
    Event,
    File,
    Job,
    Parity,
    Perplexity,
    Provenance,
    Report,
    SlimpiError,
    Task,
    Throughput,
    Tweets,
    decode,
    encode,
    sha256_file,
)
from pipeline import sources
from pipeline.recipes import Bench
from pipeline.store import Places, digest, load_artifact

OnEvent = Callable[[Event], None]

STOP_GRACE_S = 10.0


def run(host: str, argv: Sequence[str], stdin: bytes, on_line: Callable[[bytes], None]) -> tuple[int, str]:
    """Run argv on the host, feed it stdin, hand over each line of its stdout; exit code and the end of stderr."""
    if host != "local":
        raise SlimpiError(f"host {host!r} is not known: this version runs on `local` only. Use --on local.")
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as feed:
        feed.write(stdin)
        feed.seek(0)
        child = subprocess.Popen(list(argv), stdin=feed, stdout=subprocess.PIPE, stderr=errors)
        assert child.stdout is not None
        try:
            for line in child.stdout:
                on_line(line)
            code = child.wait()
        finally:
            _stop(child)
            child.stdout.close()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4000))
        return code, errors.read().decode(errors="replace").strip()


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Let the agent close its journal before it is killed."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def run_job(host: str, job: Job, on_event: OnEvent | None = None) -> Report:
    """Run one job on the host's agent. SlimpiError if it ends without a report."""
    reports: list[Report] = []

    def take(line: bytes) -> None:
        event: Event = decode(line, Event, f"an event from {host}")  # type: ignore[arg-type]
        if isinstance(event, Done):
            reports.append(event.report)
        if on_event:
            on_event(event)

    code, errors = run(host, [sys.executable, "-m", "device", "-"], encode(job), take)
    if not reports:
        last = errors.splitlines()[-1] if errors else "it said nothing"
        raise SlimpiError(f"the agent on {host} ended with code {code} and no report: {last}")
    return reports[-1]


def describe_dataset(spec: str, places: Places) -> Dataset:
    """The dataset copied into the content-addressed folder that jobs read from."""
    path = sources.dataset(spec, places.sources)
    sha256 = sha256_file(path)
    relative = f"{sha256[:16]}/{path.name}"
    target = places.datasets / relative
    if not target.exists() or sha256_file(target) != sha256:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            shutil.copyfile(path, partial)
            partial.replace(target)
        except OSError as error:
            raise SlimpiError(f"cannot write {target}: {error.strerror}. Free some space.") from error
        finally:
            partial.unlink(missing_ok=True)
    return Dataset(name=spec, file=File(path=relative, sha256=sha256, size_bytes=target.stat().st_size))


def bench_settings(artifact: Artifact, overrides: dict[str, Any]) -> Bench:
    """The recipe's bench table as recorded in the manifest, with the command line's changes."""
    try:
        return msgspec.convert({**artifact.recipe.get("bench", {}), **overrides}, Bench)
    except msgspec.ValidationError as error:
        raise SlimpiError(f"bench settings of {artifact.name}: {error}. See `slimpi bench --help`.") from error


def tasks_for(artifact: Artifact, bench: Bench, places: Places, wanted: list[str] | None = None) -> list[Task]:
    """The tasks that fit the artifact, in the order they run; `wanted` narrows them by name."""
    tasks: dict[str, Callable[[], Task]]
    if artifact.task == "lm":
        tasks = {
            "parity": Parity,
            "throughput": lambda: Throughput(n_prompt=bench.n_prompt, n_gen=bench.n_gen, repetitions=bench.repetitions),
            "perplexity": lambda: Perplexity(
                dataset=describe_dataset(bench.text, places), n_ctx=bench.n_ctx, n_chunks=bench.n_chunks
            ),
        }
    else:
        tasks = {
            "parity": Parity,
            "tweets": lambda: Tweets(
                dataset=describe_dataset(bench.rows, places),
                text_column=bench.text_column,
                label_column=bench.label_column,
                limit=bench.limit,
            ),
        }
    chosen = [name for name in tasks if not wanted or name in wanted]
    if not chosen:
        raise SlimpiError(f"none of {wanted} fits {artifact.name}. Its tasks: {', '.join(tasks)}.")
    return [tasks[name]() for name in chosen]


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
    """Run an artifact's tasks on a host; a job already measured there is replayed from its journal unless `again`."""
    artifact = load_artifact(folder)
    tasks = tasks_for(artifact, bench_settings(artifact, overrides), places, wanted)
    provenance: Provenance = "host"
    key = [artifact.id, tasks, threads, provenance, device_code_version()]
    results = places.results / host
    name = f"{artifact.name[:60]}-{digest(key)[:12]}"
    run_number = 1 + max((_run_number(p) for p in results.glob(f"{name}.*")), default=0) if again else 0
    earlier = max((_run_number(p) for p in results.glob(f"{name}.*")), default=1)
    job_id = f"{name}.{run_number or earlier}"
    job = Job(
        id=job_id,
        artifact=artifact,
        artifact_dir=str(folder),
        data_dir=str(places.datasets),
        work_dir=str(results / job_id),
        tasks=tasks,
        threads=threads,
        provenance=provenance,
    )
    return run_job(host, job, on_event)


def _run_number(path: Path) -> int:
    suffix = path.name.rpartition(".")[2]
    return int(suffix) if suffix.isdigit() else 0
