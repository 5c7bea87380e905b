"""A real OpenSSH server on loopback, as an ordinary process of the user who runs the tests."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.hosts import Host

SSHD = Path("/usr/sbin/sshd")


@dataclass(frozen=True)
class Server:
    """`host` reaches it; the device's home is a folder with a space in its name, to catch what is not quoted."""

    folder: Path
    host: Host
    pid: int

    @property
    def home(self) -> Path:
        return Path(self.host.home)

    def sessions(self) -> list[psutil.Process]:
        """The server's processes that serve a connection."""
        return _sessions(self.pid)

    def cut(self) -> int:
        """Kill every connection as if the cable were pulled; how many processes there were."""
        return _kill_sessions(self.pid)


def _sessions(server_pid: int) -> list[psutil.Process]:
    """Processes come and go while we look at them."""
    found = []
    for process in psutil.Process(server_pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("sshd"):
                found.append(process)
    return found


def _kill_sessions(server_pid: int) -> int:
    victims = _sessions(server_pid)
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return len(victims)


def missing() -> str:
    """Why no server can be run here; empty = it can."""
    if not SSHD.exists():
        return f"no {SSHD}: install openssh-server"
    return "" if shutil.which("ssh") else "no ssh: install openssh-client"


@contextmanager
def serve(folder: Path, name: str = "box") -> Iterator[Server]:
    """Start a server that lets the current user in with one key, and nothing else; skips (fails under CI) without."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder.mkdir(parents=True, exist_ok=True)
    for key in ("host_key", "user_key"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd asks for it when root runs it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server_config = folder / "sshd_config"
    server_config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/user_key.pub\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "MaxStartups 100\n"
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    client_config = folder / "ssh_config"
    client_config.write_text(
        f"Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n"
    )
    log = (folder / "sshd.log").open("wb")
    with log, subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(server_config)], stderr=log) as process:
        try:
            _wait_for(port, process, folder / "sshd.log")
            home = folder / "device home"
            home.mkdir()
            host = Host(
                name,
                name,
                ("-F", str(client_config)),
                python=sys.executable,
                home=str(home),
                site_provided=True,
            )
            yield Server(folder, host, process.pid)
        finally:
            _kill_sessions(process.pid)
            process.terminate()
            process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"sshd does not answer: {log.read_text()}")
