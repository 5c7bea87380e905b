"""The depot's jobs: the agent started apart from the link, told of, stopped. Standard library only.

A job runs exactly as long as jobs/<id>/lock is held: the supervisor and the agent hold it, the kernel lets go of it
when both are gone, so nothing goes stale after a crash or a power cut.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device.depot_base import PLAIN, DepotError, check, file_size, is_inside, read_text, short, write_whole

HEARTBEAT_S = 5.0
POLL_S = 0.1
STOP_GRACE_S = 10.0
LOCK_PATIENCE_S = 1.0  # whoever only looks whether a job runs holds its lock for microseconds
QUOTED_BYTES, QUOTED_LINES = 4000, 20


def start(root: Path, job: dict[str, Any], pythonpath: list[Any], again: bool) -> dict[str, Any]:
    """Run `python3 -m device job.json` apart from this process and its link; nothing if it runs already.

    Its stdout goes to jobs/<id>/events.jsonl, emptied first, its stderr to agent.err, its exit code to exit. Without
    `again` it goes on where it ended; with it, the job's work folder is removed first. The job's three folders and
    pythonpath must lie in the depot.
    """
    folder = root / "jobs" / check(PLAIN, job.get("id"), "a job's id")
    for path in [*pythonpath, *(job.get(name) for name in ("artifact_dir", "data_dir", "work_dir"))]:
        if not isinstance(path, str) or os.pathsep in path or "\0" in path or not is_inside(root, Path(path)):
            raise DepotError(f"path {short(path)} is not inside {root}. Take the one `status` and `place` tell")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not _take_lock(lock):
            return {"state": "running"}
        if again and (folder / "work").exists():
            shutil.rmtree(folder / "work")
        os.ftruncate(lock, 0)
        (folder / "exit").unlink(missing_ok=True)
        write_whole(folder / "job.json", json.dumps(job).encode())
        _detach(folder, lock, [str(path) for path in pythonpath])
    finally:
        os.close(lock)
    return {"state": "started"}


def follow(root: Path, job: str, offset: int) -> Iterator[bytes]:
    """The whole lines of events.jsonl from byte `offset` on, as they come, until the agent has ended and all is said;
    then {"follow": "ended", "exit": its code or null if it left none (power cut, SIGKILL), "stderr": its last lines}.
    {"follow": "alive"} after HEARTBEAT_S of silence; it is not part of the file, so it does not count in the offset."""
    folder = root / "jobs" / check(PLAIN, job, "a job's id")
    if offset < 0 or offset > max(0, file_size(folder / "events.jsonl")) or not (folder / "job.json").exists():
        raise DepotError(f"job {job} has no events at offset {offset}. Start it, and follow it from 0")
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)  # POLLERR and POLLHUP: the reader is gone
    said_s = time.monotonic()
    ended = False
    while not ended:
        ended = not is_running(folder)  # looked at before reading: what is written until then is read
        if file_size(folder / "events.jsonl") < offset:
            raise DepotError(f"job {job} was started anew. Follow it from 0")
        while lines := _whole_lines(folder / "events.jsonl", offset):
            offset += len(lines)
            said_s = time.monotonic()
            yield lines
        if not ended and time.monotonic() - said_s >= HEARTBEAT_S:
            said_s = time.monotonic()
            yield b'{"follow": "alive"}\n'
        if not ended and watch.poll(POLL_S * 1000):
            return
    code = read_text(folder / "exit").strip()
    words = read_text(folder / "agent.err")[-QUOTED_BYTES:].splitlines()[-QUOTED_LINES:]
    last = {"follow": "ended", "exit": int(code) if re.fullmatch(r"-?\d{1,3}", code) else None}
    yield json.dumps(last | {"stderr": "\n".join(words)}).encode() + b"\n"


def stop(root: Path, job: str | None) -> dict[str, Any]:
    """End one running job, or all; its journal stays. Comes back when nothing of it runs any more."""
    names = running(root) if job is None else [check(PLAIN, job, "a job's id")]
    stopped = [name for name in names if is_running(root / "jobs" / name)]
    deadline_s = time.monotonic() + STOP_GRACE_S
    last_s = deadline_s + STOP_GRACE_S
    sent: set[tuple[int, int]] = set()
    while left := [name for name in stopped if is_running(root / "jobs" / name)]:
        number = signal.SIGTERM if time.monotonic() < deadline_s else signal.SIGKILL
        for name in left:
            pid = _agent_pid(root / "jobs" / name)
            if pid and (pid, number) not in sent:
                sent.add((pid, number))
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
        if time.monotonic() > last_s:
            raise DepotError(f"{', '.join(left)} did not end, not even on SIGKILL. Look at `ps` on the device")
        time.sleep(POLL_S)
    return {"stopped": stopped}


def running(root: Path) -> list[str]:
    return sorted(folder.name for folder in (root / "jobs").iterdir() if is_running(folder))


def is_running(folder: Path) -> bool:
    """Whether the agent holds the job's lock: that ends with its process, however it ended."""
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def _detach(folder: Path, lock: int, pythonpath: list[str]) -> None:
    """Fork the supervisor; comes back when the agent runs, or raises what kept it from running."""
    ready, tell = os.pipe()
    if os.fork():
        os.close(tell)
        with os.fdopen(ready) as pipe:
            if problem := pipe.read():
                raise DepotError(f"cannot start the agent: {problem}")
        return
    try:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nowhere, number)
        try:
            agent = _spawn(folder, lock, pythonpath)
            os.pwrite(lock, f"{agent.pid} {_started_ticks(agent.pid)}".encode(), 0)
        except OSError as error:
            os.write(tell, f"{error.filename}: {error.strerror}".encode())
            return
        os.close(tell)
        code = agent.wait()
        with contextlib.suppress(OSError):  # a full disk: `follow` then says that the code is not known
            write_whole(folder / "exit", str(code).encode())
    finally:
        os._exit(0)


def _spawn(folder: Path, lock: int, pythonpath: list[str]) -> subprocess.Popen[bytes]:
    """The agent, with nothing importable but what was sent; it holds the lock too, in case the supervisor dies."""
    paths = pythonpath or [str(Path(__file__).resolve().parents[1])]  # without wheels: what this Python has itself
    safe = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
    environment = {**os.environ, **safe}
    with (folder / "events.jsonl").open("wb") as events, (folder / "agent.err").open("wb") as errors:
        fcntl.fcntl(events, fcntl.F_SETFL, os.O_APPEND)
        return subprocess.Popen(
            [sys.executable, "-m", "device", str(folder / "job.json")],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=events,
            stderr=errors,
            env=environment,
            process_group=0,
            pass_fds=[lock],
        )


def _take_lock(lock: int) -> bool:
    deadline_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.01)
        else:
            return True


def _agent_pid(folder: Path) -> int | None:
    """The agent's process (and group), if the one of that number is still the one that was started."""
    pid, _, ticks = read_text(folder / "lock").partition(" ")
    return int(pid) if pid.isdigit() and ticks and _started_ticks(int(pid)) == ticks else None


def _started_ticks(pid: int) -> str:
    """Field 22 of /proc/PID/stat; the command's name, which may hold anything, ends at the last parenthesis."""
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _whole_lines(path: Path, offset: int) -> bytes:
    with path.open("rb") as handle:
        handle.seek(offset)
        data = handle.read(1 << 20)
        while data and b"\n" not in data and (more := handle.read(1 << 20)):
            data += more
    return data[: data.rfind(b"\n") + 1]
