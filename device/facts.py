"""What the machine says of itself: `parse_*` are pure over captured text, `collect` reads and calls them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path

from device import firmware
from device.firmware import read
from device.memory import parse_kib_fields
from device.results import Facts

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


def collect(work: Path | None = None) -> Facts:
    """Read the machine now; takes about 0.3 s, a third of it busy on one core. work: the folder whose disk counts."""
    memory = parse_kib_fields(read("/proc/meminfo") or "")
    cpuinfo = read("/proc/cpuinfo") or ""
    busy_percent = _busy_percent_now()
    _spin()  # an idle governor shows its lowest clock; what counts is the one under load
    return Facts(
        time_unix_s=time.time(),
        machine=platform.machine(),
        board=parse_board(
            read("/proc/device-tree/model"),
            read("/sys/class/dmi/id/sys_vendor"),
            read("/sys/class/dmi/id/product_name"),
        ),
        cpu=parse_cpu_name(cpuinfo),
        cores=os.cpu_count() or 1,
        os=parse_os_name(read("/etc/os-release") or ""),
        kernel=platform.release(),
        python=platform.python_version(),
        page_size_bytes=os.sysconf("SC_PAGE_SIZE"),
        mem_total_bytes=memory.get("MemTotal", 0),
        mem_available_bytes=memory.get("MemAvailable", 0),
        swap_used_bytes=memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
        load_1min=parse_load(read("/proc/loadavg") or "0"),
        cpu_busy_percent=busy_percent,
        clock_mhz=firmware.clock_mhz()[0],
        governor=parse_word(read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        temperature_c=firmware.temperature_c(),
        throttled_bits=firmware.throttled_bits()[0],
        runtimes=versions(),
        board_revision=parse_revision(cpuinfo, _read_bytes("/proc/device-tree/system/linux,revision")),
        firmware=parse_firmware(
            firmware.version(),
            _read_bytes("/proc/device-tree/chosen/bootloader/version"),
            _read_bytes("/proc/device-tree/chosen/bootloader/build-timestamp"),
        ),
        storage=_storage(work) if work else None,
        swap_total_bytes=memory.get("SwapTotal", 0),
        under_voltage_alarm=firmware.under_voltage_alarm(),
    )


def versions() -> dict[str, str]:
    """Versions of what computes, without importing it; packages that are not installed are left out."""
    found: dict[str, str] = {}
    for package in ("llama-cpp-python", "onnxruntime", "tokenizers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse_board(device_tree: str | None, vendor: str | None, product: str | None) -> str:
    """The device tree's model (ends with NUL) or the DMI vendor and product."""
    if device_tree:
        return device_tree.rstrip("\0").strip()
    return " ".join(part.strip() for part in (vendor, product) if part and part.strip()) or "unknown"


def parse_revision(cpuinfo: str, device_tree: bytes | None) -> str | None:
    """The Pi's revision code, `d03114`: four bytes in the device tree, or a line the Pi's kernel adds to cpuinfo."""
    if device_tree and len(device_tree) == 4:
        return f"{int.from_bytes(device_tree, 'big'):x}"
    found = re.search(r"^Revision\s*: ([0-9a-f]+)$", cpuinfo, re.MULTILINE)
    return found.group(1) if found else None


def parse_firmware(version: str | None, bootloader: bytes | None, built: bytes | None) -> str | None:
    """The GPU's firmware, and the boot loader's hash and build time (seconds, four bytes big-endian)."""
    parts = [version] if version else []
    if bootloader:
        name = bootloader.rstrip(b"\0").decode("ascii", "replace").strip()[:12]
        known = built is not None and len(built) == 4
        day = time.strftime(" of %Y-%m-%d", time.gmtime(int.from_bytes(built or b"", "big"))) if known else ""
        parts.append(f"boot loader {name}{day}")
    return ", ".join(parts) or None


def parse_storage(device: str, card: str | None, rotational: str | None, file_system: str) -> str:
    """What a folder lies on: `SD card mmcblk0, ext4`.

    device: the disk's name in /sys/block, empty if it has none; card: its device/type; rotational: its queue's flag.
    """
    if device.startswith("mmcblk"):
        kind = {"SD": "SD card", "MMC": "eMMC"}.get((card or "").strip(), "SD card or eMMC")
    elif device.startswith("nvme"):
        kind = "NVMe SSD"
    elif device.startswith(("vd", "xvd")):
        kind = "virtual disk"
    elif device.startswith("sd"):
        kind = {"0": "SSD or USB stick", "1": "hard disk"}.get((rotational or "").strip(), "disk")
    else:
        kind = "block device" if device else "no disk of its own"
    return ", ".join(part for part in (f"{kind} {device}".strip(), file_system) if part)


def parse_file_system(mountinfo: str, device_number: str) -> str:
    """The type of the file system on `major:minor`, from /proc/self/mountinfo (proc(5)); empty if none is mounted."""
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split(" ")[2:3] == [device_number]:
            return source.partition(" ")[0]
    return ""


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


def parse_word(text: str | None) -> str | None:
    return (text or "").strip() or None


def _busy_percent_now() -> float:
    before = parse_cpu_ticks(read("/proc/stat") or "")
    time.sleep(BUSY_WINDOW_S)
    return busy_percent(before, parse_cpu_ticks(read("/proc/stat") or ""))


def _spin() -> None:
    end_s = time.monotonic() + SPIN_S
    while time.monotonic() < end_s:
        pass


def _storage(folder: Path) -> str | None:
    try:
        number = folder.stat().st_dev
    except OSError:
        return None
    name = f"{os.major(number)}:{os.minor(number)}"
    file_system = parse_file_system(read("/proc/self/mountinfo") or "", name)
    node = Path("/sys/dev/block", name).resolve()
    disk = node.parent if (node / "partition").exists() else node
    if not disk.is_dir():
        return parse_storage("", None, None, file_system)
    return parse_storage(disk.name, read(disk / "device" / "type"), read(disk / "queue" / "rotational"), file_system)


def _read_bytes(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None
