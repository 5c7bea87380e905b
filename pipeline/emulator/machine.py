"""Boot, find and stop the emulated Pi. QEMU runs detached, with a life limit, reachable by ssh on loopback only."""

from __future__ import annotations

import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from device.records import SlimpiError, decode, write_atomic
from pipeline.emulator import host
from pipeline.emulator.image import ALIAS, USER, Image
from pipeline.emulator.rootfs import CPU
from pipeline.locks import locked

BOOT_TIMEOUT_S = 300.0
POWER_OFF_TIMEOUT_S = 60.0
LIFETIME_H = 12.0
TRANSLATION_CACHE_MIB = 256  # QEMU's own choice is a gigabyte of the host's memory

# Raspberry Pi OS starts its kernel without the memory controller, so limits that lean on it must fail here too.
BOARD_KERNEL_OPTIONS = ("cgroup_disable=memory",)


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """state.json: what was started from this folder last."""

    image_key: str
    pid: int
    port: int


@dataclass(frozen=True)
class Running:
    """An emulated Pi that answers: `ssh -F ssh_config host` logs in as its ordinary user."""

    state_dir: Path
    ssh_config: Path
    host: str
    pid: int
    port: int
    image_key: str


def boot(
    image: Image,
    state_dir: Path,
    memory_mib: int = 4096,
    cpus: int = 4,
    *,
    fresh: bool = False,
    lifetime_h: float = LIFETIME_H,
    timeout_s: float = BOOT_TIMEOUT_S,
    kernel_options: Sequence[str] = BOARD_KERNEL_OPTIONS,
) -> Running:
    """Start the image, or return the machine that already runs from `state_dir`.

    What the guest wrote is kept in `state_dir` from boot to boot; `fresh`, or another image, starts from the
    pristine disk. QEMU is ended after `lifetime_h` hours, come what may. SlimpiError with the end of the serial
    log if it does not answer to ssh within `timeout_s`.
    """
    tools = host.need(host.system_tools())
    state_dir = state_dir.resolve()
    with locked(state_dir):
        last = _read_state(state_dir)
        running = _alive(state_dir, last)
        if running and not fresh and running.image_key == image.key:
            return _wait_for_ssh(running, timeout_s)
        if running:
            shut_down(running)
        overlay = state_dir / "overlay.qcow2"
        if fresh or not overlay.is_file() or last is None or last.image_key != image.key:
            argv = [tools["qemu-img"], "create", "-q", "-f", "qcow2", "-F", "raw"]
            host.run_tool([*argv, "-b", str(image.disk.resolve()), str(overlay)], "make the emulated Pi's overlay disk")
        port = free_port()
        argv = qemu_argv(tools["qemu-system-aarch64"], image, state_dir, port, memory_mib, cpus, kernel_options)
        write_atomic(state_dir / "ssh_config", ssh_config_text(image, port).encode())
        pid = _start(argv, state_dir, lifetime_h)
        write_atomic(state_dir / "state.json", msgspec.json.encode(_State(image.key, pid, port)))
        started = Running(state_dir, state_dir / "ssh_config", ALIAS, pid, port, image.key)
        with ExitStack() as unless_it_boots:
            unless_it_boots.callback(cut_power, started)
            _wait_for_ssh(started, timeout_s)
            unless_it_boots.pop_all()
        return started


def status(state_dir: Path) -> Running | None:
    """The machine that runs from `state_dir`, or None."""
    return _alive(state_dir, _read_state(state_dir))


def shut_down(running: Running, timeout_s: float = POWER_OFF_TIMEOUT_S) -> bool:
    """Power off from inside, so that the disk is in order; False if it had to be ended from outside."""
    process = _qemu(running.pid, running.state_dir)
    # A guest that no longer answers is ended from outside.
    with suppress(SlimpiError):
        ssh(running, ["touch", "/run/slimpi/poweroff"], timeout_s=timeout_s / 2)
        if _gone(process, timeout_s):
            return True
    if process is not None:
        process.terminate()
    if not _gone(process, 10.0):
        cut_power(running)
    return False


def cut_power(running: Running) -> None:
    """As pulling the plug: what the guest did not sync is lost."""
    process = _qemu(running.pid, running.state_dir)
    if process is not None:
        process.kill()
    if not _gone(process, 30.0):
        raise SlimpiError(f"QEMU (process {running.pid}) does not end. Look at it with ps.")


def ssh(running: Running, argv: Sequence[str], timeout_s: float = 60.0) -> subprocess.CompletedProcess[bytes]:
    """Run a program in the guest as its user; SlimpiError with the end of its stderr if it fails."""
    tool = host.need({"ssh": "openssh-client"})["ssh"]
    # ssh hands the guest's shell one line, whatever it is given: quoted here, the words arrive as they are.
    command = [tool, "-F", str(running.ssh_config), running.host, "--", shlex.join(argv)]
    remedy = "Is it running? python -m pipeline.emulator status"
    return host.run_tool(command, f"run {argv[0]} on the emulated Pi", remedy=remedy, timeout_s=timeout_s)


def qemu_argv(
    qemu: str, image: Image, state_dir: Path, port: int, memory_mib: int, cpus: int, kernel_options: Sequence[str]
) -> list[str]:
    """`restrict=on` leaves the guest no network but the one forwarded port, and that on loopback."""
    kernel = ("console=ttyAMA0", "quiet", "panic=-1")
    overlay = str(state_dir / "overlay.qcow2").replace(",", ",,")
    serial = str(state_dir / "serial.log").replace(",", ",,")
    return [
        *(qemu, "-M", "virt", "-cpu", CPU, "-smp", str(cpus), "-m", f"{memory_mib}M"),
        *(
            "-accel",
            f"tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", " ".join((*kernel, *kernel_options))),
        *("-drive", f"if=none,id=disk,format=qcow2,file={overlay}", "-device", "virtio-blk-device,drive=disk"),
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", "virtio-net-device,netdev=net"),
        *("-display", "none", "-monitor", "none", "-serial", f"file:{serial}", "-pidfile", str(_pid_file(state_dir))),
    ]


def ssh_config_text(image: Image, port: int) -> str:
    """A file for `ssh -F`: no prompt, no agent, no key but this one, and the host key known beforehand.

    The key exchange is named because OpenSSH's default one, made for quantum computers, doubles a login's time here.
    """
    return "\n".join(
        [
            f"Host {ALIAS}",
            "  HostName 127.0.0.1",
            f"  Port {port}",
            f"  User {USER}",
            f"  IdentityFile {_quoted(image.identity)}",
            "  IdentitiesOnly yes",
            "  IdentityAgent none",
            f"  UserKnownHostsFile {_quoted(image.known_hosts)}",
            "  GlobalKnownHostsFile none",
            f"  HostKeyAlias {ALIAS}",
            "  StrictHostKeyChecking yes",
            "  KexAlgorithms curve25519-sha256",
            "  BatchMode yes",
            "  ForwardAgent no",
            "",
        ]
    )


def _quoted(path: Path) -> str:
    """A path as ssh_config(5) reads it: % starts a token, and a quote cannot be escaped."""
    text = str(path.resolve())
    if '"' in text or "\n" in text or "${" in text:
        raise SlimpiError(f"ssh's configuration cannot name {text!r}. Choose a cache folder with a plain name.")
    return '"' + text.replace("%", "%%") + '"'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(argv: Sequence[str], state_dir: Path, lifetime_h: float) -> int:
    """Start QEMU in a session of its own, under timeout(1), so that it is nobody's child and not for ever."""
    pid_file = _pid_file(state_dir)
    pid_file.unlink(missing_ok=True)
    (state_dir / "serial.log").unlink(missing_ok=True)
    limit = ["timeout", "--signal=TERM", "--kill-after=30", f"{lifetime_h * 3600:.0f}"]
    with (state_dir / "qemu.log").open("wb") as log:
        launcher = ["setsid", "--fork", *limit, *argv]
        subprocess.run(launcher, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        text = pid_file.read_text(encoding="ascii").strip() if pid_file.is_file() else ""
        if text:
            return int(text)
        if not any(str(pid_file) in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
            break
        time.sleep(0.1)
    said = host.tail((state_dir / "qemu.log").read_bytes())
    raise SlimpiError(f"QEMU did not start: {said or 'no message'}. Check the memory asked for and QEMU's version.")


def _wait_for_ssh(running: Running, timeout_s: float) -> Running:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if _qemu(running.pid, running.state_dir) is None:
            break
        if _greets(running.port):
            # sshd may greet and still refuse a login while the system starts.
            with suppress(SlimpiError):
                ssh(running, ["true"], timeout_s=max(1.0, deadline - time.monotonic()))
                return running
        time.sleep(0.5)
    how = f"did not answer to ssh within {timeout_s:.0f} s" if status(running.state_dir) else "ended while it started"
    serial = running.state_dir / "serial.log"
    qemu = host.tail((running.state_dir / "qemu.log").read_bytes())
    said = serial_excerpt(serial.read_text(encoding="utf-8", errors="replace") if serial.is_file() else "")
    raise SlimpiError(
        f"the emulated Pi {how}. {serial} ends: {said or '(empty)'} {qemu} "
        "Try again with --fresh, and with more time if this machine is busy."
    )


def serial_excerpt(log: str, lines: int = 8) -> str:
    """The end of a serial log, up to the kernel's panic if there is one: the stack trace after it tells nothing."""
    found = log.strip().splitlines()
    end = next((number for number, line in enumerate(found, 1) if "Kernel panic" in line), len(found))
    return " | ".join(line.strip() for line in found[max(0, end - lines) : end])


def _greets(port: int) -> bool:
    """QEMU accepts connections long before the guest's sshd is there to greet."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as link:
            return link.recv(8).startswith(b"SSH-2.0")
    except OSError:
        return False


def _read_state(state_dir: Path) -> _State | None:
    path = state_dir / "state.json"
    return decode(path.read_bytes(), _State, str(path)) if path.is_file() else None


def _alive(state_dir: Path, state: _State | None) -> Running | None:
    if state is None or _qemu(state.pid, state_dir) is None:
        return None
    return Running(state_dir, state_dir / "ssh_config", ALIAS, state.pid, state.port, state.image_key)


def _qemu(pid: int, state_dir: Path) -> psutil.Process | None:
    """The QEMU started from this folder if it runs, and not a later process with the same number."""
    try:
        process = psutil.Process(pid)
        return process if str(_pid_file(state_dir)) in process.cmdline() else None
    except psutil.NoSuchProcess:
        return None


def _gone(process: psutil.Process | None, timeout_s: float) -> bool:
    """Wait for the whole process: its command line goes before its threads let go of the disk."""
    if process is None:
        return True
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired:
        return False
    return True


def _pid_file(state_dir: Path) -> Path:
    return state_dir.resolve() / "qemu.pid"
