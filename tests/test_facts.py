"""Facts parsers against captured-style texts, and the validity rules one by one."""

from __future__ import annotations

import platform
from typing import Any

import msgspec
import pytest

from device import checks, facts, memory
from device.schema import Facts, Measurement, Memory

MEMINFO_PI4 = """MemTotal:        7999784 kB
MemFree:         6121196 kB
MemAvailable:    7392060 kB
Buffers:           41244 kB
SwapTotal:        102396 kB
SwapFree:          99836 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""

CPUINFO_PI4 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

Hardware\t: BCM2835
Revision\t: d03114
Serial\t\t: 10000000abcdef01
Model\t\t: Raspberry Pi 4 Model B Rev 1.4
"""

CPUINFO_X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model\t\t: 85
model name\t: Intel(R) Xeon(R) CPU @ 2.00GHz
flags\t\t: fpu vme de pse
"""

STAT = """cpu  4705 150 1120 16250 520 30 45 10 0 0
cpu0 1393 280 272 4170 130 5 7 2 0 0
intr 114930548 113199788 3 0
ctxt 1990473
"""

SMAPS = """55a0-55b0 r-xp 00000000 b3:02 1234 /usr/bin/python3.11
Size:               2752 kB
Rss:                1024 kB
Pss:                 512 kB
7f00-7f10 rw-p 00000000 00:00 0
Size:                132 kB
Rss:                 100 kB
Pss:                 100 kB
"""


def test_meminfo() -> None:
    fields = memory.parse_kib_fields(MEMINFO_PI4)
    assert fields["MemTotal"] == 7999784 * 1024
    assert fields["SwapTotal"] - fields["SwapFree"] == 2560 * 1024
    assert "HugePages_Total" not in fields


def test_smaps_sums_its_mappings() -> None:
    assert memory.parse_kib_fields(SMAPS)["Pss"] == 612 * 1024


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (CPUINFO_PI4, "Cortex-A72 r0p3"),
        (CPUINFO_X86, "Intel(R) Xeon(R) CPU @ 2.00GHz"),
        (CPUINFO_PI4.replace("0xd08", "0xfff"), "0x41 0xfff"),
        ("", "unknown"),
    ],
)
def test_cpu_name(text: str, name: str) -> None:
    assert facts.parse_cpu_name(text) == name


def test_board() -> None:
    assert facts.parse_board("Raspberry Pi 4 Model B Rev 1.4\0", None, None) == "Raspberry Pi 4 Model B Rev 1.4"
    assert facts.parse_board(None, "QEMU\n", "Standard PC\n") == "QEMU Standard PC"
    assert facts.parse_board(None, None, " \n") == "unknown"


def test_os_name() -> None:
    assert facts.parse_os_name('NAME="x"\nPRETTY_NAME="Debian 12 (bookworm)"\n') == "Debian 12 (bookworm)"
    assert facts.parse_os_name("PRETTY_NAME=Alpine\n") == "Alpine"
    assert facts.parse_os_name("") == "unknown"


def test_cpu_ticks_count_steal_and_irq_as_busy_and_iowait_as_idle() -> None:
    assert facts.parse_cpu_ticks(STAT) == (4705 + 150 + 1120 + 30 + 45 + 10, 22830)
    assert facts.parse_cpu_ticks("cpu  1 2 3 4\n") == (6, 10)  # an old kernel's short line
    assert facts.parse_cpu_ticks("") == (0, 0)


def test_busy_percent() -> None:
    assert facts.busy_percent((100, 1000), (150, 1200)) == 25.0
    assert facts.busy_percent((100, 1000), (100, 1000)) == 0.0


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (facts.parse_vcgencmd_clock, "frequency(48)=1500345728\n", 1500.345728),
        (facts.parse_vcgencmd_clock, "frequency(0)=0\n", None),
        (facts.parse_vcgencmd_clock, "VCHI initialization failed\n", None),
        (facts.parse_vcgencmd_clock, None, None),
        (facts.parse_khz, "1800000\n", 1800.0),
        (facts.parse_khz, "<unknown>\n", None),
        (facts.parse_khz, None, None),
        (facts.parse_throttled, "throttled=0x50005\n", 0x50005),
        (facts.parse_throttled, "throttled=0x0\n", 0),
        (facts.parse_throttled, "error=1 error_msg=x\n", None),
        (facts.parse_throttled, None, None),
        (facts.parse_millidegrees, "48312\n", 48.312),
        (facts.parse_millidegrees, "-5000", -5.0),
        (facts.parse_millidegrees, "", None),
        (facts.parse_millidegrees, None, None),
        (facts.parse_word, "ondemand\n", "ondemand"),
        (facts.parse_word, None, None),
        (facts.parse_load, "0.52 0.58 0.59 1/389 12345\n", 0.52),
    ],
)
def test_small_parsers(parse: Any, text: str | None, value: object) -> None:
    assert parse(text) == value


def test_collect_tells_of_this_machine() -> None:
    now = facts.collect()
    assert now.machine == platform.machine()
    assert 0 <= now.cpu_busy_percent <= 100
    assert 0 < now.mem_available_bytes <= now.mem_total_bytes
    assert now.runtimes.keys() == {"llama-cpp-python", "onnxruntime", "tokenizers", "numpy"}
    assert msgspec.json.decode(msgspec.json.encode(now), type=Facts) == now


def test_vcgencmd_is_asked_when_there_is_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "vcgencmd"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in\n"measure_clock arm") echo "frequency(48)=1500345728";;\n'
        'get_throttled) echo "throttled=0x50005";;\n*) exit 1;;\nesac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    now = facts.collect()
    assert (now.clock_mhz, now.throttled_bits) == (1500.345728, 0x50005)
    tool.write_text("#!/bin/sh\nexit 255\n")
    assert facts.collect().throttled_bits is None


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
) -> list[str]:
    replace = msgspec.structs.replace
    return checks.warnings(
        replace(CALM, **(before or {})),
        replace(CALM, **(after or {})),
        measurements or [],
        replace(TASK_MEMORY, swap_bytes=swapped),
    )


def test_a_calm_run_is_valid() -> None:
    assert warned(after={"cpu_busy_percent": 99.0, "clock_mhz": 1460.0}, measurements=[timing(10, 10.5, 9.8)]) == []
    assert checks.warnings(CALM, CALM, [], None) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"before": {"cpu_busy_percent": 10.1}}, "not idle before the run"),
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
    assert warned(after={"swap_used_bytes": 0}) == []
    assert warned(measurements=[timing(1, 50, metric="latency_ms"), timing(1, 9, metric="nll")]) == []
