"""Is this run valid? Pure rules over facts and samples (DESIGN.md rule 6); each gives a sentence with its figures."""

from __future__ import annotations

import functools
import operator
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

from device.results import Facts, Measurement, Memory, TracePoint

MAX_IDLE_BUSY_PERCENT = 10.0
MAX_CLOCK_CHANGE = 0.03
MAX_TEMPERATURE_C = 80.0  # where a Pi 4 begins to throttle
BUSY_CORE_PERCENT = 90.0  # of one core
MAX_RELATIVE_STDEV = 0.10  # pyperf's limits, for this one and the next
MAX_RELATIVE_OUTLIER = 0.50
# Of two values that differ one cannot say which is off; with a third, a stray one shows.
MIN_SAMPLES = 3

# Metrics whose samples repeat the same work, so that they should agree; latency_ms and nll vary with the text.
REPEATED = frozenset(
    {"prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "load_ms", "tweets_per_s", "ns_per_weight"}
)

# vcgencmd get_throttled: bit n now, bit n + 16 since boot.
THROTTLE_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}


def warnings(
    before: Facts,
    after: Facts,
    measurements: Sequence[Measurement],
    memory: Memory | None,
    trace: Sequence[TracePoint] = (),
) -> list[str]:
    """Everything that makes the run doubtful; empty = valid."""
    found = [
        *_idle(before),
        *_clock(before, after, trace),
        *_temperature(before, after, trace),
        *_throttling(before, after, trace),
        *_swap(before, after, memory),
    ]
    for measurement in measurements:
        if measurement.metric in REPEATED:
            found += _stability(measurement)
    return found


def _idle(before: Facts) -> Iterator[str]:
    if before.cpu_busy_percent > MAX_IDLE_BUSY_PERCENT:
        yield f"not idle before the run: CPUs {before.cpu_busy_percent:.0f}% busy, over {MAX_IDLE_BUSY_PERCENT:.0f}%"


def _clock(before: Facts, after: Facts, trace: Sequence[TracePoint]) -> Iterator[str]:
    """Before and after are read under load. In the trace a clock counts only if a core was busy in that second: an
    idle governor lowers it rightly, while a file is read for example."""
    if before.clock_mhz and after.clock_mhz:
        change = after.clock_mhz / before.clock_mhz - 1
        if abs(change) > MAX_CLOCK_CHANGE:
            yield f"clock changed by {change:+.1%}: {before.clock_mhz:.0f} MHz before, {after.clock_mhz:.0f} after"
    busy = [
        (point.clock_mhz, point.time_s)
        for point in trace
        if point.clock_mhz and (point.cpu_busy_percent or 0.0) * before.cores >= BUSY_CORE_PERCENT
    ]
    if busy:
        top = max(before.clock_mhz or 0.0, *(mhz for mhz, _ in busy))
        low, time_s = min(busy)
        if low < top * (1 - MAX_CLOCK_CHANGE):
            yield f"clock dropped by {1 - low / top:.1%} during the run: {low:.0f} of {top:.0f} MHz at {time_s:.0f} s"


def _temperature(before: Facts, after: Facts, trace: Sequence[TracePoint]) -> Iterator[str]:
    seen = [before.temperature_c, *(point.temperature_c for point in trace), after.temperature_c]
    top = max((celsius for celsius in seen if celsius is not None), default=0.0)
    if top >= MAX_TEMPERATURE_C:
        yield f"temperature reached {top:.1f} C, the limit where the board slows down is {MAX_TEMPERATURE_C:.0f} C"


def _throttling(before: Facts, after: Facts, trace: Sequence[TracePoint]) -> Iterator[str]:
    """Bits 0-3 at any moment; bits 16-19 where they rise, since they stay up from whatever happened earlier. A kernel
    may clear them in between (its voltage monitor does), so each is compared with the one before it."""
    seen = [before.throttled_bits, *(point.throttled_bits for point in trace), after.throttled_bits]
    bits = [word for word in seen if word is not None]
    now = functools.reduce(operator.or_, bits, 0)
    new = functools.reduce(operator.or_, (later & ~earlier for earlier, later in pairwise(bits)), 0)
    for bit, name in THROTTLE_BITS.items():
        if now >> bit & 1:
            yield f"{name} at the time of the run"
        elif new >> (bit + 16) & 1:
            yield f"{name} happened during the run"
    if not now & 1 and (before.under_voltage_alarm or after.under_voltage_alarm):
        yield "under-voltage alarm at the time of the run"


def _swap(before: Facts, after: Facts, memory: Memory | None) -> Iterator[str]:
    grown = after.swap_used_bytes - before.swap_used_bytes
    if grown > 0:
        yield f"swap grew by {grown / 1e6:.1f} MB during the run"
    if memory and memory.swap_bytes:
        yield f"{memory.swap_bytes / 1e6:.1f} MB of the task itself were swapped out"


def _stability(measurement: Measurement) -> Iterator[str]:
    name, samples = _named(measurement), measurement.samples
    if len(samples) < MIN_SAMPLES:
        yield f"{name} has {len(samples)} sample(s), fewer than {MIN_SAMPLES}"
        return
    mean = measurement.mean
    if statistics.stdev(samples) > MAX_RELATIVE_STDEV * mean:
        yield f"{name} is unstable: standard deviation {statistics.stdev(samples) / mean:.0%} of the mean"
    for what, value in (("smallest", min(samples)), ("largest", max(samples))):
        if abs(value - mean) > MAX_RELATIVE_OUTLIER * mean:
            yield f"{name} has an outlier: its {what} sample is {abs(value - mean) / mean:.0%} off the mean"


def _named(measurement: Measurement) -> str:
    """The metric, and of which format and shape where a task measures it of several."""
    of = measurement.conditions
    if "format" not in of:
        return measurement.metric
    return f"{measurement.metric} of {of['format']} {of['rows']}x{of['columns']}"
