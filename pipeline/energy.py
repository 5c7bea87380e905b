"""Energy from power readings, the board's own or a meter's: never guessed, so what they do not cover stays unknown.

A meter is a CSV that the user's own logger writes, or a command that is run here once a second.
"""

from __future__ import annotations

import csv
import math
import re
import shlex
import subprocess
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from device.records import SlimpiError
from device.results import TaskResult, TracePoint

MAX_GAP_S = 10.0
PERIOD_S = 1.0
READING_TIMEOUT_S = 5.0
COLUMNS = ["time_unix_s", "watts"]
POWER_FOLDER = "power"
"""Where a host's power readings lie among its results, a CSV a run."""

_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?")

Reading = tuple[float, float]
"""A time in seconds and a power in watts."""


def parse_meter_csv(text: str, origin: str) -> list[Reading]:
    """A CSV with the header `time_unix_s,watts`, times rising; SlimpiError names the line that is not so."""
    lines = list(csv.reader(text.splitlines()))
    if not lines or [cell.strip() for cell in lines[0]] != COLUMNS:
        raise SlimpiError(f"{origin} starts with {text[:40]!r}, expected the header {','.join(COLUMNS)}. Add it.")
    readings: list[Reading] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            time_s, watts = (float(cell) for cell in line)
        except ValueError:
            raise SlimpiError(f"{origin} line {number} is {','.join(line)[:60]!r}, expected two numbers.") from None
        late = not readings or time_s > readings[-1][0]
        if not (math.isfinite(time_s) and math.isfinite(watts) and watts >= 0 and late):
            raise SlimpiError(f"{origin} line {number}: times must rise and watts be >= 0, got {time_s}, {watts}.")
        readings.append((time_s, watts))
    return readings


def of_trace(trace: Sequence[TracePoint]) -> list[Reading]:
    """The board's own readings in a task's trace, times from its start; empty where it has no sensor."""
    return [(point.time_s, point.power_w) for point in trace if point.power_w is not None]


def of_task_j(trace: Sequence[TracePoint], duration_s: float) -> float | None:
    """Joules of a whole task by the board's own readings, the first and last held to its ends; None without a sensor.
    SlimpiError where they leave a gap over MAX_GAP_S, at the ends too."""
    readings = of_trace(trace)
    if not readings:
        return None
    (first_s, first_w), (last_s, last_w) = readings[0], readings[-1]
    before = [(0.0, first_w)] if first_s > 0 else []
    after = [(duration_s, last_w)] if last_s < duration_s else []
    return energy_j([*before, *readings, *after], 0.0, duration_s)


def energy_j(readings: Sequence[Reading], begin_s: float, end_s: float) -> float:
    """Joules between two times by the trapezoidal rule, in the readings' own clock.

    SlimpiError if they start late, end early, or leave a gap over MAX_GAP_S in between.
    """
    if not begin_s < end_s:
        raise SlimpiError(f"energy from {begin_s} to {end_s} s: the end must come after the beginning.")
    times = [time_s for time_s, _ in readings]
    if not times or times[0] > begin_s or times[-1] < end_s:
        covered = f"{times[0]} to {times[-1]}" if times else "nothing"
        raise SlimpiError(
            f"the power readings cover {covered}, energy from {begin_s} to {end_s} s is asked for. "
            "Let the meter run from before the task to after it, its clock set like the device's."
        )
    first, last = bisect_right(times, begin_s) - 1, bisect_left(times, end_s)
    gap_s = max(later - earlier for earlier, later in pairwise(times[first : last + 1]))
    if gap_s > MAX_GAP_S:
        raise SlimpiError(f"the power readings have a gap of {gap_s:.1f} s, over {MAX_GAP_S}. Read the meter more.")
    inside = readings[first + 1 : last]
    points = [(begin_s, _power_at(readings, times, begin_s)), *inside, (end_s, _power_at(readings, times, end_s))]
    return math.fsum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(points))


@dataclass(frozen=True)
class Energy:
    """Joules of one task, and which instrument says so."""

    joules: float
    duration_s: float
    source: str

    @property
    def mean_w(self) -> float:
        return self.joules / self.duration_s


def of_task(result: TaskResult, readings: Sequence[Reading] = ()) -> Energy | None:
    """A task's energy by the board's own sensor, else by a meter's readings in the device's clock.

    None where neither covers the whole task without a gap over MAX_GAP_S.
    """
    duration_s, begin_s = result.duration_s, result.started_unix_s
    try:
        joules = of_task_j(result.trace, duration_s)
        if joules is not None:
            return Energy(joules, duration_s, "board")
        if not readings:
            return None
        return Energy(energy_j(readings, begin_s, begin_s + duration_s), duration_s, "meter")
    except SlimpiError:
        return None


def is_csv(meter: str) -> bool:
    return Path(meter).suffix == ".csv"


def read_meter(path: Path) -> list[Reading]:
    """A meter's CSV; SlimpiError if it cannot be read."""
    try:
        return parse_meter_csv(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SlimpiError(f"cannot read the power readings {path}: {error}. Check --meter.") from error


def readings_of(host_folder: Path, meter: str = "") -> list[Reading]:
    """All power readings among a host's results, and those of the CSV that `meter` names, in the order of their times.

    SlimpiError for a CSV that cannot be read.
    """
    paths = sorted((host_folder / POWER_FOLDER).glob("*.csv")) + ([Path(meter)] if is_csv(meter) else [])
    return sorted({reading[0]: reading for path in paths for reading in read_meter(path)}.values())


@contextmanager
def metered(command: str, out: Path, ahead_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Run `command` every PERIOD_S while the block runs and write `out` (COLUMNS), in the device's clock.

    The first number that the command prints is taken as watts. ahead_s: the device's clock less this machine's. A
    command that does not work at the start is a SlimpiError; one that fails later leaves a gap and is told of.
    """
    argv = shlex.split(command)
    if not argv:
        raise SlimpiError("--meter is empty. Give a .csv file or a command that prints watts.")
    first = _ask(argv)
    over, failures = threading.Event(), list[str]()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = out.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise SlimpiError(f"cannot write {out}: {error.strerror}. Free some space.") from error
    with handle:
        handle.write(",".join(COLUMNS) + "\n")
        handle.write(f"{time.time() + ahead_s:.3f},{first}\n")

        def follow() -> None:
            while not over.wait(PERIOD_S):
                try:
                    begin_s = time.time()
                    watts = _ask(argv)
                    handle.write(f"{(begin_s + time.time()) / 2 + ahead_s:.3f},{watts}\n")
                except (SlimpiError, OSError) as error:
                    failures.append(str(error))

        thread = threading.Thread(target=follow, name="meter", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            if failures:
                say(f"  the power meter failed {len(failures)} times, last: {failures[-1]}")
            say(f"  power readings: {out}")


def _ask(argv: Sequence[str]) -> float:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=READING_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlimpiError(f"the meter {shlex.join(argv)} does not work: {error}. Check --meter.") from error
    found = _NUMBER.search(done.stdout)
    if done.returncode or not found or not float(found[0]) >= 0:
        said = (done.stdout + done.stderr).strip()[:80]
        raise SlimpiError(
            f"the meter {shlex.join(argv)} ended with {done.returncode} and said {said!r}, expected a number of watts. "
            "Check --meter."
        )
    return float(found[0])


def _power_at(readings: Sequence[Reading], times: Sequence[float], time_s: float) -> float:
    """Linear between the two readings around a time that they cover."""
    after = bisect_right(times, time_s)
    if after == len(times) or times[after - 1] == time_s:
        return readings[after - 1][1]
    (t0, p0), (t1, p1) = readings[after - 1], readings[after]
    return p0 + (p1 - p0) * (time_s - t0) / (t1 - t0)
