"""The depot's jobs: apart from the link, followed, stopped, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import depots
import msgspec
import psutil
import pytest
from depots import DEPOT, Depot, processes_of

from device import depot_base, depot_jobs
from device.records import encode
from device.results import Done, Event


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Depot]:
    yield from depots.in_folder(tmp_path / "home")


def test_a_job_runs_apart_and_is_followed_to_its_end(device: Depot, tmp_path: Path) -> None:
    job = device.job(tmp_path)
    assert device.start(job) == "started"
    events, last = device.follow("job-1")
    assert last == {"follow": "ended", "exit": 0, "stderr": ""}
    decoded = [msgspec.json.decode(line, type=Event) for line in events.splitlines()]
    assert isinstance(decoded[-1], Done)
    assert decoded[-1].report.results[0].status == "ok"
    half = events.splitlines(keepends=True)[0]
    assert device.follow("job-1", len(half))[0] == events[len(half) :]
    assert device.follow("job-1", len(events)) == (b"", last)
    assert "no events at offset" in device.refused("follow", job="job-1", offset=len(events) + 1)
    assert device.start(job) == "started"  # replayed from the journal, not measured again
    assert device.follow("job-1")[0].count(b'"event":"sample"') == 0
    assert device.start(job, again=True) == "started"
    assert device.follow("job-1")[0].count(b'"event":"sample"') > 0
    assert "not inside" in device.refused("start", job={**json.loads(encode(job)), "work_dir": "/tmp"}, pythonpath=[])
    assert processes_of(device.home) == []


def test_a_bad_job_ends_with_the_agents_own_line(device: Depot) -> None:
    inside = {name: str(device.home / "x") for name in ("artifact_dir", "data_dir", "work_dir")}
    assert device("start", job={"id": "j", **inside}, pythonpath=[])["state"] == "started"
    _, last = device.follow("j")
    assert last["exit"] == 1
    assert "is not a valid Job" in last["stderr"]


def follower(device: Depot) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*DEPOT, "follow"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=device.environment
    )
    assert process.stdin and process.stdout
    process.stdin.write(b'{"job": "job-1"}')
    process.stdin.close()
    return process


def test_a_running_job_is_followed_twice_refuses_clean_and_stops(device: Depot, tmp_path: Path) -> None:
    job = device.job(tmp_path, repeat=1500, n_ctx=8)
    assert device.start(job) == "started"
    assert device.start(job) == "running"
    watching = follower(device)
    assert watching.stdout
    while b'"event":"sample"' not in watching.stdout.readline():
        assert watching.poll() is None
    assert device("status")["running"] == ["job-1"]
    assert "running: job-1" in device.refused("clean", all=True)
    watching.stdout.close()  # a dropped link
    assert watching.wait(timeout=5) in (0, 1)
    assert device("status")["running"] == ["job-1"]
    assert device("stop", job="job-1") == {"stopped": ["job-1"]}
    assert processes_of(device.home) == []
    assert device("stop", job=None) == {"stopped": []}
    events, last = device.follow("job-1")
    assert last["exit"] == 130
    assert "run the same job again" in last["stderr"]
    seen = events.count(b'"event":"sample"')
    assert device.start(job) == "started"
    again = follower(device)
    assert again.stdout
    first = next(line for line in again.stdout if b'"event":"sample"' in line)
    assert json.loads(first)["index"] >= seen
    again.kill()
    again.wait()
    again.stdout.close()


def test_a_follower_of_a_silent_job_ends_when_its_reader_is_gone(device: Depot) -> None:
    lock = quiet_job(device)
    watching = follower(device)
    time.sleep(0.5)
    assert watching.poll() is None and watching.stdout
    watching.stdout.close()
    assert watching.wait(timeout=2) == 0
    os.close(lock)


def test_silence_is_broken_by_heartbeats(device: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = quiet_job(device)
    monkeypatch.setattr(depot_jobs, "HEARTBEAT_S", 0.2)
    lines = depot_jobs.follow(device.home, "job-1", 0)
    assert [next(lines), next(lines)] == [b'{"follow": "alive"}\n'] * 2
    os.close(lock)
    assert json.loads(next(lines)) == {"follow": "ended", "exit": None, "stderr": ""}


def quiet_job(device: Depot) -> int:
    """A job that runs as far as the depot can see: its lock is held."""
    device("status")
    folder = device.home / "jobs" / "job-1"
    folder.mkdir()
    for name in ("job.json", "events.jsonl"):
        (folder / name).touch()
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    assert depot_jobs._take_lock(lock)
    return lock


@pytest.mark.parametrize("victim", ["agent", "supervisor", "both"])
def test_killed_processes_leave_a_job_that_can_go_on(device: Depot, tmp_path: Path, victim: str) -> None:
    job = device.job(tmp_path, repeat=1500, n_ctx=8)
    device.start(job)
    watching = follower(device)
    assert watching.stdout
    while b'"event":"sample"' not in watching.stdout.readline():
        assert watching.poll() is None
    agent = depot_jobs._agent_pid(device.home / "jobs" / "job-1")
    assert agent
    supervisor = psutil.Process(agent).ppid()
    for name, pid in {"supervisor": supervisor, "agent": agent}.items():
        if victim in (name, "both"):
            os.kill(pid, signal.SIGKILL)
    if victim == "supervisor":
        time.sleep(0.3)
        assert device("status")["running"] == ["job-1"], "the agent lives on"
        assert device("stop", job="job-1") == {"stopped": ["job-1"]}
    last = json.loads(watching.stdout.read().splitlines()[-1])
    assert last["exit"] == (-9 if victim == "agent" else None)
    watching.stdout.close()
    watching.wait()
    assert device("status")["running"] == []
    deadline_s = time.monotonic() + 5
    while processes_of(device.home) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert processes_of(device.home) == []
    assert device.start(job) == "started"


def test_clean_keeps_what_was_measured_unless_told(device: Depot, tmp_path: Path) -> None:
    job = device.job(tmp_path)
    device.start(job)
    device.follow("job-1")
    (device.home / "mine.txt").write_text("not the depot's")
    said = device("clean", all=False)
    assert said["freed_bytes"] > 0
    assert said["left"] == ["jobs", "mine.txt"]
    assert (device.home / "jobs" / "job-1" / "work" / "report.json").exists()
    assert device("clean", all=True)["left"] == ["mine.txt"]
    (device.home / "mine.txt").unlink()
    device("clean", all=True)
    assert not device.home.exists()


def test_a_stream_that_begins_anew_is_not_followed_at_the_old_place(device: Depot) -> None:
    lock = quiet_job(device)
    events = device.home / "jobs" / "job-1" / "events.jsonl"
    events.write_bytes(b'{"a": 1}\n' * 3)
    lines = depot_jobs.follow(device.home, "job-1", 0)
    assert next(lines).count(b"\n") == 3
    events.write_bytes(b'{"b": 1}\n')
    with pytest.raises(depot_base.DepotError, match="started anew"):
        next(lines)
    os.close(lock)
