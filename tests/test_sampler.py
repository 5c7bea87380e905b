"""The trace while a task runs, and waiting for a cool CPU: all against scripted readings."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import pytest
from fakes import World
from jobs import run

from device import agent, cooling, sampler
from device.results import Note, TracePoint
from device.schema import Perplexity, Throughput


def test_the_first_point_comes_at_once_and_then_one_a_period() -> None:
    def read(time_s: float) -> tuple[TracePoint, float]:
        return TracePoint(time_s=time_s), 0.25

    with sampler.Sampler(read, period_s=0.1) as taken:
        time.sleep(0.35)
    times = [point.time_s for point in taken.points]
    assert len(times) in (3, 4)
    assert times[0] < 0.1
    assert times == sorted(times)
    assert 0.25 * len(times) <= taken.cpu_s < 0.25 * len(times) + 0.1, "asked processes and the thread's own time"


def test_leaving_does_not_wait_for_the_period() -> None:
    begin_s = time.monotonic()
    with sampler.Sampler(lambda time_s: (TracePoint(time_s=time_s), 0.0), period_s=60):
        pass
    assert time.monotonic() - begin_s < 5


def test_the_cost_counts_the_threads_own_work() -> None:
    def read(time_s: float) -> tuple[TracePoint, float]:
        end_s = time.thread_time() + 0.05
        while time.thread_time() < end_s:
            pass
        return TracePoint(time_s=time_s), 0.0

    with sampler.Sampler(read, period_s=60) as taken:
        pass
    assert 0.05 <= taken.cpu_s < 0.2


def test_a_long_trace_is_thinned_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "MAX_POINTS", 4)
    counter = itertools.count()

    def read(time_s: float) -> tuple[TracePoint, float]:
        return TracePoint(time_s=time_s, throttled_bits=int(next(counter) == 1)), 0.0

    with sampler.Sampler(read, period_s=0.01) as taken:
        time.sleep(0.5)
    assert len(taken.points) <= 4
    assert next(counter) >= 6
    assert any(point.throttled_bits for point in taken.points)


def test_merging_keeps_the_worse_of_each_kind() -> None:
    one = TracePoint(
        time_s=0.0,
        clock_mhz=1500.0,
        temperature_c=60.0,
        throttled_bits=0x1,
        cpu_busy_percent=10.0,
        mem_available_bytes=5,
        worker_rss_bytes=7,
        power_w=3.0,
    )
    two = TracePoint(
        time_s=1.0,
        clock_mhz=600.0,
        temperature_c=None,
        throttled_bits=0x4,
        cpu_busy_percent=30.0,
        mem_available_bytes=3,
        worker_rss_bytes=9,
        power_w=5.0,
    )
    three = TracePoint(time_s=2.0)
    first, second = sampler.merge([one, two, three])
    assert (first.time_s, first.clock_mhz, first.temperature_c, first.throttled_bits) == (0.0, 600.0, 60.0, 0x5)
    assert (first.cpu_busy_percent, first.mem_available_bytes, first.worker_rss_bytes) == (20.0, 3, 9)
    assert first.power_w == 4.0
    assert second == three


def test_this_machine_and_process_are_read() -> None:
    read = sampler.machine_reader(os.getpid())
    time.sleep(0.1)
    point, _ = read(1.5)
    assert point.time_s == 1.5
    assert point.mem_available_bytes > 0
    assert 0 < point.worker_rss_anon_bytes < point.worker_rss_bytes
    assert point.cpu_busy_percent is None or 0 <= point.cpu_busy_percent <= 100
    gone, _ = sampler.machine_reader(2**22)(0.0)
    assert gone.worker_rss_bytes == 0


@pytest.mark.usefixtures("quick_facts")
def test_a_result_carries_its_trace_and_is_judged_by_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def reader(worker_pid: int) -> sampler.Read:
        real = sampler.machine_reader(worker_pid)

        def read(time_s: float) -> tuple[TracePoint, float]:
            point, _ = real(time_s)
            hot = {"temperature_c": 85.0, "throttled_bits": 0x4, "clock_mhz": 600.0}
            return TracePoint(**{name: getattr(point, name) for name in ("time_s", "worker_rss_bytes")} | hot), 0.5

        return read

    monkeypatch.setattr(agent, "machine_reader", reader)
    report, _ = run(world.job("gguf", [Throughput(n_prompt=8, n_gen=4, repetitions=3)]))
    result = report.results[0]
    assert result.trace
    assert result.trace[0].time_s < 0.5
    assert result.trace_cpu_s >= 0.5 * len(result.trace)
    assert any("temperature reached 85.0 C" in warning for warning in result.warnings)
    assert any("throttled at the time" in warning for warning in result.warnings)
    assert result.memory and result.worker_peak_rss_bytes >= result.memory.rss_anon_bytes > 0
    assert 0 <= result.facts_after.time_unix_s - result.started_unix_s - result.duration_s < 5


@pytest.mark.parametrize(
    ("temperatures", "reached", "waited_s", "says"),
    [
        ([50.0], True, 0.0, "50.0 C is below wait_cool_c = 55 C"),
        ([70.0, 60.0, 55.0, 54.9], True, 3.0, "waited 3 s: 54.9 C is below"),
        ([70.0] * 9, False, 5.0, "waited 5 s: 70.0 C is still not below"),
        ([None], False, 0.0, "no temperature sensor, not waited"),
    ],
)
def test_waiting_ends_when_it_is_cool_or_too_long(
    temperatures: list[float | None], reached: bool, waited_s: float, says: str
) -> None:
    clock = [100.0]
    readings: Iterator[float | None] = iter(temperatures)

    def sleep(duration_s: float) -> None:
        clock[0] += duration_s

    found = cooling.wait_cool(55.0, 5.0, lambda: next(readings), lambda: clock[0], sleep)
    assert (found.reached, found.waited_s) == (reached, waited_s)
    assert says in str(found)


@pytest.mark.usefixtures("quick_facts")
def test_only_timed_tasks_wait_and_all_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[float, float]] = []

    def wait(limit_c: float, max_s: float) -> cooling.Cooling:
        waits.append((limit_c, max_s))
        return cooling.Cooling(12.0, 60.5, limit_c)

    monkeypatch.setattr(agent, "wait_cool", wait)
    throughput = Throughput(n_prompt=8, n_gen=4, repetitions=3)
    perplexity = Perplexity(dataset=world.dataset("text.txt"), n_ctx=32, n_chunks=3)
    report, events = run(world.job("gguf", [throughput, perplexity], wait_cool_c=50.0, wait_cool_max_s=12))
    assert waits == [(50.0, 12)]
    assert [event.message for event in events if isinstance(event, Note)] == [str(cooling.Cooling(12.0, 60.5, 50.0))]
    assert [result.cool_wait_s for result in report.results] == [12.0, 0.0]
    assert report.results[0].warnings[0] == "waited 12 s: 60.5 C is still not below wait_cool_c = 50 C"
