"""Facts parsers against captured-style texts."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import msgspec
import pytest

from device import facts, memory
from device.results import Facts

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
        (facts.parse_word, "ondemand\n", "ondemand"),
        (facts.parse_word, None, None),
        (facts.parse_load, "0.52 0.58 0.59 1/389 12345\n", 0.52),
    ],
)
def test_small_parsers(parse: Any, text: str | None, value: object) -> None:
    assert parse(text) == value


def test_revision_from_the_device_tree_or_from_cpuinfo() -> None:
    assert facts.parse_revision("", bytes.fromhex("00d03114")) == "d03114"
    assert facts.parse_revision(CPUINFO_PI4, None) == "d03114"
    assert facts.parse_revision(CPUINFO_PI4, b"") == "d03114"
    assert facts.parse_revision(CPUINFO_X86, None) is None


def test_firmware_names_both_parts_with_their_days() -> None:
    built = (1726012800).to_bytes(4, "big")  # 2024-09-11
    loader = b"69471177f23c0a9b8d1e\0"
    assert facts.parse_firmware("2808975b80f5 of Aug 30 2024", loader, built) == (
        "2808975b80f5 of Aug 30 2024, boot loader 69471177f23c of 2024-09-11"
    )
    assert facts.parse_firmware(None, loader, b"\0") == "boot loader 69471177f23c"
    assert facts.parse_firmware("x", None, built) == "x"
    assert facts.parse_firmware(None, None, None) is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("mmcblk0", "SD\n", "0", "ext4"), "SD card mmcblk0, ext4"),
        (("mmcblk1", "MMC\n", "0", "f2fs"), "eMMC mmcblk1, f2fs"),
        (("mmcblk0", None, None, ""), "SD card or eMMC mmcblk0"),
        (("nvme0n1", None, "0\n", "ext4"), "NVMe SSD nvme0n1, ext4"),
        (("sda", None, "0\n", "ext4"), "SSD or USB stick sda, ext4"),
        (("sda", None, "1\n", "ext4"), "hard disk sda, ext4"),
        (("vda", None, "1\n", "ext4"), "virtual disk vda, ext4"),
        (("zram0", None, "0\n", "ext4"), "block device zram0, ext4"),
        (("", None, None, "tmpfs"), "no disk of its own, tmpfs"),
    ],
)
def test_storage(arguments: tuple[str, str | None, str | None, str], told: str) -> None:
    assert facts.parse_storage(*arguments) == told


MOUNTINFO = """24 30 0:22 / /proc rw,nosuid shared:12 - proc proc rw
30 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw
31 30 179:1 / /boot/firmware rw,relatime - vfat /dev/mmcblk0p1 rw,fmask=0022
"""


def test_file_system() -> None:
    assert facts.parse_file_system(MOUNTINFO, "179:2") == "ext4"
    assert facts.parse_file_system(MOUNTINFO, "179:1") == "vfat"
    assert facts.parse_file_system(MOUNTINFO, "8:0") == ""


def test_storage_of_this_machine(tmp_path: Path) -> None:
    assert (facts.collect(Path("/dev/shm")).storage or "").endswith(", tmpfs")
    assert facts.collect(tmp_path).storage
    assert facts.collect(tmp_path / "missing").storage is None
    assert facts.collect().storage is None


def test_collect_tells_of_this_machine() -> None:
    now = facts.collect()
    assert now.machine == platform.machine()
    assert 0 <= now.cpu_busy_percent <= 100
    assert 0 < now.mem_available_bytes <= now.mem_total_bytes
    assert now.runtimes.keys() == {"llama-cpp-python", "onnxruntime", "tokenizers", "numpy"}
    assert msgspec.json.decode(msgspec.json.encode(now), type=Facts) == now
