"""The seam between the machines: run a program there, copy files there. OpenSSH and rsync as the user has them.

`run(host, argv, ...)` is all that deploy knows of a network; for `local` it is a child process. Options, keys, jump
hosts, known_hosts and host key checks are those of the user's ssh configuration. No password passes through slimpi:
ssh itself may ask for one on the terminal when the link is opened, never later.
"""

from __future__ import annotations

import functools
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from device.records import SlimpiError
from pipeline.hosts import Host
from pipeline.progress import Tick, quiet

OnLine = Callable[[bytes], None]
Lines = Generator[bytes, None, tuple[int, str]]

LINK_FAILED = 255
"""ssh's exit code when the link failed; a remote program's own codes are passed through."""

_RSYNC_LINK_FAILED = (10, 12, 14, 30, 35, LINK_FAILED)
"""rsync's codes when the stream broke (which one depends on what it was doing: socket, protocol, its own pipe to
ssh), timed out, or ssh failed."""

STOP_GRACE_S = 10.0
MAX_LINE_BYTES = 1 << 26
STALLED_COPY_S = 60
_CHUNK_BYTES = 1 << 16
_COPY_BYTES = 1 << 20
_QUOTED_BYTES = 4000
_OLDEST_RSYNC = (3, 1)  # --info and --append-verify as used here


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: raised by the command line's signal handler, and by `run` once `cancel` is set, since signals
    reach only the main thread. No Exception, so that nothing on the way takes it for a failure."""


def run(
    host: Host,
    argv: Sequence[str],
    stdin: bytes | BinaryIO,
    on_line: OnLine,
    *,
    silence_s: float | None = None,
    cancel: threading.Event | None = None,
    foreground: bool = False,
) -> tuple[int, str]:
    """Run argv on the host, feed it stdin, hand over each line of its stdout; exit code and the end of stderr.

    LINK_FAILED if ssh failed or nothing came for silence_s. SlimpiError for a line over MAX_LINE_BYTES. stdin may be
    an open file: it is read from where it stands. foreground: the child may ask on the terminal.
    """
    if host.is_local:
        return _run(list(argv), stdin, on_line, silence_s, cancel, foreground)
    code, errors = _run(ssh_argv(host, argv, may_ask=foreground), stdin, on_line, silence_s, cancel, foreground)
    return (code if code >= 0 else LINK_FAILED), errors  # below 0: ssh itself was killed


def stream(host: Host, argv: Sequence[str], stdin: BinaryIO, cancel: threading.Event | None = None) -> Lines:
    """As `run`, for a talk without end: yields the lines as they come, and returns (exit code, end of stderr).

    Closing the generator ends the program.
    """
    command = list(argv) if host.is_local else ssh_argv(host, argv)
    code, errors = yield from _lines_of(command, stdin, None, cancel, False)
    return (code if code >= 0 or host.is_local else LINK_FAILED), errors


def ssh_argv(host: Host, argv: Sequence[str], may_ask: bool = False) -> list[str]:
    """ssh hands the device's shell one line whatever it is given: quoted by shlex, the words arrive as they are.

    BatchMode: a question that nobody sees would hang the run; it fails instead.
    """
    batch = () if may_ask else ("-o", "BatchMode=yes")
    return ["ssh", *host.ssh_options, *batch, "-T", "--", host.destination, shlex.join(argv)]


@contextmanager
def shared_link(host: Host) -> Iterator[Host]:
    """The host with one connection for all commands (ControlMaster), closed at the end.

    A user's own ControlPath is used as it is.
    """
    if host.is_local:
        yield host
        return
    configured = effective_options(host)
    options: list[str] = []
    if configured.get("serveraliveinterval", "0") == "0":
        options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]
    own = configured.get("controlpath", "none") == "none"
    with tempfile.TemporaryDirectory(prefix="slimpi-") as folder:
        if own:
            path = f"{folder}/link".replace("%", "%%")
            options += ["-o", "ControlMaster=auto", "-o", f"ControlPath={path}", "-o", "ControlPersist=60"]
        linked = replace(host, ssh_options=(*host.ssh_options, *options))
        try:
            yield linked
        finally:
            if own:
                cut_link(linked)


def open_link(linked: Host) -> tuple[int, str]:
    """Log in; on a terminal ssh may ask for a password or whether to trust a new host key."""
    return run(linked, ["true"], b"", lambda line: None, foreground=sys.stdin.isatty())


def cut_link(linked: Host) -> None:
    """End our shared connection, so that the next command opens a new one; fine if there is none."""
    if not any(option.startswith("ControlMaster=") for option in linked.ssh_options):
        return
    argv = ["ssh", *linked.ssh_options, "-O", "exit", "--", linked.destination]
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=STOP_GRACE_S)


def effective_options(host: Host) -> dict[str, str]:
    """What ssh makes of its configuration for this host (`ssh -G`), lower-case names; the last of repeated ones."""
    argv = [_tool("ssh"), *host.ssh_options, "-G", "--", host.destination]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlimpiError(f"ssh refuses {host.name}: {_last_line(done.stderr)} Check your ssh configuration.")
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def unreachable(host: Host, errors: str) -> SlimpiError:
    """The one line for a link that cannot be opened, with what helps against its usual causes."""
    said = _last_line(errors) or "ssh said nothing"
    for sign, remedy in (
        ("Host key verification failed", f"Log in once by hand and check the key: ssh {host.destination}"),
        ("Permission denied", f"Give it your key: ssh-copy-id {host.destination}"),
        ("Could not resolve", "Check the name; raspberrypi.local needs mDNS, an address always works"),
    ):
        if sign in errors:
            return SlimpiError(f"cannot log in to {host.name}: {said} {remedy}.")
    return SlimpiError(f"cannot reach {host.name}: {said} Check that it is on and that `ssh {host.destination}` works.")


@dataclass(frozen=True)
class Parcel:
    """A file to be sent: where it lies here, and its name there (its sha256); `sent_before` bytes are there already."""

    path: Path
    sha256: str
    size_bytes: int
    sent_before: int = 0


def push(
    host: Host,
    parcels: Sequence[Parcel],
    folder: str,
    *,
    device_has_rsync: bool,
    tick: Tick = quiet,
    cancel: threading.Event | None = None,
) -> tuple[int, str, dict[str, int]]:
    """Send files to folder/<sha256> on the host, going on where an earlier attempt ended.

    Returns exit code (LINK_FAILED: try again), the end of stderr, and bytes sent per sha256. What arrived is not
    checked here: the depot admits a file by its hash.
    """
    way = _push_rsync if device_has_rsync and rsync_usable() else _push_tar
    return way(host, parcels, folder, tick, cancel)


@functools.cache
def rsync_usable() -> bool:
    """Whether this machine has an rsync new enough; macOS ships one that is not."""
    tool = shutil.which("rsync")
    if tool is None:
        return False
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version v?(\d+)\.(\d+)", said)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    return version >= _OLDEST_RSYNC and "openrsync" not in said


def _push_rsync(
    host: Host, parcels: Sequence[Parcel], folder: str, tick: Tick, cancel: threading.Event | None
) -> tuple[int, str, dict[str, int]]:
    sent: dict[str, int] = {}
    total = sum(p.size_bytes - p.sent_before for p in parcels)

    def take(line: bytes) -> None:
        done = re.fullmatch(rb"(\d+) ([0-9a-f]{64})", line.strip())
        progress = re.match(rb"\s*(\d+)\s+\d+%", line)
        if done:
            sent[done[2].decode()] = int(done[1])
        elif progress:
            tick(min(int(progress[1]), total), total, "bytes")

    with tempfile.TemporaryDirectory(prefix="slimpi-") as staging:
        for parcel in parcels:
            (Path(staging) / parcel.sha256).symlink_to(parcel.path.resolve())
        # --append-verify writes in place, resumes, resends what does not fit; -s keeps the path from the shell there.
        options = ["-rL", "-s", "--append-verify", f"--timeout={STALLED_COPY_S}"]
        options += ["--no-human-readable", "--info=progress2", "--outbuf=L", "--out-format=%b %n"]
        rsh = " ".join(_for_rsync(word) for word in ["ssh", *host.ssh_options, "-o", "BatchMode=yes", "-T"])
        user, at, name = host.destination.rpartition("@")
        place = f"{user}{at}[{name}]" if ":" in name else host.destination
        argv = [_tool("rsync"), *options, "-e", rsh, "--", f"{staging}/", f"{place}:{folder}/"]
        code, errors = _run(argv, b"", take, None, cancel, False)
    return (LINK_FAILED if code in _RSYNC_LINK_FAILED else code), errors, sent


def _for_rsync(word: str) -> str:
    """rsync splits -e itself: single quotes keep spaces, a doubled one stands for itself."""
    return "'" + word.replace("'", "''") + "'"


def _push_tar(
    host: Host, parcels: Sequence[Parcel], folder: str, tick: Tick, cancel: threading.Event | None
) -> tuple[int, str, dict[str, int]]:
    """Without rsync: files begun before are continued with dd, the others go as one tar stream."""
    sent: dict[str, int] = {}
    total = sum(p.size_bytes - p.sent_before for p in parcels)
    for parcel in parcels:
        if not 0 < parcel.sent_before < parcel.size_bytes:
            continue
        at = f"seek={parcel.sent_before}"
        argv = ["dd", f"of={folder}/{parcel.sha256}", at, "oflag=seek_bytes", "conv=notrunc", "bs=64K", "status=none"]
        with parcel.path.open("rb") as handle:
            handle.seek(parcel.sent_before)
            code, errors = run(host, argv, handle, lambda line: None, cancel=cancel)
        if code:
            return code, errors, sent
        sent[parcel.sha256] = parcel.size_bytes - parcel.sent_before
        tick(sum(sent.values()), total, "bytes")
    fresh = [p for p in parcels if p.sha256 not in sent]
    if not fresh:
        return 0, "", sent
    code, errors = _stream_tar(host, fresh, folder, sent, lambda: tick(sum(sent.values()), total, "bytes"), cancel)
    return code, errors, sent


def _stream_tar(
    host: Host,
    parcels: Sequence[Parcel],
    folder: str,
    sent: dict[str, int],
    tell: Callable[[], None],
    cancel: threading.Event | None,
) -> tuple[int, str]:
    """The tar is written by a thread into a pipe that ssh reads: nothing of it touches the disk here."""
    reader, writer = os.pipe()

    def write() -> None:
        try:
            with os.fdopen(writer, "wb") as out, tarfile.open(fileobj=out, mode="w|") as archive:
                for parcel in parcels:
                    member = tarfile.TarInfo(parcel.sha256)
                    member.size, member.mode = parcel.size_bytes, 0o644
                    with parcel.path.open("rb") as handle:
                        archive.addfile(member, handle)
                    sent[parcel.sha256] = parcel.size_bytes
                    tell()
        except OSError:  # the link is gone: ssh's exit code says so
            return

    with os.fdopen(reader, "rb") as feed:
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        argv = ["tar", "-x", "--no-same-owner", "-f", "-", "-C", folder]
        code, errors = run(host, argv, feed, lambda line: None, cancel=cancel)
    thread.join()
    return code, errors


def _run(
    command: Sequence[str],
    stdin: bytes | BinaryIO,
    on_line: OnLine,
    silence_s: float | None,
    cancel: threading.Event | None,
    foreground: bool,
) -> tuple[int, str]:
    with closing(_lines_of(command, stdin, silence_s, cancel, foreground)) as lines:
        while True:
            try:
                line = next(lines)
            except StopIteration as end:
                return cast(tuple[int, str], end.value)
            on_line(line)


def _lines_of(
    command: Sequence[str],
    stdin: bytes | BinaryIO,
    silence_s: float | None,
    cancel: threading.Event | None,
    foreground: bool,
) -> Lines:
    _tool(command[0])
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as feed:
        if isinstance(stdin, bytes):
            feed.write(stdin)
            feed.seek(0)
        # Out of the terminal's process group: Ctrl-C reaches slimpi, which then ends its children in order.
        group = {} if foreground else {"process_group": 0}
        source = feed if isinstance(stdin, bytes) else stdin
        child = subprocess.Popen(list(command), stdin=source, stdout=subprocess.PIPE, stderr=errors, **group)  # type: ignore[call-overload]
        try:
            silent = not (yield from _pump(child, silence_s, cancel))
            code = LINK_FAILED if silent else child.wait()
        finally:
            _stop(child)
            child.stdout.close()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _QUOTED_BYTES))
        said = errors.read().decode(errors="replace").strip()
        return code, said or (f"no sign of life for {silence_s:.0f} s" if silent else "")


def _pump(
    child: subprocess.Popen[bytes], silence_s: float | None, cancel: threading.Event | None
) -> Generator[bytes, None, bool]:
    """Yield lines (ended by newline or, in rsync's progress, return) until the end; False: silent for too long."""
    assert child.stdout
    pending = bytearray()
    heard_s = time.monotonic()
    while True:
        if cancel and cancel.is_set():
            raise Interrupted
        ready, _, _ = select.select([child.stdout], [], [], 0.5)
        if not ready:
            if silence_s and time.monotonic() - heard_s > silence_s:
                return False
            continue
        heard_s = time.monotonic()
        chunk = os.read(child.stdout.fileno(), _CHUNK_BYTES)
        pending += chunk
        if not chunk or b"\n" in chunk or b"\r" in chunk:
            *lines, rest = re.split(rb"(?<=[\n\r])", pending)
            pending = bytearray(rest)
            yield from map(bytes, lines)
        if not chunk:
            if pending:
                yield bytes(pending)
            return True
        if len(pending) > MAX_LINE_BYTES:
            raise SlimpiError(f"a line of over {MAX_LINE_BYTES} bytes came: not slimpi's output. Check the device.")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Let an agent close its journal, and ssh its link, before it is killed."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SlimpiError(f"{name} is not installed here. Install it (OpenSSH's client for ssh), then run again.")
    return found


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1][:300] if lines else ""
    return said if not said or said.endswith(".") else said + "."
