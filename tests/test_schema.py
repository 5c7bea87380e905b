"""The contract: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import World
from hypothesis import given, settings
from hypothesis import strategies as st

from device import facts
from device.records import SlimpiError, check_relative, decode, encode, encode_line, read_record, write_atomic
from device.results import Event, Measurement, Note, Report, Sample, TaskResult
from device.schema import Artifact, Job, Parity, Perplexity, Throughput


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    world = World.make(tmp_path_factory.mktemp("world"))
    return world.job("gguf", [Perplexity(dataset=world.dataset("text.txt")), Throughput(), Parity()])


@pytest.fixture(scope="module")
def report(job: Job) -> Report:
    now = facts.collect()
    timing = Measurement(metric="ttft_ms", unit="ms", samples=[1.5, 2.5], higher_is_better=False, provenance="host")
    result = TaskResult(
        task=job.tasks[1], status="ok", measurements=[timing], facts_before=now, facts_after=now, duration_s=1.0
    )
    return Report(job_id=job.id, artifact=job.artifact, threads=1, provenance="host", results=[result])


def test_records_round_trip(job: Job, report: Report) -> None:
    assert decode(encode(job), Job, "x") == job
    assert decode(encode(report), Report, "x") == report
    assert decode(encode(job.artifact), Artifact, "x") == job.artifact


def paths_to_objects(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every JSON object in a document whose fields the schema fixes (not free-form dicts)."""
    found = [path] if isinstance(value, dict) else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []):
        if key not in ("plan", "recipe", "tools", "settings", "conditions", "runtimes"):
            found += paths_to_objects(inner, (*path, key))
    return found


def test_unknown_fields_are_rejected_at_every_depth(job: Job, report: Report) -> None:
    for record in (job, report):
        plain = msgspec.json.decode(encode(record))
        places = paths_to_objects(plain)
        assert len(places) >= 6
        for place in places:
            changed = msgspec.json.decode(encode(record))
            target = changed
            for key in place:
                target = target[key]
            target["surprise"] = 1
            with pytest.raises(SlimpiError, match="surprise"):
                decode(msgspec.json.encode(changed), type(record), "x")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_versions_are_rejected(job: Job, report: Report, version: Any) -> None:
    for record in (job, report, job.artifact):
        changed = msgspec.json.decode(encode(record)) | {"schema": version}
        with pytest.raises(SlimpiError, match="schema"):
            decode(msgspec.json.encode(changed), type(record), "x")


CHANGES: dict[str, Any] = {
    "id": "../up",
    "threads": 0,
    "timeout_s": 0,
    "provenance": "guessed",
    "tasks": [{"task": "mine_bitcoin"}],
}


@pytest.mark.parametrize("field", CHANGES)
def test_bad_values_name_their_field(job: Job, field: str) -> None:
    changed = msgspec.json.decode(encode(job)) | {field: CHANGES[field]}
    with pytest.raises(SlimpiError, match=r"x is not a valid Job: .*(\$\.\w+|plain name)"):
        decode(msgspec.json.encode(changed), Job, "x")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_nothing_but_slimpi_errors(data: bytes) -> None:
    for kind in (Job, Report, Artifact):
        with pytest.raises(SlimpiError):
            decode(data, kind, "x")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_damaged_documents_give_nothing_but_slimpi_errors(job: Job, data: st.DataObject) -> None:
    text = bytearray(encode(job))
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(text), Job, "x")
    except SlimpiError as error:
        assert str(error).startswith("x is not a valid Job")


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(SlimpiError):
        decode(b"[" * 100_000, Job, "x")


@settings(deadline=None)
@given(
    st.integers(0, 2**40),
    st.text(max_size=20),
    st.integers(0, 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
def test_samples_round_trip_on_one_line(task: int, series: str, index: int, value: float, warmup: bool) -> None:
    sample = Sample(task=task, series=series, index=index, value=value, warmup=warmup)
    line = encode_line(sample)
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line, type=Event) == sample


@settings(deadline=None)
@given(st.text(max_size=200))
def test_notes_round_trip_on_one_line(message: str) -> None:
    line = encode_line(Note(message=message))
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line, type=Event) == Note(message=message)


@settings(deadline=None)
@given(st.text(alphabet="ab./\\\0 ~-", max_size=12))
def test_accepted_paths_stay_inside(path: str) -> None:
    try:
        check_relative(path)
    except ValueError:
        return
    inside = Path("/base/folder")
    assert (inside / path).resolve().is_relative_to(inside)
    assert (inside / path).resolve() != inside


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_mean_and_stderr_are_the_textbook_ones(samples: list[float]) -> None:
    m = Measurement(metric="m", unit="ms", samples=samples, higher_is_better=True, provenance="host")
    assert m.mean == pytest.approx(statistics.fmean(samples), abs=1e-6)
    assert m.stderr == pytest.approx(statistics.stdev(samples) / math.sqrt(len(samples)), abs=1e-6)


def test_one_sample_has_no_error_bar() -> None:
    m = Measurement(metric="m", unit="ms", samples=[1.0], higher_is_better=True, provenance="host")
    assert math.isnan(m.stderr)


def test_read_record_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=r"cannot read .*nowhere.json"):
        read_record(tmp_path / "nowhere.json", Job)


def test_write_atomic_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(SlimpiError, match="cannot write"):
        write_atomic(tmp_path / "taken", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
