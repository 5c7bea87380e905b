"""The journal: what it holds survives torn and damaged lines, full disks and foreign files."""

from __future__ import annotations

import resource
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from fakes import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device import facts
from device.journal import Journal
from device.records import SlimpiError
from device.results import Event, Note, Sample, TaskStarted
from device.schema import Job, Perplexity, Throughput


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    world = World.make(tmp_path_factory.mktemp("world"))
    return world.job("gguf", [Perplexity(dataset=world.dataset("text.txt"), n_ctx=32)])


def sample(index: int, series: str = "nll", task: int = 0) -> Sample:
    return Sample(task=task, series=series, index=index, value=index / 7, warmup=False)


def filled(folder: Path, job: Job, count: int) -> Path:
    with Journal(folder, job) as journal:
        journal.append(sample(i) for i in range(count))
    return folder / "journal.jsonl"


def indices(journal: Journal) -> list[int]:
    return [s.index for s in journal.samples.get(0, {}).get("nll", [])]


def test_what_is_appended_is_read_back(tmp_path: Path, job: Job) -> None:
    events: list[Event] = [
        TaskStarted(task=0, name="perplexity", total=3, facts=facts.collect()),
        sample(0),
        Note(message="half\nway"),
        sample(0, "other"),
        sample(1),
    ]
    with Journal(tmp_path, job) as journal:
        journal.append(events[:2])
        journal.append(events[2:])
    with Journal(tmp_path, job) as journal:
        assert journal.samples == {0: {"nll": [events[1], events[4]], "other": [events[3]]}}
        assert journal.notes == []


def test_every_way_to_tear_the_last_line_costs_only_that_line(tmp_path: Path, job: Job) -> None:
    path = filled(tmp_path, job, 3)
    whole = path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        with Journal(tmp_path, job) as journal:
            assert indices(journal) == [0, 1]
            assert len(journal.notes) == (length > last)
            journal.append([sample(2)])
        assert path.read_bytes() == whole


def test_every_flipped_byte_is_seen_and_what_comes_after_is_dropped(tmp_path: Path, job: Job) -> None:
    path = filled(tmp_path, job, 4)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(lines[0]) + len(lines[1])
    for at in range(start, start + len(lines[2]) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with Journal(tmp_path, job) as journal:
            assert indices(journal) == [0]
            assert "dropped" in journal.notes[0]
            assert "line 3" in journal.notes[0]
        with Journal(tmp_path, job) as journal:
            assert (indices(journal), journal.notes) == ([0], [])


def test_a_sample_that_cannot_follow_is_damage(tmp_path: Path, job: Job) -> None:
    path = filled(tmp_path, job, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1], lines[1], lines[2], lines[3]]))
    with Journal(tmp_path, job) as journal:
        assert indices(journal) == [0]


def test_torn_first_line_starts_anew(tmp_path: Path, job: Job) -> None:
    path = filled(tmp_path, job, 0)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        Journal(tmp_path, job).__exit__(None, None, None)
        assert path.read_bytes() == whole


def test_journal_of_another_job_is_refused_and_left_alone(tmp_path: Path, job: Job) -> None:
    path = filled(tmp_path, job, 2)
    before = path.read_bytes()
    replace = msgspec.structs.replace
    others = [replace(job, id="other"), replace(job, threads=2), replace(job, tasks=[Throughput()])]
    for other in others:
        with pytest.raises(SlimpiError, match="belongs to job job-1 with other content"):
            Journal(tmp_path, other)
    assert path.read_bytes() == before
    with Journal(tmp_path, replace(job, timeout_s=5)) as journal:
        assert indices(journal) == [0, 1]


@pytest.mark.parametrize("data", [b"a letter\n", b"a letter", b"{}\n", b'{"crc":0,"event":{}}\n', b"\0" * 4096])
def test_foreign_files_are_refused_and_left_alone(tmp_path: Path, job: Job, data: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    with pytest.raises(SlimpiError, match="not a journal of slimpi"):
        Journal(tmp_path, job)
    assert path.read_bytes() == data


def test_journal_of_another_version_is_refused(tmp_path: Path, job: Job) -> None:
    path = filled(tmp_path, job, 1)
    event = b'{"event":"journal","schema":2,"job_id":"job-1","work_sha256":"' + b"0" * 64 + b'"}'
    path.write_bytes(b'{"crc":%d,"event":%s}\n' % (zlib.crc32(event), event))
    with pytest.raises(SlimpiError, match="schema"):
        Journal(tmp_path, job)


def test_second_agent_in_the_same_folder_is_refused(tmp_path: Path, job: Job) -> None:
    with Journal(tmp_path, job), pytest.raises(SlimpiError, match="another agent is working in"):
        Journal(tmp_path, job)
    Journal(tmp_path, job).__exit__(None, None, None)


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: write(2) then fails as on a full disk, short write first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_names_the_file_and_keeps_what_was_written(tmp_path: Path, job: Job) -> None:
    path = filled(tmp_path, job, 3)
    before = path.read_bytes()
    with Journal(tmp_path, job) as journal:
        with file_size_limit(len(before) + 10), pytest.raises(SlimpiError, match=r"jsonl: File too large. Free"):
            journal.append([sample(3)])
        assert path.read_bytes() == before, "no torn line may stay"
        assert indices(journal) == [0, 1, 2]
        journal.append([sample(3)])
    with Journal(tmp_path, job) as journal:
        assert indices(journal) == [0, 1, 2, 3]


events_strategy = st.lists(
    st.one_of(
        st.builds(Note, message=st.text(max_size=50)),
        st.builds(
            Sample,
            task=st.integers(0, 2),
            series=st.text(min_size=1, max_size=5),
            index=st.just(0),
            value=st.floats(allow_nan=False, allow_infinity=False),
            warmup=st.booleans(),
        ),
    ),
    max_size=12,
    unique_by=lambda e: (e.task, e.series) if isinstance(e, Sample) else id(e),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events_strategy, cut=st.integers(0, 3000), noise=st.binary(max_size=40))
def test_any_prefix_with_any_noise_reads_as_a_prefix(
    tmp_path: Path, job: Job, events: list[Event], cut: int, noise: bytes
) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    with Journal(tmp_path, job) as journal:
        journal.append(events)
    whole = path.read_bytes()
    left = whole[: max(whole.index(b"\n") + 1, cut)] + noise
    path.write_bytes(left)
    Journal(tmp_path, job).__exit__(None, None, None)
    expected = b""
    for line in whole.splitlines(keepends=True):
        if not left.startswith(expected + line):
            break
        expected += line
    assert path.read_bytes() == expected


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_random_bytes_give_nothing_but_slimpi_errors(tmp_path: Path, job: Job, data: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    try:
        with Journal(tmp_path, job) as journal:
            assert journal.samples == {}
    except SlimpiError:
        assert path.read_bytes() == data
