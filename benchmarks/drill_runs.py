"""What the drills of fault_drill.py share: a job of many samples on a tiny model, and the audit of what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]  # the fake models are the tests' own

from fakes import TEXT, World  # type: ignore[import-not-found]  # noqa: E402

from device.records import encode, read_record  # noqa: E402
from device.results import Report  # noqa: E402
from device.schema import Job, Perplexity, Throughput  # noqa: E402

TIMEOUT_S = 120
DETERMINISTIC = frozenset({"nll"})
"""Series whose values, not only their number, must be those of an uninterrupted run."""

Key = tuple[int, str, int]
"""Task, series and index of a sample."""
Samples = Mapping[Key, float]


@dataclass(frozen=True)
class Tally:
    """What a drill did and what it found; everything after `runs` must be 0."""

    faults: int = 0
    runs: int = 0
    samples_lost: int = 0
    samples_doubled: int = 0
    samples_changed: int = 0
    corrupted_accepted: int = 0
    other: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        return not any(getattr(self, field.name) for field in fields(self)[2:])

    def __add__(self, more: Tally) -> Tally:
        return Tally(*(getattr(self, field.name) + getattr(more, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Bench:
    """A job that takes seconds, and every sample of a run that nothing disturbed."""

    job: Job
    whole: Samples
    journal: bytes


def make_bench(root: Path, repeat: int = 40) -> Bench:
    """Perplexity in hundreds of small chunks, then a few timings, on the tiny llama."""
    world = World.make(root)
    (root / "data" / "long.txt").write_text(TEXT * repeat, encoding="utf-8")
    tasks = [Perplexity(dataset=world.dataset("long.txt"), n_ctx=8), Throughput(n_prompt=8, n_gen=4, repetitions=10)]
    job = world.job("gguf", tasks, work_dir=str(root / "whole"))
    done = subprocess.run([*AGENT, "-"], input=encode(job), capture_output=True, cwd=REPO, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"the undisturbed run failed: {done.stderr.decode()}")
    journal = (root / "whole" / "journal.jsonl").read_bytes()
    whole, doubled = read_samples(journal)
    assert not doubled
    return Bench(job, whole, journal)


AGENT = [sys.executable, "-m", "device"]


def in_folder(bench: Bench, work: Path) -> Job:
    return msgspec.structs.replace(bench.job, work_dir=str(work))


def start_agent(job: Job, events: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """The agent on this job, its events appended to a file."""
    path = Path(job.work_dir).with_suffix(".job.json")
    path.write_bytes(encode(job))
    with events.open("ab") as out, events.with_suffix(".err").open("ab") as errors:
        return subprocess.Popen(
            [*AGENT, str(path)], cwd=REPO, stdout=out, stderr=errors, env={**os.environ, **(environment or {})}
        )


def finish(job: Job, events: Path, environment: Mapping[str, str] | None = None) -> Tally:
    """Run the job to its end, undisturbed; a run that does not end well is told."""
    agent = start_agent(job, events, environment)
    try:
        code = agent.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()
        return Tally(runs=1, other=(f"a run of {job.work_dir} did not end in {TIMEOUT_S} s",))
    errors = events.with_suffix(".err").read_text(errors="replace")
    other = [f"exit code {code}: {errors.splitlines()[-1] if errors else ''}"] if code else []
    if "Traceback" in errors:
        other.append(f"a traceback in {events.with_suffix('.err')}")
    return Tally(runs=1, other=tuple(other))


def audit(bench: Bench, job: Job, said: Sequence[Samples] = ()) -> Tally:
    """Compare a finished job with the undisturbed run, and with every sample it or its earlier runs ever told.

    Reads the journal by itself: the agent's own reader is what is on trial.
    """
    samples, doubled = read_samples((Path(job.work_dir) / "journal.jsonl").read_bytes())
    lost = len(bench.whole.keys() - samples.keys())
    extra = len(samples.keys() - bench.whole.keys())
    changed = sum(bench.whole[key] != value for key, value in samples.items() if key in bench.whole and _fixed(key))
    for told in said:
        lost += len(told.keys() - samples.keys())
        changed += sum(samples[key] != value for key, value in told.items() if key in samples)
    other = []
    report = read_record(Path(job.work_dir) / "report.json", Report)
    for index, result in enumerate(report.results):
        kept = Counter(key[1] for key in samples if key[0] == index)
        reported = {len(m.samples) + len(m.warmup) for m in result.measurements}
        if result.status != "ok" or not reported <= set(kept.values()):
            other.append(f"task {index} of {job.work_dir} reports {reported} samples, journaled {dict(kept)}")
    return Tally(samples_lost=lost, samples_doubled=doubled + extra, samples_changed=changed, other=tuple(other))


def _fixed(key: Key) -> bool:
    return key[1] in DETERMINISTIC


def read_samples(journal: bytes) -> tuple[dict[Key, float], int]:
    """Every sample in whole, undamaged lines, and how many of them come twice."""
    samples: dict[Key, float] = {}
    doubled = 0
    for line in journal.splitlines(keepends=True)[1:]:
        start, end = line.find(b'"event":') + 8, line.rfind(b"}")
        if not line.endswith(b"\n") or json.loads(line[: line.find(b",")] + b"}")["crc"] != zlib.crc32(line[start:end]):
            break
        doubled += _take(json.loads(line[start:end]), samples)
    return samples, doubled


def said_samples(events: Path) -> dict[Key, float]:
    """Every sample in the events a run has told so far; a torn last line does not count."""
    samples: dict[Key, float] = {}
    for line in events.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            _take(json.loads(line), samples)
    return samples


def _take(event: Mapping[str, object], samples: dict[Key, float]) -> bool:
    """Add a sample to the others; True if there was one in its place."""
    if event["event"] != "sample":
        return False
    key = (int(str(event["task"])), str(event["series"]), int(str(event["index"])))
    known = key in samples
    samples[key] = float(str(event["value"]))
    return known
