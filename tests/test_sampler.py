"""The trace while a task runs, waiting for a cool CPU, and energy: all against scripted readings."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator

import pytest
from fakes import World
from hypothesis import given
from hypothesis import strategies as st
from jobs import run

from device import agent, cooling, energy, facts, sampler
from device.schema import Note, Perplexity, SlimpiError, Throughput, TracePoint


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


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(facts, "BUSY_WINDOW_S", 0.01)
    monkeypatch.setattr(facts, "SPIN_S", 0.0)
    return World.make(tmp_path_factory.mktemp("world"))


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


METER = "time_unix_s,watts\n100.0,4.0\n101.0,6.0\n102.0,6.0\n104.0,2.0\n"


def test_meter_csv_is_read() -> None:
    assert energy.parse_meter_csv(METER, "m.csv") == [(100.0, 4.0), (101.0, 6.0), (102.0, 6.0), (104.0, 2.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the header time_unix_s,watts"),
        ("watts,time_unix_s\n1,2\n", "expected the header"),
        (METER + "105\n", "line 6 is '105', expected two numbers"),
        (METER + "105,1,2\n", "line 6"),
        (METER + "105,five\n", "line 6 is '105,five'"),
        (METER + "104.0,2.0\n", "line 6: times must rise"),
        (METER + "105,-1\n", "watts be >= 0"),
        (METER + "105,nan\n", "line 6: times must rise and watts"),
        (METER + "inf,1\n", "line 6"),
    ],
)
def test_bad_meter_csv_names_its_line(text: str, message: str) -> None:
    with pytest.raises(SlimpiError, match=r"^m\.csv") as caught:
        energy.parse_meter_csv(text, "m.csv")
    assert message in str(caught.value)


def test_energy_is_the_area_under_the_power() -> None:
    readings = energy.parse_meter_csv(METER, "m.csv")
    assert energy.energy_j(readings, 100.0, 104.0) == pytest.approx(5.0 + 6.0 + 8.0)
    assert energy.energy_j(readings, 100.5, 101.0) == pytest.approx(0.5 * (5.0 + 6.0) / 2)
    assert energy.energy_j(readings, 102.5, 103.5) == pytest.approx(4.0)


@given(
    st.lists(st.tuples(st.floats(0.1, 5.0), st.floats(0, 20)), min_size=3, max_size=30),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_energy_of_two_halves_is_that_of_the_whole(steps: list[tuple[float, float]], one: float, two: float) -> None:
    times = list(itertools.accumulate(gap_s for gap_s, _ in steps))
    readings = list(zip(times, (watts for _, watts in steps), strict=True))
    span = times[-1] - times[0]
    begin_s, end_s = times[0] + span * min(one, two), times[0] + span * max(one, two)
    middle_s = (begin_s + end_s) / 2
    if not begin_s < middle_s < end_s <= times[-1]:
        return
    whole = energy.energy_j(readings, begin_s, end_s)
    assert whole == pytest.approx(
        energy.energy_j(readings, begin_s, middle_s) + energy.energy_j(readings, middle_s, end_s), abs=1e-6
    )
    grid = [begin_s + (end_s - begin_s) * (i + 0.5) / 4000 for i in range(4000)]  # the twin: many thin rectangles
    rough = math.fsum(_interpolated(readings, t) for t in grid) * (end_s - begin_s) / 4000
    assert whole == pytest.approx(rough, rel=1e-2, abs=1e-2)


def _interpolated(readings: list[tuple[float, float]], time_s: float) -> float:
    for (t0, p0), (t1, p1) in itertools.pairwise(readings):
        if t0 <= time_s <= t1:
            return p0 + (p1 - p0) * (time_s - t0) / (t1 - t0)
    raise AssertionError(time_s)


@pytest.mark.parametrize(
    ("begin_s", "end_s", "message"),
    [
        (99.0, 103.0, "cover 100.0 to 104.0"),
        (101.0, 104.5, "cover 100.0 to 104.0"),
        (103.0, 103.0, "must come after"),
    ],
)
def test_energy_is_never_guessed(begin_s: float, end_s: float, message: str) -> None:
    with pytest.raises(SlimpiError, match=message):
        energy.energy_j(energy.parse_meter_csv(METER, "m.csv"), begin_s, end_s)
    with pytest.raises(SlimpiError, match="cover nothing"):
        energy.energy_j([], 1.0, 2.0)
    with pytest.raises(SlimpiError, match=r"gap of 11\.0 s"):
        energy.energy_j([(0.0, 1.0), (11.0, 1.0)], 3.0, 4.0)


def test_a_trace_gives_readings_only_where_the_board_measures() -> None:
    trace = [TracePoint(time_s=0.0, power_w=3.0), TracePoint(time_s=1.0), TracePoint(time_s=2.0, power_w=5.0)]
    assert energy.of_trace(trace) == [(0.0, 3.0), (2.0, 5.0)]
    assert energy.of_trace(trace[1:2]) == []


def test_a_tasks_energy_holds_the_first_and_last_reading() -> None:
    trace = [TracePoint(time_s=0.5, power_w=3.0), TracePoint(time_s=1.5, power_w=5.0)]
    assert energy.of_task_j(trace, 2.0) == pytest.approx(0.5 * 3.0 + 4.0 + 0.5 * 5.0)
    assert energy.of_task_j([TracePoint(time_s=0.0)], 2.0) is None
    with pytest.raises(SlimpiError, match="gap of"):
        energy.of_task_j(trace, 20.0)
