"""The trace: what clock, temperature, throttle bits, memory and power did while a task ran, about once a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from device import firmware
from device.facts import busy_percent, parse_cpu_ticks
from device.memory import parse_kib_fields
from device.results import TracePoint

PERIOD_S = 1.0
MAX_POINTS = 3600

Read = Callable[[float], tuple[TracePoint, float]]
"""time_s -> what the machine says now, and the CPU time of the processes that had to be asked, seconds."""


class Sampler:
    """A thread that reads the machine at once and then every PERIOD_S, until the `with` block is left.

    `points` is the trace; over MAX_POINTS it halves them (see merge) and goes on half as often. `cpu_s` is what it
    cost, its own CPU time and that of the processes it asked, and is whole once the block is left.
    """

    def __init__(self, read: Read, period_s: float = PERIOD_S) -> None:
        self.points: list[TracePoint] = []
        self.cpu_s = 0.0
        self._read, self._period_s = read, period_s
        self._begin_s = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        asked_s = 0.0
        next_s = 0.0
        while True:
            point, cpu_s = self._read(time.monotonic() - self._begin_s)
            asked_s += cpu_s
            self.points.append(point)
            self.cpu_s = time.thread_time() + asked_s
            if len(self.points) > MAX_POINTS:
                self.points = merge(self.points)
                self._period_s *= 2
            next_s += self._period_s
            if self._over.wait(max(0.0, self._begin_s + next_s - time.monotonic())):
                return


def merge(points: Sequence[TracePoint]) -> list[TracePoint]:
    """Every two points as one that hides nothing: the worse value of each kind, the mean of power and load."""
    merged = []
    for pair in (points[i : i + 2] for i in range(0, len(points), 2)):
        clocks = [p.clock_mhz for p in pair if p.clock_mhz is not None]
        temperatures = [p.temperature_c for p in pair if p.temperature_c is not None]
        bits = [p.throttled_bits for p in pair if p.throttled_bits is not None]
        powers = [p.power_w for p in pair if p.power_w is not None]
        loads = [p.cpu_busy_percent for p in pair if p.cpu_busy_percent is not None]
        merged.append(
            TracePoint(
                time_s=pair[0].time_s,
                clock_mhz=min(clocks, default=None),
                temperature_c=max(temperatures, default=None),
                throttled_bits=bits[0] | bits[-1] if bits else None,
                cpu_busy_percent=sum(loads) / len(loads) if loads else None,
                mem_available_bytes=min(p.mem_available_bytes for p in pair),
                worker_rss_bytes=max(p.worker_rss_bytes for p in pair),
                worker_rss_anon_bytes=max(p.worker_rss_anon_bytes for p in pair),
                power_w=sum(powers) / len(powers) if powers else None,
            )
        )
    return merged


def machine_reader(worker_pid: int) -> Read:
    """Reads this machine and that process; what the board lacks is asked for only once."""
    sysfs = firmware.cached_throttled_bits() is not None
    bits = sysfs or firmware.throttled_bits()[0] is not None
    has_power = firmware.power_w()[0] is not None
    ticks = parse_cpu_ticks(firmware.read("/proc/stat") or "")

    def read(time_s: float) -> tuple[TracePoint, float]:
        nonlocal ticks
        before, ticks = ticks, parse_cpu_ticks(firmware.read("/proc/stat") or "")
        clock_mhz, cpu_s = firmware.clock_mhz()
        throttled, throttled_cpu_s = _throttled(sysfs) if bits else (None, 0.0)
        watts, power_cpu_s = firmware.power_w() if has_power else (None, 0.0)
        status = parse_kib_fields(firmware.read(f"/proc/{worker_pid}/status") or "")
        point = TracePoint(
            time_s=time_s,
            clock_mhz=clock_mhz,
            temperature_c=firmware.temperature_c(),
            throttled_bits=throttled,
            cpu_busy_percent=busy_percent(before, ticks) if ticks[1] > before[1] else None,
            mem_available_bytes=parse_kib_fields(firmware.read("/proc/meminfo") or "").get("MemAvailable", 0),
            worker_rss_bytes=status.get("VmRSS", 0),
            worker_rss_anon_bytes=status.get("RssAnon", 0),
            power_w=watts,
        )
        return point, cpu_s + throttled_cpu_s + power_cpu_s

    return read


def _throttled(sysfs: bool) -> tuple[int | None, float]:
    return (firmware.cached_throttled_bits(), 0.0) if sysfs else firmware.throttled_bits()
