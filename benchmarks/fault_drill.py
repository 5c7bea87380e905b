"""What is lost when things break? `make fault-drill` breaks them and counts.

    python benchmarks/fault_drill.py [--only NAME] [--kills 200] [--drops 50] [--files 100] [--cuts 40] ... [--seed 0]

Each drill disturbs the agent or the depot in one way, lets the job come to its end, and compares every sample with
an undisturbed run. Exit code 1 if one sample was lost, doubled or changed, or one corrupted file accepted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drill_links import dropped_links
from drill_runs import (
    AGENT,
    REPO,
    TIMEOUT_S,
    Bench,
    Tally,
    audit,
    finish,
    in_folder,
    make_bench,
    read_samples,
    said_samples,
    start_agent,
)

from device.records import encode

LANES = 3
RUN_S = 3.0
"""Kills fall evenly into this many seconds after an agent's start: before, in and after its samples."""

CLOCK_JUMPS = """
import random, time
real = time.time
time.time = lambda: real() + random.uniform(-1e8, 1e8)
"""


@dataclass(frozen=True)
class Drill:
    """`run(bench, root, count, seed)` injects `count` faults in a folder of its own."""

    run: Callable[[Bench, Path, int, int], Tally]
    option: str
    count: int


def kills(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    """kill -9 of the agent or its worker at random moments, until the job is through; then the next job."""
    shares = [count // LANES + (lane < count % LANES) for lane in range(LANES)]
    with ThreadPoolExecutor(LANES) as pool:
        lanes = [pool.submit(_kill_lane, bench, root / str(i), n, seed + i) for i, n in enumerate(shares)]
        return sum((lane.result() for lane in lanes), Tally())


def _kill_lane(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    root.mkdir()
    chance = random.Random(seed)
    tally, killed = Tally(), 0
    for number in range(10 * count):
        if killed >= count:
            break
        job = in_folder(bench, root / str(number))
        told: list[Path] = []
        over = False
        while not over and killed < count:
            told.append(root / f"{number}-{len(told)}.jsonl")
            agent = start_agent(job, told[-1])
            with suppress(subprocess.TimeoutExpired):
                over = agent.wait(chance.uniform(0, RUN_S)) == 0
            if not over:
                hit, problem = _kill(agent, chance.choice(("agent", "worker")))
                killed += hit
                tally += Tally(faults=hit, runs=1, other=(problem,) if problem else ())
        told.append(root / f"{number}-last.jsonl")
        tally += finish(job, told[-1]) + audit(bench, job, [said_samples(events) for events in told])
        shutil.rmtree(root / str(number))
    return tally


def _kill(agent: subprocess.Popen[bytes], victim: str) -> tuple[int, str]:
    """1 if something was killed, and what was wrong afterwards. Before there is a worker, the agent is the victim."""
    if agent.poll() is not None:
        return 0, ""
    workers = [pid for pid in _children(agent.pid) if b"device.worker" in _command(pid)]
    with suppress(ProcessLookupError):
        os.kill(workers[0] if victim == "worker" and workers else agent.pid, signal.SIGKILL)
    try:
        agent.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        agent.kill()
        return 1, f"the agent hung after its {victim} was killed"
    deadline_s = time.monotonic() + 10
    while left := [pid for pid in workers if b"device.worker" in _command(pid)]:
        if time.monotonic() > deadline_s:
            return 1, f"worker {left} outlived its agent"
        time.sleep(0.02)
    return 1, ""


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _command(pid: int) -> bytes:
    """A process's command line; empty once it has ended, even if nobody has waited for it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def power_cuts(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    """The journal as a power cut leaves it: an arbitrary prefix, sometimes with the zeros of blocks never written."""

    def cut(number: int) -> Tally:
        chance = random.Random(seed * 100_003 + number)
        length = chance.randrange(len(bench.journal) + 1)
        left = bench.journal[:length] + b"\0" * (chance.choice((0, 0, 1, 512)) if length else 0)
        job = in_folder(bench, root / str(number))
        (root / str(number)).mkdir()
        (root / str(number) / "journal.jsonl").write_bytes(left)
        kept, _ = read_samples(bench.journal[:length])
        events = root / f"{number}.jsonl"
        return Tally(faults=1) + finish(job, events) + audit(bench, job, [kept, said_samples(events)])

    with ThreadPoolExecutor(LANES) as pool:
        return sum(pool.map(cut, range(count)), Tally())


def full_disks(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    """No room for the journal at a random size (RLIMIT_FSIZE; every other time a small tmpfs, where root may mount)."""
    tally = Tally()
    for number in range(count):
        chance = random.Random(seed * 100_003 + number)
        room = chance.randrange(1, len(bench.journal) * 4 // 5)
        small = root / f"{number}.small"
        small.mkdir()
        mounted = bool(number % 2) and _mount(small, room)
        done = subprocess.run(
            [*AGENT, "-"],
            input=encode(in_folder(bench, small / "work")),
            cwd=REPO,
            capture_output=True,
            timeout=TIMEOUT_S,
            preexec_fn=None if mounted else lambda n=room: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)),
        )
        if (small / "work").exists():
            shutil.copytree(small / "work", root / str(number))  # to a larger disk, as a user goes on
        if mounted:
            subprocess.run(["umount", str(small)], check=True)
        words = done.stderr.decode(errors="replace")
        if done.returncode != 1 or words.count("\n") != 1 or "Traceback" in words:
            tally += Tally(other=(f"with room for {room} bytes the agent ended with {done.returncode}: {words!r}",))
        job, events = in_folder(bench, root / str(number)), root / f"{number}.jsonl"
        events.write_bytes(done.stdout)
        tally += Tally(faults=1, runs=1) + finish(job, events) + audit(bench, job, [said_samples(events)])
    return tally


def _mount(folder: Path, room: int) -> bool:
    size = f"size={room // 1024 + 8}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0


def clock_jumps(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    """The wall clock jumps by up to three years whenever it is read, in the agent and in its workers."""
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(CLOCK_JUMPS)
    tally = Tally()
    for number in range(count):
        job, events = in_folder(bench, root / str(number)), root / f"{number}.jsonl"
        begin_s = time.monotonic()
        tally += Tally(faults=1) + finish(job, events, {"PYTHONPATH": str(root / "site")})
        took_s = time.monotonic() - begin_s
        tally += audit(bench, job, [said_samples(events)])
        for result in json.loads((root / str(number) / "report.json").read_bytes())["results"]:
            jumped_s = result["facts_after"]["time_unix_s"] - result["facts_before"]["time_unix_s"]
            if abs(jumped_s) < took_s:
                tally += Tally(other=("the clock did not jump",))
            times = [point["time_s"] for point in result["trace"]]
            if not 0 < result["duration_s"] < took_s or times != sorted(times) or any(t < 0 for t in times):
                tally += Tally(other=(f"a duration of {result['duration_s']} s or a trace at {times} in {took_s} s",))
    return tally


def corrupted_files(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    """Uploads and stored files with flipped, missing, added or zeroed bytes: the depot and the agent must see each."""
    chance = random.Random(seed)
    home = root / "home"
    (home / "incoming").mkdir(parents=True)
    accepted = 0
    uploads = []
    for _ in range(count - count // 2):
        data = chance.randbytes(chance.randrange(1, 200_000))
        digest = hashlib.sha256(data).hexdigest()
        (home / "incoming" / digest).write_bytes(_corrupt(data, chance, may_resize=True))
        uploads.append([digest, len(data)])
    said = _depot(home, "admit", {"files": uploads})
    accepted += len(said["admitted"]) + len(list((home / "store").iterdir()))
    model = Path(bench.job.artifact_dir) / bench.job.artifact.entry
    for number in range(count // 2):
        folder = root / str(number)
        folder.mkdir()
        (folder / model.name).write_bytes(_corrupt(model.read_bytes(), chance, may_resize=False))
        job = json.loads(encode(in_folder(bench, root / f"work-{number}"))) | {"artifact_dir": str(folder)}
        done = subprocess.run([*AGENT, "-"], input=json.dumps(job).encode(), capture_output=True, cwd=REPO)
        accepted += not (done.returncode == 1 and b"has sha256" in done.stderr and not done.stdout)
        shutil.rmtree(folder)
    return Tally(faults=count, runs=1 + count // 2, corrupted_accepted=accepted)


def _corrupt(data: bytes, chance: random.Random, may_resize: bool) -> bytes:
    """The same bytes with one thing wrong, as links, cards and half-finished copies do it; never equal to `data`."""
    while True:
        at = chance.randrange(len(data))
        wrong = {
            "flipped": data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :],
            "zeroed": data[:at] + b"\0" * len(data[at : at + 512]) + data[at + 512 :],
            "shifted": data[at:] + data[:at],
            "added": data[:at] + b"\n" + data[at:],
            "missing": data[:at] + data[at + 1 :],
        }
        result = wrong[chance.choice(list(wrong) if may_resize else ["flipped", "zeroed", "shifted"])]
        if result != data:
            return result


def truncated_uploads(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    """Uploads cut at a random byte: never admitted, told as partial, resumed from there, then admitted whole."""
    chance = random.Random(seed)
    home = root / "home"
    (home / "incoming").mkdir(parents=True)
    files = {}
    for _ in range(count):
        data = chance.randbytes(chance.randrange(2, 300_000))
        digest = hashlib.sha256(data).hexdigest()
        files[digest] = data, chance.randrange(1, len(data))
        (home / "incoming" / digest).write_bytes(data[: files[digest][1]])
    wanted = [[digest, len(data)] for digest, (data, _) in files.items()]
    first = _depot(home, "admit", {"files": wanted})
    partial = _depot(home, "status", {"want": wanted})["partial"]
    for digest, (data, _) in files.items():
        with (home / "incoming" / digest).open("ab") as out:
            out.write(data[partial[digest] :])
    second = _depot(home, "admit", {"files": wanted})
    wrong = sum((home / "store" / digest).read_bytes() != data for digest, (data, _) in files.items())
    other = []
    if partial != {digest: cut for digest, (_, cut) in files.items()} or len(second["admitted"]) != count:
        other.append(f"{len(partial)} of {count} uploads could be resumed, {len(second['admitted'])} were admitted")
    return Tally(faults=count, runs=3, corrupted_accepted=len(first["admitted"]) + wrong, other=tuple(other))


def link_drops(bench: Bench, root: Path, count: int, seed: int) -> Tally:
    """The connection to a device is cut while it measures (a real sshd on loopback, the whole deployment over it)."""
    drill = dropped_links(count, seed)
    other = (f"{drill.jobs} jobs gave {drill.samples} samples",) if not drill.samples else ()
    return Tally(drill.drops, drill.jobs, drill.lost, drill.doubled, drill.wrong, other=other)


def _depot(home: Path, command: str, request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(REPO / "device" / "depot.py"), command],
        input=json.dumps(request).encode(),
        env={**os.environ, "SLIMPI_DEVICE_HOME": str(home)},
        capture_output=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


DRILLS = {
    # name: what is broken, the option that says how often, how often by default
    "kill -9 of agent or worker": Drill(kills, "kills", 200),
    "dropped links": Drill(link_drops, "drops", 50),
    "power cut in the journal": Drill(power_cuts, "cuts", 40),
    "full disk": Drill(full_disks, "disks", 8),
    "wall clock jumps": Drill(clock_jumps, "jumps", 4),
    "corrupted files": Drill(corrupted_files, "files", 100),
    "truncated uploads": Drill(truncated_uploads, "uploads", 50),
}

COLUMNS = ("faults", "runs", "samples_lost", "samples_doubled", "samples_changed", "corrupted_accepted")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, drill in DRILLS.items():
        parser.add_argument(f"--{drill.option}", type=int, default=drill.count, help=f"{name} (default {drill.count})")
    parser.add_argument("--only", choices=[drill.option for drill in DRILLS.values()], action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    chosen = {n: d for n, d in DRILLS.items() if not options.only or d.option in options.only}
    clean = True
    print(f"{'drill':28}" + "".join(f"{column.replace('_', ' '):>20}" for column in COLUMNS) + f"{'seconds':>10}")
    with tempfile.TemporaryDirectory(prefix="slimpi-drill-") as scratch:
        bench = make_bench(Path(scratch) / "bench")
        for name, drill in chosen.items():
            root = Path(scratch) / drill.option
            root.mkdir()
            begin_s = time.monotonic()
            tally = drill.run(bench, root, getattr(options, drill.option), options.seed)
            counts = "".join(f"{getattr(tally, column):>20}" for column in COLUMNS)
            print(f"{name:28}{counts}{time.monotonic() - begin_s:>10.0f}", flush=True)
            for problem in tally.other:
                print(f"  {problem}")
            clean &= tally.is_clean
            shutil.rmtree(root)
    print(f"{len(bench.whole)} samples a run. {'Nothing was lost.' if clean else 'SOMETHING WAS LOST.'}")
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
