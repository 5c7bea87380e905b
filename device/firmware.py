"""The board's firmware and sensors: what vcgencmd and sysfs say. `parse_*` are pure over captured text, the rest reads.

Answers are None where this board has no such sensor or does not let us ask.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ANSWER_WITHIN_S = 2.0
_ANSWER_BYTES = 1 << 16
_PLATFORM = Path("/sys/devices/platform")
_HWMON = Path("/sys/class/hwmon")
_PMIC_LINE = re.compile(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=(\d+\.\d+)\2$", re.MULTILINE)


def parse_clock_mhz(output: str | None) -> float | None:
    """`frequency(48)=1500345728` in MHz: the firmware's own clock, which the kernel's may not follow."""
    found = re.fullmatch(r"frequency\(\d+\)=(\d+)", (output or "").strip())
    return int(found.group(1)) / 1e6 if found and int(found.group(1)) else None


def parse_khz(text: str | None) -> float | None:
    """cpufreq's `1500000` in MHz."""
    return int(text) / 1e3 if text and re.fullmatch(r"[0-9]+\s*", text) else None


def parse_millidegrees(text: str | None) -> float | None:
    """A thermal zone's `48312` in degrees Celsius."""
    return int(text) / 1e3 if text and re.fullmatch(r"-?[0-9]+", text.strip()) else None


def parse_throttled(output: str | None) -> int | None:
    """vcgencmd's `throttled=0x50005` or sysfs's `50005`: bits 0-3 now, 16-19 since boot or since the kernel last
    cleared them (under-voltage, capped, throttled, soft limit)."""
    found = re.fullmatch(r"(?:throttled=0x)?([0-9a-fA-F]{1,8})", (output or "").strip())
    return int(found.group(1), 16) if found else None


def parse_alarm(text: str | None) -> bool | None:
    """hwmon's `in0_lcrit_alarm`: 0 or 1."""
    return {"0": False, "1": True}.get((text or "").strip())


def parse_version(output: str | None) -> str | None:
    """`vcgencmd version` (build time, copyright, `version HASH (clean) (release) (start)`) in one line."""
    built = re.match(r"\w{3} +\d+ \d{4}\b", output or "")
    found = re.search(r"^version ([0-9a-f]{8,40})\b", output or "", re.MULTILINE)
    return f"{found.group(1)[:12]} of {' '.join(built.group().split())}" if built and found else None


def parse_power_w(output: str | None) -> float | None:
    """Watts of `vcgencmd pmic_read_adc` (Pi 5): the sum of V * I over the rails that give both.

    It misses what the PMIC does not carry: the 5 V input itself (USB, HATs) has a voltage but no current.
    """
    rails: dict[str, dict[str, float]] = {}
    for name, unit, value in _PMIC_LINE.findall(output or ""):
        rails.setdefault(name, {})[unit] = float(value)
    powers = [rail["A"] * rail["V"] for rail in rails.values() if len(rail) == 2]
    return sum(powers) if powers else None


def clock_mhz() -> tuple[float | None, float]:
    """The CPU's clock and the CPU time that asking took, seconds."""
    answer, cpu_s = ask("measure_clock", "arm")
    return parse_clock_mhz(answer) or parse_khz(read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")), cpu_s


def temperature_c() -> float | None:
    return parse_millidegrees(read("/sys/class/thermal/thermal_zone0/temp"))


def throttled_bits() -> tuple[int | None, float]:
    """Throttle bits and the CPU time that asking took, seconds."""
    answer, cpu_s = ask("get_throttled")
    bits = parse_throttled(answer)
    return (bits if bits is not None else cached_throttled_bits()), cpu_s


def cached_throttled_bits() -> int | None:
    """The bits as the kernel last asked for them, without starting a process. Only where its voltage monitor
    (raspberrypi-hwmon) is loaded, which asks every 2 s: without it the kernel never asks again."""
    return parse_throttled(read(_throttled_file())) if _voltage_monitor() else None


def under_voltage_alarm() -> bool | None:
    monitor = _voltage_monitor()
    return parse_alarm(read(monitor / "in0_lcrit_alarm")) if monitor else None


def power_w() -> tuple[float | None, float]:
    """What the board draws and the CPU time that asking took, seconds."""
    answer, cpu_s = ask("pmic_read_adc")
    return parse_power_w(answer), cpu_s


def version() -> str | None:
    return parse_version(ask("version")[0])


def read(path: str | Path | None) -> str | None:
    """A small file's text; None where this machine has no such file or does not let us read it."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace") if path else None
    except OSError:
        return None


def ask(*arguments: str) -> tuple[str | None, float]:
    """vcgencmd's answer and the CPU time its process took, seconds."""
    program = shutil.which("vcgencmd")
    if program is None:
        return None, 0.0
    try:
        child = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None, 0.0
    with _ended(child):
        assert child.stdout
        ready, _, _ = select.select([child.stdout], [], [], ANSWER_WITHIN_S)
        answer = os.read(child.stdout.fileno(), _ANSWER_BYTES) if ready else b""
        if not ready:
            os.kill(child.pid, signal.SIGKILL)  # not Popen's, which may reap it before wait4 does
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    cpu_s = usage.ru_utime + usage.ru_stime
    return (answer.decode("utf-8", "replace") if child.returncode == 0 else None), cpu_s


@contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Never leave the child behind, whatever interrupts the waiting."""
    try:
        yield
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
        assert child.stdout
        child.stdout.close()


@cache
def _throttled_file() -> Path | None:
    return next(iter(sorted(_PLATFORM.glob("soc*/*firmware/get_throttled"))), None)


@cache
def _voltage_monitor() -> Path | None:
    return next((path.parent for path in _HWMON.glob("*/name") if (read(path) or "").strip() == "rpi_volt"), None)
