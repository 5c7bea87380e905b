"""The emulated Pi for real, at both depths: what docs/emulator.md says of it, checked."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from device.records import SlimpiError
from pipeline.emulator import ALIAS, Image, Running, boot, build, cut_power, host, run_user, shut_down, status
from pipeline.emulator.rootfs import PYTHON, user_rootfs
from pipeline.progress import Progressor

pytestmark = pytest.mark.slow

CACHE = Path(__file__).parent.parent / "models" / "artifacts" / ".emulator"

# One instruction each, as words for the CPU: what ARMv8.0-A lacks, and two it has.
LATER_THAN_ARMV8_0 = {
    "sdot v0.4s, v1.16b, v2.16b": [0x4E829420],
    "fadd h0, h1, h2": [0x1EE22820],
    "ldadd wzr, w1, [sp]": [0x2A1F03E0, 0xB82003E1],  # w0 is cleared first: nothing is added to the stack
    "sqrdmlah v0.4s, v1.4s, v2.4s": [0x6E828420],
    "ldapr w0, [sp]": [0xB8BFC3E0],
    "smmla v0.4s, v1.16b, v2.16b": [0x4E82A420],
    "bfdot v0.4s, v1.8h, v2.8h": [0x6E42FC20],
    "ptrue p0.b": [0x2518E3E0],
}
EXECUTED = {"crc32b w0, w0, w0": [0x1AC04000], "aese v0.16b, v1.16b": [0x4E284820]}
EXECUTE = """
import ctypes, mmap, sys
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b"".join(int(word).to_bytes(4, "little") for word in (*sys.argv[1:], 0xD65F03C0)))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


def skip_or_fail(reason: str) -> None:
    """A green run under CI=true must have run the test."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


# ---- one program at a time (QEMU's user emulation)


@pytest.fixture(scope="module")
def rootfs() -> Path:
    if missing := host.missing_packages(host.USER_TOOLS):
        skip_or_fail(f"apt packages missing: {' '.join(missing)}")
    return user_rootfs(CACHE, Progressor(plain=True))


@pytest.mark.parametrize("name", [*LATER_THAN_ARMV8_0, *EXECUTED])
def test_one_program_dies_of_instructions_the_board_lacks(rootfs: Path, name: str) -> None:
    words = [str(word) for word in (LATER_THAN_ARMV8_0 | EXECUTED)[name]]
    done = run_user(rootfs, [PYTHON, "-c", EXECUTE, *words], {"QEMU_CPU": "max"})  # cannot be overridden
    assert done.returncode == (-4 if name in LATER_THAN_ARMV8_0 else 0), done.stderr
    # Negative control: the same words run on a CPU that has them.
    env = {"QEMU_CPU": "max", "QEMU_LD_PREFIX": str(rootfs)}
    argv = ["qemu-aarch64-static", f"{rootfs}{PYTHON}", "-c", EXECUTE, *words]
    subprocess.run(argv, env={**os.environ, **env}, check=True)


def test_one_program_sees_the_boards_cpuinfo_and_its_environment(rootfs: Path) -> None:
    code = "import os, platform, sys; print(platform.machine(), os.environ['X'], sys.stdin.read())"
    done = run_user(rootfs, [PYTHON, "-c", f"{code}; print(open('/proc/cpuinfo').read())"], {"X": "y z"}, stdin=b"in")
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "aarch64 y z in"
    assert sum(line.split()[-1:] == ["0xd08"] for line in lines) == 4
    assert "Raspberry Pi 4 Model B" in done.stdout.decode()
    with pytest.raises(SlimpiError, match="over 1 s"):
        run_user(rootfs, [PYTHON, "-c", "while True: pass"], timeout_s=1.0)


# ---- the whole machine


@pytest.fixture(scope="module")
def image() -> Image:
    if missing := host.missing_packages(host.system_tools()):
        skip_or_fail(f"apt packages missing: {' '.join(missing)}")
    return build(CACHE, Progressor(plain=True))


@pytest.fixture(scope="module")
def pi(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state_dir = tmp_path_factory.mktemp("pi")
    running = boot(image, state_dir, memory_mib=1024, lifetime_h=0.5)
    yield running
    if found := status(state_dir):
        cut_power(found)


def in_guest(pi: Running, script: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    argv = ["ssh", "-F", str(pi.ssh_config), pi.host, script]
    return subprocess.run(argv, input=stdin, capture_output=True, timeout=120)


def test_the_machine_is_a_cortex_a72_that_lacks_what_the_board_lacks(pi: Running) -> None:
    runs = [f'python3 - {" ".join(map(str, words))} <<< "$code"; echo $?' for words in LATER_THAN_ARMV8_0.values()]
    runs += [f'python3 - {" ".join(map(str, words))} <<< "$code"; echo $?' for words in EXECUTED.values()]
    script = "code=$(cat); grep -c 'CPU part.*0xd08' /proc/cpuinfo; lscpu | grep 'Model name'; " + "; ".join(runs)
    lines = in_guest(pi, script, EXECUTE.encode()).stdout.decode().splitlines()
    assert lines[0] == "4"
    assert "Cortex-A72" in lines[1]
    assert lines[2:] == ["132"] * len(LATER_THAN_ARMV8_0) + ["0"] * len(EXECUTED)


def test_the_user_is_ordinary_and_the_tools_are_there(pi: Running) -> None:
    script = """
        exec 2> /dev/null
        id -un; id -u; id -G; command -v sudo || echo none; touch /etc/x || echo denied
        cat /etc/ssh/ssh_host_ed25519_key || echo denied; stat -c %U /etc/passwd; systemctl is-system-running
        python3 -c 'import sys, ssl, sqlite3, lzma; print(*sys.version_info[:2])'
        rsync --version | head -1 | cut -c1-5; tr -d '\\0' < /proc/device-tree/compatible
    """
    said = in_guest(pi, script).stdout.decode().split("\n")
    assert said[:7] == ["pi", "1000", "1000", "none", "denied", "denied", "root"]
    assert said[7:] == ["running", "3 11", "rsync", "linux,dummy-virt"]


def test_the_machine_reaches_nothing_and_is_reached_on_loopback_only(pi: Running) -> None:
    code = """
import socket, sys
for host in ("10.0.2.2", "10.0.2.3", "192.0.2.1"):
    try:
        socket.create_connection((host, int(sys.argv[1])), timeout=5).close()
        print("reached", host)
    except OSError:
        print("cut off")
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # the host's side does answer
        done = in_guest(pi, f"python3 - {port}", code.encode())
    assert done.stdout.decode().splitlines() == ["cut off"] * 3, done.stderr
    listening = [c.laddr for c in psutil.Process(pi.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(a.ip, a.port) for a in listening] == [("127.0.0.1", pi.port)]


def test_ssh_refuses_a_machine_with_another_host_key(pi: Running, tmp_path: Path) -> None:
    other = tmp_path / "known_hosts"
    key = (Path(pi.ssh_config).read_text().split("IdentityFile ")[1].splitlines()[0].strip('"')) + ".pub"
    other.write_text(f"{ALIAS} {Path(key).read_text()}")
    argv = ["ssh", "-F", str(pi.ssh_config), "-o", f"UserKnownHostsFile={other}", pi.host, "true"]
    done = subprocess.run(argv, capture_output=True, timeout=120)
    assert done.returncode == 255
    assert b"Host key verification failed" in done.stderr


def test_power_cut_reboot_and_fresh_start(pi: Running, image: Image) -> None:
    """Last on this machine: synced files survive a power cut, a fresh start forgets them, the image stays as it is."""
    before = (image.disk.stat().st_mtime_ns, image.disk.stat().st_blocks)
    assert boot(image, pi.state_dir, memory_mib=1024) == pi  # already runs: the same one
    in_guest(pi, "echo kept > kept && sync kept").check_returncode()
    cut_power(pi)
    assert status(pi.state_dir) is None
    again = boot(image, pi.state_dir, memory_mib=1024, lifetime_h=0.5)
    assert in_guest(again, "cat kept").stdout == b"kept\n"
    assert shut_down(again)
    assert "Power down" in (pi.state_dir / "serial.log").read_text(errors="replace")
    fresh = boot(image, pi.state_dir, memory_mib=1024, fresh=True, lifetime_h=0.5)
    assert in_guest(fresh, "ls").stdout == b""
    assert (image.disk.stat().st_mtime_ns, image.disk.stat().st_blocks) == before


def test_a_boot_that_fails_shows_the_serial_log_and_leaves_nothing_running(image: Image, tmp_path: Path) -> None:
    broken = Image("broken", tmp_path / "broken")
    shutil.copytree(image.folder, broken.folder, copy_function=os.symlink)
    broken.initrd.unlink()
    broken.initrd.write_bytes(b"nothing a kernel could start")
    with pytest.raises(
        SlimpiError, match=r"ended while it started.* Kernel panic - not syncing: VFS: Unable to mount root"
    ):
        boot(broken, tmp_path / "run", memory_mib=512, timeout_s=120)
    assert status(tmp_path / "run") is None


def test_the_machine_ends_with_its_lifetime(image: Image, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(SlimpiError, match="ended while it started"):
        boot(image, tmp_path, memory_mib=512, lifetime_h=4 / 3600, timeout_s=240)
    assert time.monotonic() - started < 60
    assert status(tmp_path) is None


def test_qemu_that_does_not_start_is_an_error(image: Image, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=r"QEMU did not start: .*memory"):
        boot(replace(image, key="x"), tmp_path, memory_mib=2**31)
