"""The validity rules one by one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from device import checks
from device.results import Facts, Measurement, Memory, TracePoint

CALM = Facts(
    time_unix_s=0.0,
    machine="aarch64",
    board="Raspberry Pi 4 Model B Rev 1.4",
    cpu="Cortex-A72 r0p3",
    cores=4,
    os="Debian",
    kernel="6.6",
    python="3.11",
    page_size_bytes=4096,
    mem_total_bytes=8_000_000_000,
    mem_available_bytes=7_000_000_000,
    swap_used_bytes=1000,
    load_1min=3.9,
    cpu_busy_percent=2.0,
    clock_mhz=1500.0,
    throttled_bits=0,
)
TASK_MEMORY = Memory(
    peak_rss_bytes=1, peak_pss_bytes=1, rss_anon_bytes=1, rss_file_bytes=0, swap_bytes=0, major_faults=0
)


def timing(*samples: float, metric: str = "decode_tokens_per_s") -> Measurement:
    return Measurement(metric=metric, unit="x", samples=list(samples), higher_is_better=True, provenance="host")


def warned(
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    measurements: list[Measurement] | None = None,
    swapped: int = 0,
    trace: list[dict[str, Any]] | None = None,
) -> list[str]:
    replace = msgspec.structs.replace
    return checks.warnings(
        replace(CALM, **(before or {})),
        replace(CALM, **(after or {})),
        measurements or [],
        replace(TASK_MEMORY, swap_bytes=swapped),
        [TracePoint(time_s=float(i), **point) for i, point in enumerate(trace or [])],
    )


def test_a_calm_run_is_valid() -> None:
    assert warned(after={"cpu_busy_percent": 99.0, "clock_mhz": 1460.0}, measurements=[timing(10, 10.5, 9.8)]) == []
    assert checks.warnings(CALM, CALM, [], None) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"before": {"cpu_busy_percent": 10.1}}, "not idle before the run"),
        (
            {"trace": [{"clock_mhz": 1500.0}, {"clock_mhz": 600.0, "cpu_busy_percent": 99.0}]},
            "clock dropped by 60.0% during the run: 600 of 1500 MHz at 1 s",
        ),
        (
            {
                "before": {"clock_mhz": None},
                "trace": [{"clock_mhz": mhz, "cpu_busy_percent": 23.0} for mhz in (1800.0, 1740.0)],
            },
            "clock dropped by 3.3% during the run: 1740 of 1800 MHz",
        ),
        ({"trace": [{"temperature_c": 60.0}, {"temperature_c": 80.0}]}, "temperature reached 80.0 C"),
        ({"before": {"temperature_c": 81.5}}, "temperature reached 81.5 C"),
        ({"after": {"temperature_c": 80.0}}, "temperature reached 80.0 C"),
        ({"trace": [{"throttled_bits": 0x0}, {"throttled_bits": 0x50005 & 0x1}]}, "under-voltage at the time"),
        ({"trace": [{"throttled_bits": 0x40000}]}, "throttled happened during the run"),
        (
            {
                "before": {"throttled_bits": 0x10000},
                "after": {"throttled_bits": 0x10000},
                "trace": [{"throttled_bits": 0x0}, {"throttled_bits": 0x10000}],
            },
            "under-voltage happened during the run",
        ),
        ({"after": {"under_voltage_alarm": True}}, "under-voltage alarm at the time of the run"),
        ({"after": {"under_voltage_alarm": True, "throttled_bits": 0x1}}, "under-voltage at the time of the run"),
        ({"after": {"clock_mhz": 1450.0}}, "clock changed by -3.3%"),
        ({"after": {"clock_mhz": 1550.0}}, "clock changed by +3.3%"),
        ({"after": {"throttled_bits": 0x1}}, "under-voltage at the time of the run"),
        ({"before": {"throttled_bits": 0x4}, "after": {"throttled_bits": 0x40000}}, "throttled at the time of the run"),
        ({"after": {"throttled_bits": 0x20000}}, "clock capped happened during the run"),
        ({"after": {"throttled_bits": 0x80000}}, "soft temperature limit happened during the run"),
        ({"after": {"swap_used_bytes": 5_001_000}}, "swap grew by 5.0 MB"),
        ({"swapped": 2_000_000}, "2.0 MB of the task itself were swapped out"),
        ({"measurements": [timing(10, 10)]}, "has 2 sample(s), fewer than 3"),
        ({"measurements": [timing(10, 12, 8)]}, "standard deviation 20% of the mean"),
        ({"measurements": [timing(*[10] * 30, 15.5)]}, "its largest sample is 52% off the mean"),
        ({"measurements": [timing(*[10] * 99, 4.5)]}, "its smallest sample is 55% off the mean"),
    ],
)
def test_each_rule_speaks_alone(arguments: dict[str, Any], message: str) -> None:
    (found,) = warned(**arguments)
    assert message in found


def test_what_is_no_reason_to_warn() -> None:
    assert warned(before={"throttled_bits": 0x50000}, after={"throttled_bits": 0x50000}) == []  # since boot, not now
    assert warned(before={"clock_mhz": None}, after={"clock_mhz": 600.0}) == []
    assert warned(before={"throttled_bits": None}) == []
    assert warned(trace=[{"throttled_bits": None}, {"throttled_bits": 0}]) == []
    idle = [{"clock_mhz": 1500.0, "cpu_busy_percent": 25.0}, {"clock_mhz": 600.0, "cpu_busy_percent": 20.0}]
    assert warned(trace=idle) == []  # an idle governor, reading a file
    assert warned(trace=[{"clock_mhz": 1460.0, "cpu_busy_percent": 99.0, "temperature_c": 79.9}]) == []
    assert warned(after={"swap_used_bytes": 0}) == []
    assert warned(measurements=[timing(1, 50, metric="latency_ms"), timing(1, 9, metric="nll")]) == []
