"""Which machine a job runs on: this one, one that ssh reaches, or the emulated Pi."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device.records import SlimpiError
from device.schema import Provenance
from pipeline.progress import Progressor
from pipeline.store import Places

# A name for ssh and for a folder of results: no leading dash (it would be an option), no slash, no space.
_DESTINATION = re.compile(r"\A(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:%-]{0,250}\Z")

# What device trees and DMI tables of virtual machines call themselves.
_VIRTUAL = re.compile(
    r"qemu|virt|kvm|vmware|virtualbox|xen|bochs|parallels|amazon ec2|google compute|alibaba cloud|hyper-?v|dummy",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Host:
    """A machine that runs jobs.

    name: how the user calls it, and its folder under benchmarks/results. destination: what ssh is given; empty =
    this machine. ssh_options: before the destination. python: its interpreter. home: where its store is, empty =
    ~/.slimpi. site_provided: its Python has the agent's packages already, so no wheels are sent.
    """

    name: str
    destination: str = ""
    ssh_options: tuple[str, ...] = ()
    python: str = "python3"
    home: str = ""
    site_provided: bool = False
    emulated: bool = False

    @property
    def is_local(self) -> bool:
        return not self.destination


LOCAL = Host("local")


def find(name: str, places: Places, progress: Progressor, ssh_config: Path | None = None) -> Host:
    """The host of a name given with --on: `local`, `emulated` (started if need be), or a destination of ssh."""
    known: dict[str, Callable[[], Host]] = {
        "local": lambda: LOCAL,
        "emulated": lambda: _emulated(places, progress),
    }
    return known.get(name, lambda: ssh_host(name, ssh_config))()


def ssh_host(name: str, ssh_config: Path | None = None) -> Host:
    """SlimpiError for a name that ssh could take for an option or that cannot name a folder."""
    if not _DESTINATION.match(name):
        raise SlimpiError(
            f"{name!r} is no host. Give `local`, `emulated`, [user@]host, or an alias from your ssh configuration "
            "(a port or a jump host goes there)."
        )
    if ssh_config and not ssh_config.is_file():
        raise SlimpiError(f"there is no ssh configuration {ssh_config}. Check --ssh-config.")
    return Host(name, name, ("-F", str(ssh_config.resolve())) if ssh_config else ())


def _emulated(places: Places, progress: Progressor) -> Host:
    from pipeline import emulator

    cache = places.artifacts / ".emulator"
    image = emulator.build(cache, progress)
    with progress.step("boot the emulated Pi"):
        running = emulator.boot(image, cache / "run")
    return Host("emulated", running.host, ("-F", str(running.ssh_config.resolve())), emulated=True)


def provenance(host: Host, machine: str, board: str) -> Provenance:
    """What figures taken there are worth. `measured` only where the machine itself says that it is a real Arm board;
    a virtual Arm machine, or one that does not say, is `emulated`; any x86 machine is as good as this one: `host`."""
    if host.is_local:
        return "host"
    if host.emulated:
        return "emulated"
    if machine != "aarch64":
        return "host"
    named = board.strip() not in ("", "unknown")
    return "measured" if named and not _VIRTUAL.search(board) else "emulated"
