"""What the machine says of itself: `parse_*` are pure over captured text, `collect` reads and calls them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

from device.memory import parse_kib_fields
from device.runtimes import versions
from device.schema import Facts

BUSY_WINDOW_S = 0.2
SPIN_S = 0.1

# (implementer, part) of Arm's MIDR, as arch/arm64/include/asm/cputype.h names them; arm64 kernels print no names.
_ARM_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
}


def collect() -> Facts:
    """Read the machine now; takes about 0.3 s, a third of it busy on one core."""
    memory = parse_kib_fields(_read("/proc/meminfo") or "")
    cpuinfo = _read("/proc/cpuinfo") or ""
    busy_percent = _busy_percent_now()
    _spin()  # an idle governor shows its lowest clock; what counts is the one under load
    return Facts(
        time_unix_s=time.time(),
        machine=platform.machine(),
        board=parse_board(
            _read("/proc/device-tree/model"),
            _read("/sys/class/dmi/id/sys_vendor"),
            _read("/sys/class/dmi/id/product_name"),
        ),
        cpu=parse_cpu_name(cpuinfo),
        cores=os.cpu_count() or 1,
        os=parse_os_name(_read("/etc/os-release") or ""),
        kernel=platform.release(),
        python=platform.python_version(),
        page_size_bytes=os.sysconf("SC_PAGE_SIZE"),
        mem_total_bytes=memory.get("MemTotal", 0),
        mem_available_bytes=memory.get("MemAvailable", 0),
        swap_used_bytes=memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
        load_1min=parse_load(_read("/proc/loadavg") or "0"),
        cpu_busy_percent=busy_percent,
        clock_mhz=_clock_mhz_now(),
        governor=parse_word(_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        temperature_c=parse_millidegrees(_read("/sys/class/thermal/thermal_zone0/temp")),
        throttled_bits=parse_throttled(_vcgencmd("get_throttled")),
        runtimes=versions(),
    )


def parse_board(device_tree: str | None, vendor: str | None, product: str | None) -> str:
    """The device tree's model (ends with NUL) or the DMI vendor and product."""
    if device_tree:
        return device_tree.rstrip("\0").strip()
    return " ".join(part.strip() for part in (vendor, product) if part and part.strip()) or "unknown"


def parse_cpu_name(cpuinfo: str) -> str:
    """x86 names its model; arm64 gives implementer and part numbers."""
    fields = dict(re.findall(r"^([^\t:\n]+?)\s*:\s*(.*)$", cpuinfo, re.MULTILINE))
    if "model name" in fields:
        return fields["model name"]
    part = (fields.get("CPU implementer", ""), fields.get("CPU part", ""))
    if part in _ARM_CORES:
        return f"{_ARM_CORES[part]} r{int(fields.get('CPU variant', '0'), 0)}p{fields.get('CPU revision', '0')}"
    return " ".join(part).strip() or "unknown"


def parse_os_name(os_release: str) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)"?$', os_release, re.MULTILINE)
    return found.group(1) if found else "unknown"


def parse_load(loadavg: str) -> float:
    return float(loadavg.split()[0])


def parse_cpu_ticks(stat: str) -> tuple[int, int]:
    """(busy, total) clock ticks of all cores since boot from /proc/stat; idle and iowait are not busy."""
    found = re.search(r"^cpu +([\d ]+)$", stat, re.MULTILINE)
    if not found:
        return 0, 0
    user, nice, system, idle, iowait, irq, softirq, steal, *_ = (int(x) for x in (found.group(1) + " 0" * 8).split())
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def busy_percent(before: tuple[int, int], after: tuple[int, int]) -> float:
    total = after[1] - before[1]
    return 100.0 * (after[0] - before[0]) / total if total > 0 else 0.0


def parse_vcgencmd_clock(output: str | None) -> float | None:
    """`frequency(48)=1500345728` in MHz: the firmware's own clock, which the kernel's may not follow."""
    found = re.fullmatch(r"frequency\(\d+\)=(\d+)", (output or "").strip())
    return int(found.group(1)) / 1e6 if found and int(found.group(1)) else None


def parse_khz(text: str | None) -> float | None:
    """cpufreq's `1500000` in MHz."""
    return int(text) / 1e3 if text and text.strip().isdigit() else None


def parse_millidegrees(text: str | None) -> float | None:
    """A thermal zone's `48312` in degrees Celsius."""
    return int(text) / 1e3 if text and re.fullmatch(r"-?\d+", text.strip()) else None


def parse_throttled(output: str | None) -> int | None:
    """`throttled=0x50005`: bits 0-3 now, 16-19 since boot (under-voltage, capped, throttled, soft limit)."""
    found = re.fullmatch(r"throttled=(0x[0-9a-fA-F]+)", (output or "").strip())
    return int(found.group(1), 16) if found else None


def parse_word(text: str | None) -> str | None:
    return (text or "").strip() or None


def _clock_mhz_now() -> float | None:
    return parse_vcgencmd_clock(_vcgencmd("measure_clock", "arm")) or parse_khz(
        _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    )


def _busy_percent_now() -> float:
    before = parse_cpu_ticks(_read("/proc/stat") or "")
    time.sleep(BUSY_WINDOW_S)
    return busy_percent(before, parse_cpu_ticks(_read("/proc/stat") or ""))


def _spin() -> None:
    end_s = time.monotonic() + SPIN_S
    while time.monotonic() < end_s:
        pass


def _read(path: str) -> str | None:
    """A small file's text; None where this machine has no such file or does not let us read it."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _vcgencmd(*arguments: str) -> str | None:
    """The Pi firmware's answer; None on other boards and where the firmware cannot be asked."""
    program = shutil.which("vcgencmd")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
