"""Memory limits, the out-of-memory killer, and disks that take no more: a recorded failure, and the job goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fakes import World
from jobs import REPO, long_perplexity, run

from device import agent, journal, records
from device.journal import Journal
from device.process import Worker
from device.records import SlimpiError, encode, read_record
from device.results import Event, Report, Sample
from device.schema import Perplexity, Throughput
from device.wire import Request

MB = 1_000_000
# A context whose KV cache alone takes 128 bytes a token: 2 layers of 2 heads of 8 values, keys and values, F16.
HUGE = Throughput(n_prompt=20_000_000, n_gen=4, repetitions=1)


pytestmark = pytest.mark.usefixtures("quick_facts")


def small(world: World) -> Perplexity:
    return Perplexity(dataset=world.dataset("text.txt"), n_ctx=32, n_chunks=3)


def test_a_task_over_its_memory_limit_fails_and_the_next_goes_on(world: World) -> None:
    job = world.job("gguf", [HUGE, small(world)], memory_limit_bytes=1000 * MB)
    huge, fine = run(job)[0].results
    assert (huge.status, fine.status) == ("failed", "ok")
    assert "out of memory" in huge.error or "cannot make a context" in huge.error or "SIGABRT" in huge.error
    assert 10 * MB < huge.worker_peak_rss_bytes < 1200 * MB


def test_a_limit_that_leaves_nothing_is_told(world: World) -> None:
    """So small that Python itself runs out: a MemoryError, a failed import, or an abort, but never silence."""
    (result,) = run(world.job("gguf", [small(world)], memory_limit_bytes=25 * MB))[0].results
    assert result.status == "failed"
    assert "memory" in result.error.lower()


def test_a_mapped_model_does_not_count(world: World) -> None:
    """The limit is of anonymous memory: a GGUF far larger than it, mapped, still loads."""
    path = world.root / "lm" / "model.gguf"
    with path.open("r+b") as model:
        model.truncate(path.stat().st_size + 600 * MB)  # what follows the tensors is mapped with them
    (result,) = run(world.job("gguf", [small(world)], memory_limit_bytes=400 * MB))[0].results
    assert (result.status, result.error) == ("ok", "")


def test_the_worker_offers_itself_to_the_oom_killer_and_the_agent_does_not(world: World) -> None:
    seen: list[tuple[int, int]] = []

    def look(event: Event) -> None:
        if isinstance(event, Sample) and not seen:
            (child,) = psutil.Process().children()
            scores = [Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in (child.pid, os.getpid())]
            seen.append((int(scores[0]), int(scores[1])))

    own = int(Path("/proc/self/oom_score_adj").read_text())
    agent.run(world.job("gguf", [long_perplexity(world)]), look)
    assert seen == [(1000, own)]


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A cgroup with so much memory, swap included, whichever version this machine has; skips where none may be made."""
    memory_and_swap = "memory.memsw.limit_in_bytes"  # there only where the kernel counts swap, as the other
    for root, file, swap, most in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", memory_and_swap, str(limit_bytes)),
        ("/sys/fs/cgroup", "memory.max", "memory.swap.max", "0"),
    ):
        folder = Path(root) / f"slimpi-test-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / file).write_text(str(limit_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        with contextlib.suppress(OSError):
            (folder / swap).write_text(most)
        try:
            yield folder
        finally:
            folder.rmdir()
        return
    pytest.skip("making a memory cgroup needs root")


def test_the_kernel_kills_the_worker_and_the_agent_records_it(world: World) -> None:
    job = world.job("gguf", [HUGE, small(world)])
    path = world.root / "job.json"
    path.write_bytes(encode(job))
    join = "import os,sys; open(sys.argv[1], 'w').write('0'); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    with memory_cgroup(600 * MB) as group:
        done = subprocess.run(
            [sys.executable, "-c", join, str(group / "cgroup.procs"), "-m", "device", str(path)],
            cwd=REPO,
            capture_output=True,
            timeout=120,
        )
    assert done.returncode == agent.EXIT_SOME_FAILED, done.stderr.decode()
    killed, fine = read_record(Path(job.work_dir) / "report.json", Report).results
    assert (killed.status, fine.status) == ("failed", "ok")
    assert "killed by SIGKILL (often: out of memory), peak resident memory" in killed.error
    assert 300 * MB < killed.worker_peak_rss_bytes < 700 * MB
    assert killed.memory is None


def test_a_killed_workers_peak_is_known(world: World) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, Sample) and event.index == 3:
            for child in psutil.Process().children():
                child.send_signal(signal.SIGKILL)

    result = agent.run(world.job("gguf", [long_perplexity(world)]), kill).results[0]
    assert result.status == "failed"
    assert result.worker_peak_rss_bytes > 10 * MB
    assert result.trace[0].worker_rss_bytes > 0


def test_leaving_a_worker_that_has_just_ended_is_no_error(world: World) -> None:
    """Found by the fault drill: the journal failed while the worker, already through, had not been waited for."""
    job = world.job("gguf", [small(world)])
    request = Request(job=job, index=0, done={}, agent_pid=os.getpid())
    Path(job.work_dir).mkdir()
    with Worker(request, Path(job.work_dir) / "task-0.log") as worker:
        for _ in worker.messages():
            while psutil.Process(worker.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
            break
    assert worker.peak_rss_bytes > 0


def test_events_that_cannot_be_written_end_the_agent_with_one_line(world: World) -> None:
    """stdout is a file on a full disk: what was journaled stays, and another run goes on from it."""
    job = world.job("gguf", [long_perplexity(world)])
    path = world.root / "job.json"
    path.write_bytes(encode(job))
    argv = [sys.executable, "-m", "device", str(path)]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(argv, cwd=REPO, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == agent.EXIT_ERROR
    assert done.stderr.count(b"\n") == 1
    assert b"cannot write events: No space left on device" in done.stderr
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(argv, cwd=REPO, stdout=full, stderr=full)
    assert done.returncode == agent.EXIT_ERROR


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_failing_card_is_named(world: World, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    job = world.job("gguf", [small(world)])

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with Journal(Path(job.work_dir), job) as open_journal:
        monkeypatch.setattr(journal.os, "fsync", fail)
        with pytest.raises(SlimpiError, match=r"journal\.jsonl: .*(Input/output|Read-only).*check it \(dmesg\)"):
            open_journal.append([Sample(task=0, series="nll", index=0, value=1.0)])
    with pytest.raises(SlimpiError, match=r"cannot write .*report\.json: .*check it \(dmesg\)"):
        records.write_atomic(world.root / "report.json", b"{}")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(SlimpiError, match=r"cannot read .*journal\.jsonl: .*check it"):
        Journal(Path(job.work_dir), job)


def test_a_read_only_disk_is_one_line(world: World) -> None:
    work = world.root / "ro"
    work.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(work)]).returncode:
        pytest.skip("mounting a read-only tmpfs needs root")
    try:
        job = world.job("gguf", [small(world)], work_dir=str(work / "work"))
        data = encode(job)
        done = subprocess.run([sys.executable, "-m", "device"], cwd=REPO, input=data, capture_output=True, timeout=60)
    finally:
        subprocess.run(["umount", str(work)], check=True)
    assert done.returncode == agent.EXIT_ERROR
    assert done.stderr.count(b"\n") == 1
    assert b"Read-only file system" in done.stderr
