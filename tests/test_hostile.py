"""Hostile manifests, jobs, depot requests, journals and event streams: one line each, nothing outside the root.

Each property runs a few hundred times here and 2,500 times among the slow tests.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import World
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from device import agent, depot, depot_jobs, facts
from device.journal import Journal
from device.records import SlimpiError, decode, encode
from device.results import Event, Report
from device.schema import Artifact, Job, Parity, Perplexity, Throughput

Check = Callable[[Any], None]
BUDGETS = [pytest.param(250, id="few"), pytest.param(2500, id="many", marks=pytest.mark.slow)]
LONGEST_S = 10.0


def hammer(strategy: st.SearchStrategy[Any], check: Check, count: int) -> None:
    """Run `check` on `count` drawn values; none may take long."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def property_(value: Any) -> None:
        begin_s = time.monotonic()
        check(value)
        assert time.monotonic() - begin_s < LONGEST_S

    property_()


NASTY = [
    "",
    ".",
    "..",
    "../up",
    "a/../../up",
    "/etc/passwd",
    "/",
    "//x",
    "a//b",
    "./a",
    "a/",
    "~",
    "~root/x",
    "-rf",
    "$(id)",
    "`id`",
    "a;b",
    "a\nb",
    "a\0b",
    "a\\b",
    "C:\\x",
    "\ud800",
    "\udcff",
    "\u202e",
    "é" * 200,
    "x" * 300,
    "x" * 5000,
    "/dev/zero",
    "/dev/full",
    "/proc/self/mem",
    "data",
    "artifacts/x",
    "artifacts/../x",
    "model.gguf",
    "0" * 64,
    "f" * 63,
]
HOSTILE_TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=30))
HOSTILE = st.recursive(
    st.one_of(
        HOSTILE_TEXT,
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, -1, 1, 2**31, 2**62, 2**63, 10**400]),
        st.floats(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(HOSTILE_TEXT, inner, max_size=3)),
    max_leaves=6,
)


def mutated(document: Any) -> st.SearchStrategy[Any]:
    """The document with one to three of its values, at any depth, replaced, removed or joined by another."""
    paths = list(_paths(document))

    @st.composite
    def strategy(draw: st.DrawFn) -> Any:
        changed = json.loads(json.dumps(document))
        for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
            _change(changed, path, draw(st.sampled_from(["replace", "twist", "remove", "add"])), draw(HOSTILE))
        return changed

    return strategy()


def nasty(document: Any, count: int) -> list[Any]:
    """The document with each of its strings in turn replaced by each of NASTY, and followed by it; about `count` of
    these, evenly taken."""
    found = []
    for path in _paths(document):
        if isinstance(_get(document, path), str):
            found += [(path, how, text) for how in ("replace", "twist") for text in NASTY]
    changed = []
    for path, how, text in found[:: max(1, len(found) // count)]:
        changed.append(json.loads(json.dumps(document)))
        _change(changed[-1], path, how, text)
    return changed


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []):
        yield from _paths(inner, (*path, key))


def _get(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _change(document: Any, path: tuple[Any, ...], how: str, value: Any) -> None:
    """A path that an earlier change took away is left alone."""
    target = document
    for key in path[:-1]:
        if not _has(target, key):
            return
        target = target[key]
    if not _has(target, path[-1]):
        return
    if how == "remove":
        del target[path[-1]]
    elif how == "replace":
        target[path[-1]] = value
    elif how == "twist":  # a string that begins well
        target[path[-1]] = f"{target[path[-1]]}/{value}"
    elif isinstance(target, dict):
        target[str(value)[:40]] = value
    else:
        target.append(value)


def _has(target: Any, key: Any) -> bool:
    return key in target if isinstance(target, dict) else isinstance(target, list) and key in range(len(target))


def as_bytes(value: Any) -> bytes:
    """JSON as a hostile host may send it: NaN, lone surrogates and numbers beyond 64 bits included."""
    return json.dumps(value, ensure_ascii=True).encode()


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below a root, with size and time of change; the depot's own home is left out."""
    found = {}
    for folder, names, files in os.walk(root):
        if Path(folder) == root and "home" in names:
            names.remove("home")
        for name in [*names, *files]:
            status = (Path(folder) / name).lstat()
            found[str(Path(folder, name))] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(facts, "BUSY_WINDOW_S", 0.0)
    monkeypatch.setattr(facts, "SPIN_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return World.make(tmp_path / "world")


def whole_job(world: World, **changes: Any) -> Job:
    tasks = [Perplexity(dataset=world.dataset("text.txt"), n_ctx=32), Throughput(), Parity()]
    return world.job("gguf", tasks, **changes)


def plain(record: Any) -> Any:
    return json.loads(encode(record))


@pytest.mark.parametrize("count", BUDGETS)
def test_manifests_and_reports(world: World, count: int) -> None:
    manifest = plain(whole_job(world).artifact)
    report = {"schema": 1, "job_id": "j", "artifact": manifest, "threads": 1, "provenance": "host", "results": []}
    cases = [(Artifact, manifest), (Report, report)]

    def check(value: tuple[int, Any]) -> None:
        try:
            record = decode(as_bytes(value[1]), cases[value[0]][0], "x")
        except SlimpiError as error:
            assert "\n" not in " ".join(str(error).split())
            return
        artifact = record.artifact if isinstance(record, Report) else record
        for file in artifact.files:
            inside = Path("/base/folder")
            assert (inside / file.path.replace("\0", "?")).resolve().is_relative_to(inside)

    choices = [st.tuples(st.just(i), mutated(document)) for i, (_, document) in enumerate(cases)]
    hammer(st.one_of(*choices), check, count)


class NoWorker:
    """Stands for the worker: says nothing, ends at once."""

    pid, peak_rss_bytes = os.getpid(), 0

    def __init__(self, *arguments: Any) -> None:
        pass

    def __enter__(self) -> NoWorker:
        return self

    def __exit__(self, *arguments: Any) -> None:
        pass

    def messages(self) -> list[Any]:
        return []

    def obituary(self) -> str:
        return "there was no worker"


def drive(root: Path, command: str, request: bytes) -> tuple[int, bytes, str]:
    """depot.main() in this process, on files as streams."""
    with (
        tempfile.TemporaryFile("w+b") as out,
        pytest.MonkeyPatch.context() as patch,
    ):
        errors = io.StringIO()
        patch.setenv("SLIMPI_DEVICE_HOME", str(root))
        patch.setattr(sys, "argv", ["depot.py", command])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(request)))
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, write_through=True))
        patch.setattr(sys, "stderr", errors)
        code = depot.main()
        out.seek(0)
        said = out.read()
        sys.stdout.detach()
    return code, said, errors.getvalue()


@pytest.mark.parametrize("count", BUDGETS)
def test_jobs_through_the_depot_into_the_agent(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The whole way a hostile job goes, but for the worker: accepted or one line, and nothing outside the home."""
    home = tmp_path / "home"
    for name in ("lm", "data"):
        (home / name).mkdir(parents=True)
    for path in (world.root / "lm" / "model.gguf", world.root / "data" / "text.txt"):
        (home / path.parent.name / path.name).write_bytes(path.read_bytes())
    places = {"artifact_dir": home / "lm", "data_dir": home / "data", "work_dir": home / "jobs" / "job-1" / "work"}
    document = plain(whole_job(world, **{name: str(path) for name, path in places.items()}))
    before = tree(tmp_path)
    codes: list[int] = []

    def run_here(folder: Path, lock: int, pythonpath: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as nowhere:
            patch.setattr(agent, "_say", lambda event: nowhere.write(msgspec.json.encode(event)))
            patch.setattr(agent, "_complain", lambda message: None)
            codes.append(agent.main([str(folder / "job.json")]))

    monkeypatch.setattr(depot_jobs, "_detach", run_here)
    monkeypatch.setattr(agent, "Worker", NoWorker)
    monkeypatch.setattr(agent, "wait_cool", lambda limit_c, max_s: None)
    monkeypatch.setattr(agent.signal, "signal", lambda number, handler: None)

    def check(job: Any) -> None:
        codes.clear()
        code, _, errors = drive(home, "start", as_bytes({"job": job, "pythonpath": []}))
        assert (code, errors.count("\n")) in ((0, 0), (1, 1)), errors
        assert not codes or codes[0] in (agent.EXIT_ERROR, agent.EXIT_SOME_FAILED, agent.EXIT_OK)
        assert tree(tmp_path) == before

    for job in [*nasty({name: document[name] for name in places}, 250), *nasty(document, count)]:
        check(document | job)
    hammer(mutated(document), check, count)


REQUESTS: dict[str, Any] = {
    "status": {"want": [["0" * 64, 3]]},
    "admit": {"files": [["0" * 64, 3]]},
    "drop": {"files": ["0" * 64]},
    "install": {"id": "site-1", "wheels": ["0" * 64]},
    "place": {"folder": "artifacts/a", "files": [{"path": "a/b", "sha256": "0" * 64, "size_bytes": 0}]},
    "start": {"job": {"id": "j", "artifact_dir": "x", "data_dir": "x", "work_dir": "x"}, "pythonpath": ["x"]},
    "follow": {"job": "j", "offset": 0},
    "stop": {"job": "j"},
    "clean": {"all": True},
}


@pytest.mark.parametrize("count", BUDGETS)
def test_depot_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    assert REQUESTS.keys() == depot.COMMANDS.keys()
    home = tmp_path / "home"
    (tmp_path / "outside").write_text("canary")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(depot_jobs, "_detach", lambda folder, lock, pythonpath: None)
    before = tree(tmp_path)
    for path in ("x", "store", "incoming"):
        (home / path).mkdir(parents=True)
    document = {
        command: json.loads(json.dumps(request).replace('"x"', json.dumps(str(home / "x"))))
        for command, request in REQUESTS.items()
    }

    def check(value: tuple[str, Any]) -> None:
        (home / "store").mkdir(parents=True, exist_ok=True)
        (home / "store" / ("0" * 64)).write_bytes(b"")
        command, request = value
        code, said, errors = drive(home, command, request if isinstance(request, bytes) else as_bytes(request))
        assert (code, errors.count("\n")) in ((0, 0), (1, 1)), errors
        if code == 0:
            for line in said.splitlines():
                json.loads(line)
        assert tree(tmp_path) == before
        for folder, names, files in os.walk(home):
            for name in [*names, *files]:
                assert not (Path(folder) / name).is_symlink()

    for command, request in document.items():
        for changed in nasty(request, count // 4):
            check((command, changed))
    drawn = [st.tuples(st.just(command), mutated(request)) for command, request in document.items()]
    raw = st.tuples(st.sampled_from([*REQUESTS, "", "--help", "../x"]), st.one_of(st.binary(max_size=60), HOSTILE))
    hammer(st.one_of(*drawn, *drawn, raw), check, count)


@pytest.mark.parametrize("count", BUDGETS)
def test_journals_and_event_streams(world: World, tmp_path: Path, count: int) -> None:
    job = whole_job(world)
    with Journal(tmp_path / "work", job) as journal:
        head = journal.path.read_bytes()
    now = plain(facts.collect())
    result = {
        "task": plain(job)["tasks"][1],
        "status": "ok",
        "facts_before": now,
        "facts_after": now,
        "duration_s": 1.0,
        "trace": [{"time_s": 0.0, "throttled_bits": 1}],
    }
    events: list[Any] = [
        {"event": "sample", "task": 0, "series": "nll", "index": 0, "value": 1.5, "warmup": False},
        {"event": "task_started", "task": 0, "name": "perplexity", "total": 3, "facts": now},
        {"event": "task_ended", "task": 0, "result": result},
        {"event": "note", "message": "x"},
        {"event": "done", "report": {"schema": 1, "job_id": "j", "artifact": plain(job.artifact), "threads": 1}},
    ]

    def check(value: tuple[list[Any], bytes]) -> None:
        lines, noise = value
        stream = b"".join(as_bytes(line) + b"\n" for line in lines) + noise
        for line in stream.splitlines():
            try:
                decode(line, Event, "an event")  # type: ignore[arg-type]
            except SlimpiError:
                continue
        with_sums = b"".join(_with_crc(as_bytes(line)) for line in lines) + noise
        (tmp_path / "work" / "journal.jsonl").write_bytes(head + with_sums)
        try:
            with Journal(tmp_path / "work", job) as journal:
                taken = sum(len(samples) for series in journal.samples.values() for samples in series.values())
                assert taken <= len(lines)
        except SlimpiError as error:
            assert "journal.jsonl" in str(error)

    lines = st.lists(st.one_of(*(mutated(event) for event in events), HOSTILE), max_size=4)
    hammer(st.tuples(lines, st.binary(max_size=40)), check, count)


def _with_crc(event: bytes) -> bytes:
    import zlib

    return b'{"crc":%d,"event":%s}\n' % (zlib.crc32(event), event)
