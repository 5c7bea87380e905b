"""Energy: the area under power readings that cover a task, from the board, a CSV or a command; otherwise absent."""

from __future__ import annotations

import itertools
import math
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compare import report

from device.records import SlimpiError
from device.results import TaskResult, TracePoint
from pipeline import energy
from pipeline.compare import describe_energy, rows
from pipeline.table import show

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


def timed(started_unix_s: float, duration_s: float, trace: list[TracePoint]) -> TaskResult:
    """A task's result at a given time."""
    return msgspec.structs.replace(
        report("F16", [1.0, 2.0]).results[0], started_unix_s=started_unix_s, duration_s=duration_s, trace=trace
    )


def test_the_boards_own_sensor_goes_before_a_meter() -> None:
    trace = [TracePoint(time_s=0.5, power_w=3.0), TracePoint(time_s=1.5, power_w=5.0)]
    readings = energy.parse_meter_csv(METER, "m.csv")
    board = energy.of_task(timed(101.0, 2.0, trace), readings)
    assert (board and board.source) == "board"
    meter = energy.of_task(timed(101.0, 1.0, []), readings)
    assert meter == energy.Energy(pytest.approx(6.0), 1.0, "meter")
    assert meter.mean_w == pytest.approx(6.0)


@pytest.mark.parametrize("started_unix_s", [99.9, 103.5, 500.0])
def test_a_task_that_the_readings_do_not_cover_has_no_energy(started_unix_s: float) -> None:
    readings = energy.parse_meter_csv(METER, "m.csv")
    assert energy.of_task(timed(started_unix_s, 1.0, []), readings) is None
    assert energy.of_task(timed(started_unix_s, 1.0, [])) is None


def test_energy_is_a_column_only_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    one = report("F16", [1.0, 2.0])
    readings = [(0.0, 2.0), (1.0, 2.0), (2.0, 2.0)]
    (known,) = rows([one], readings=readings)
    (unknown,) = rows([one])
    assert describe_energy(unknown) == "-"
    assert known.energy
    assert known.energy.joules == pytest.approx(2.0 * known.energy.duration_s)
    show([unknown])
    assert "energy" not in capsys.readouterr().out
    show([known])
    assert f"{known.energy.joules:.1f} J, mean 2.00 W (meter)" in capsys.readouterr().out


def test_a_command_is_read_while_the_job_runs_in_the_devices_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "PERIOD_S", 0.05)
    said: list[str] = []
    out = tmp_path / "power" / "one.csv"
    begin_s = time.time()
    with energy.metered(f"{sys.executable} -c \"print('power: 4.5 W')\"", out, 1000.0, said.append):
        time.sleep(0.5)
    readings = energy.readings_of(tmp_path)
    assert len(readings) >= 2
    assert {watts for _, watts in readings} == {4.5}
    assert all(begin_s + 1000 <= time_s <= time.time() + 1000 for time_s, _ in readings)
    assert said == [f"  power readings: {out}"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "is empty"),
        ("no-such-meter --now", "no-such-meter --now does not work"),
        (f"{sys.executable} -c \"print('n/a')\"", "said 'n/a', expected a number"),
        (f'{sys.executable} -c "print(-1)"', "expected a number"),
        (f'{sys.executable} -c "print(5); raise SystemExit(2)"', "ended with 2"),
    ],
)
def test_a_meter_that_does_not_work_is_told_before_the_job(tmp_path: Path, command: str, message: str) -> None:
    with pytest.raises(SlimpiError, match="--meter") as caught, energy.metered(command, tmp_path / "p.csv", 0.0, print):
        pytest.fail("the job began")
    assert message in str(caught.value)
    assert not (tmp_path / "p.csv").exists()


def test_a_meter_that_stops_leaves_a_gap_and_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "PERIOD_S", 0.05)
    said: list[str] = []
    works = tmp_path / "works"
    works.write_text("3")
    with energy.metered(f"cat {works}", tmp_path / "power" / "p.csv", 0.0, said.append):
        works.unlink()
        time.sleep(0.5)
    assert [watts for _, watts in energy.readings_of(tmp_path)] == [3.0]
    assert "the power meter failed" in said[0]


def test_readings_of_several_runs_and_of_the_users_file_are_one_series(tmp_path: Path) -> None:
    (tmp_path / "power").mkdir()
    (tmp_path / "power" / "b.csv").write_text("time_unix_s,watts\n1,1\n2,1\n")
    (tmp_path / "power" / "a.csv").write_text("time_unix_s,watts\n7,2\n8,2\n")
    (tmp_path / "mine.csv").write_text("time_unix_s,watts\n4,3\n")
    assert energy.readings_of(tmp_path, str(tmp_path / "mine.csv")) == [(1, 1), (2, 1), (4, 3), (7, 2), (8, 2)]
    assert energy.readings_of(tmp_path / "nothing") == []
    with pytest.raises(SlimpiError, match="cannot read the power readings"):
        energy.readings_of(tmp_path, "missing.csv")
