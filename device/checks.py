"""Is this run valid? Pure rules over facts and samples (DESIGN.md rule 6); each gives a sentence with its figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from device.schema import Facts, Measurement, Memory

MAX_IDLE_BUSY_PERCENT = 10.0
MAX_CLOCK_CHANGE = 0.03
MAX_RELATIVE_STDEV = 0.10  # pyperf's limits, for this one and the next
MAX_RELATIVE_OUTLIER = 0.50
# Of two values that differ one cannot say which is off; with a third, a stray one shows.
MIN_SAMPLES = 3

# Metrics whose samples repeat the same work, so that they should agree; latency_ms and nll vary with the text.
REPEATED = frozenset({"prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "load_ms", "tweets_per_s"})

# vcgencmd get_throttled: bit n now, bit n + 16 since boot.
THROTTLE_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}


def warnings(before: Facts, after: Facts, measurements: list[Measurement], memory: Memory | None) -> list[str]:
    """Everything that makes the run doubtful; empty = valid."""
    found = [*_machine(before, after), *_throttling(before, after), *_swap(before, after, memory)]
    for measurement in measurements:
        if measurement.metric in REPEATED:
            found += _stability(measurement)
    return found


def _machine(before: Facts, after: Facts) -> Iterator[str]:
    if before.cpu_busy_percent > MAX_IDLE_BUSY_PERCENT:
        yield f"not idle before the run: CPUs {before.cpu_busy_percent:.0f}% busy, over {MAX_IDLE_BUSY_PERCENT:.0f}%"
    if before.clock_mhz and after.clock_mhz:
        change = after.clock_mhz / before.clock_mhz - 1
        if abs(change) > MAX_CLOCK_CHANGE:
            yield f"clock changed by {change:+.1%}: {before.clock_mhz:.0f} MHz before, {after.clock_mhz:.0f} after"


def _throttling(before: Facts, after: Facts) -> Iterator[str]:
    if before.throttled_bits is None or after.throttled_bits is None:
        return
    now = before.throttled_bits | after.throttled_bits
    new = after.throttled_bits & ~before.throttled_bits
    for bit, name in THROTTLE_BITS.items():
        if now >> bit & 1:
            yield f"{name} at the time of the run"
        elif new >> (bit + 16) & 1:
            yield f"{name} happened during the run"


def _swap(before: Facts, after: Facts, memory: Memory | None) -> Iterator[str]:
    grown = after.swap_used_bytes - before.swap_used_bytes
    if grown > 0:
        yield f"swap grew by {grown / 1e6:.1f} MB during the run"
    if memory and memory.swap_bytes:
        yield f"{memory.swap_bytes / 1e6:.1f} MB of the task itself were swapped out"


def _stability(measurement: Measurement) -> Iterator[str]:
    name, samples = measurement.metric, measurement.samples
    if len(samples) < MIN_SAMPLES:
        yield f"{name} has {len(samples)} sample(s), fewer than {MIN_SAMPLES}"
        return
    mean = measurement.mean
    if statistics.stdev(samples) > MAX_RELATIVE_STDEV * mean:
        yield f"{name} is unstable: standard deviation {statistics.stdev(samples) / mean:.0%} of the mean"
    for what, value in (("smallest", min(samples)), ("largest", max(samples))):
        if abs(value - mean) > MAX_RELATIVE_OUTLIER * mean:
            yield f"{name} has an outlier: its {what} sample is {abs(value - mean) / mean:.0%} off the mean"
