"""Energy from a power meter's readings: never guessed, so readings that do not cover the time are refused."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

from device.schema import SlimpiError, TracePoint

MAX_GAP_S = 10.0
COLUMNS = ["time_unix_s", "watts"]

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


def _power_at(readings: Sequence[Reading], times: Sequence[float], time_s: float) -> float:
    """Linear between the two readings around a time that they cover."""
    after = bisect_right(times, time_s)
    if after == len(times) or times[after - 1] == time_s:
        return readings[after - 1][1]
    (t0, p0), (t1, p1) = readings[after - 1], readings[after]
    return p0 + (p1 - p0) * (time_s - t0) / (t1 - t0)
