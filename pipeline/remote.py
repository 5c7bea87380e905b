"""A device reached by ssh: bring the agent's code and files there once, start jobs apart from the link, follow them.

The device's side is device/depot.py. Everything is found again by its hash or its job's id, so each step may be
repeated: after a dropped link, or by the next run of slimpi after this one was killed.
"""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from device.records import SlimpiError, decode
from device.schema import File, Job
from pipeline import first_contact, transport
from pipeline.hosts import Host
from pipeline.progress import Progressor
from pipeline.replies import Admitted, Contact, Freed, Nothing, Placed, Started, Status, Stopped
from pipeline.transport import LINK_FAILED, Parcel

Reply = TypeVar("Reply")

BACKOFF_S: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
PATIENCE_S = 900.0
"""How long a device that answered before may be out of reach: a router's restart, a device's reboot."""

SILENCE_S = 20.0
"""`follow` says something every 5 s."""

COMMAND_SILENCE_S = 1800.0
"""A device that checks gigabytes on an SD card says nothing for minutes."""

DISK_RESERVE_BYTES = 128 * 2**20
"""Left free on the device: journals, reports, and what the system itself writes meanwhile."""

CLASSES = ("artifact", "wheels", "data", "code")


@dataclass(frozen=True)
class Goods:
    """A file the device needs: where it lies here, its hash and size, and what it counts as (CLASSES)."""

    path: Path
    sha256: str
    size_bytes: int
    kind: str


@dataclass(frozen=True)
class Device:
    """A device whose agent code is in place. `sent_bytes` counts what this run sent, by class.

    clock_ahead_s: its clock less this machine's, as well as one answer tells.
    """

    host: Host
    contact: Contact
    code_id: str
    progress: Progressor
    cancel: threading.Event
    clock_ahead_s: float = 0.0
    sent_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))

    @property
    def code_path(self) -> str:
        return f"{self.contact.home}/code/{self.code_id}"

    def say(self, message: str) -> None:
        self.progress.say(f"  {self.host.name}: {printable(message)}")


@contextmanager
def attach(host: Host, progress: Progressor, cancel: threading.Event) -> Iterator[Device]:
    """Open one link to the device, see that it has the agent's code, and close the link at the end.

    SlimpiError in one line if it cannot be reached or has no Python for us.
    """
    code_id, bundle = code_bundle()
    with transport.shared_link(host) as linked:
        code, errors = transport.open_link(linked)
        if code == LINK_FAILED:
            raise transport.unreachable(host, errors)
        sent = 0
        contact = _first_contact(linked, code_id, b"", cancel)
        if not contact.code:
            sent = len(bundle)
            contact = _first_contact(linked, code_id, bundle, cancel)
        if contact.error or not contact.code:
            raise SlimpiError(
                f"{host.name} cannot keep the agent's code in {printable(contact.home)}: {printable(contact.error)}. "
                "Free some space there or mend its permissions."
            )
        device = Device(linked, contact, code_id, progress, cancel, contact.time_unix_s - time.time())
        device.sent_bytes["code"] = sent
        yield device


def code_bundle() -> tuple[str, bytes]:
    """The `device` package as a zip, and the hash of its files: the same code has the same id anywhere."""
    from pipeline.wheelhouse import device_files

    files = device_files()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files:
            archive.writestr(path, content)
    return first_contact.tree_id(files), buffer.getvalue()


def call(device: Device, command: str, request: Mapping[str, Any], kind: type[Reply]) -> Reply:
    """One command of the depot; repeated while the link is down. SlimpiError with the depot's own line if it fails."""
    body = msgspec.json.encode(request)
    outage = Outage(device)
    while True:
        lines: list[bytes] = []
        argv = depot_argv(device, command)
        code, errors = transport.run(
            device.host, argv, body, lines.append, silence_s=COMMAND_SILENCE_S, cancel=device.cancel
        )
        if code == LINK_FAILED:
            outage.wait(errors)
            continue
        if code:
            said = errors.splitlines()[-1].removeprefix("slimpi depot: ") if errors else f"exit code {code}"
            raise SlimpiError(f"{device.host.name}: {printable(said)}")
        return decode(b"".join(lines), kind, f"the answer of {device.host.name} to `{command}`")


class Outage:
    """Waits between attempts at something that needs the link; gives up after PATIENCE_S without any progress."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.attempt = 0
        self.lost_s = 0.0

    def wait(self, errors: str, progressed: bool = False) -> None:
        """Call after a failed attempt, with ssh's words. SlimpiError when there is no more hope."""
        now_s = time.monotonic()
        if progressed or not self.attempt:
            self.attempt, self.lost_s = 0, now_s
        name = self.device.host.name
        if now_s - self.lost_s > PATIENCE_S:
            raise SlimpiError(
                f"{name} has been out of reach for {now_s - self.lost_s:.0f} s: {printable(errors)} "
                "What it runs goes on there: run the same command again to attach to it."
            )
        if not self.attempt:
            self.device.say(f"the link dropped ({printable(errors.splitlines()[-1]) if errors else 'no reason given'})")
        transport.cut_link(self.device.host)
        if self.device.cancel.wait(BACKOFF_S[min(self.attempt, len(BACKOFF_S) - 1)]):
            raise transport.Interrupted
        self.attempt += 1


def status(device: Device, goods: Sequence[Goods] = ()) -> Status:
    return call(device, "status", {"want": sorted({(g.sha256, g.size_bytes) for g in goods})}, Status)


def supply(device: Device, goods: Sequence[Goods], seen: Status | None = None, unpacked_bytes: int = 0) -> None:
    """Bring every file the device lacks into its store; what is there already is not sent.

    seen: `status` of these goods just before. unpacked_bytes: what the missing ones will take besides themselves.
    SlimpiError if they do not fit the disk, with the numbers, or if a file is refused twice.
    """
    by_hash = {g.sha256: g for g in goods}
    seen = seen or status(device, goods)
    _check_disk(device, seen, by_hash, unpacked_bytes)
    for attempt in (1, 2):
        missing = _transfer(device, by_hash, seen)
        seen = None
        if not missing:
            return
        if attempt == 1:
            forget(device, sorted(missing))
            device.say(f"{len(missing)} file(s) arrived damaged and are sent again: {_reasons(missing, by_hash)}")
    raise SlimpiError(
        f"{device.host.name} refuses {len(missing)} file(s) twice: {_reasons(missing, by_hash)}. "
        "Check its disk, and that the files here do not change."
    )


def _transfer(device: Device, by_hash: Mapping[str, Goods], seen: Status | None) -> dict[str, str]:
    """Send what is missing, over as many links as it takes; what the depot refuses in the end, with its reasons."""
    outage = Outage(device)
    before: dict[str, int] = {}
    failure = ""
    while True:
        seen = seen or status(device, list(by_hash.values()))
        missing = [by_hash[digest] for digest in seen.missing if digest in by_hash]
        parcels = [Parcel(g.path, g.sha256, g.size_bytes, seen.partial.get(g.sha256, 0)) for g in missing]
        left = {p.sha256: max(0, p.size_bytes - p.sent_before) for p in parcels}
        if failure:
            grown = {digest: before.get(digest, count) - count for digest, count in left.items()}
            _count(device, by_hash, grown)
            outage.wait(failure, progressed=any(count > 0 for count in grown.values()))
        if not missing:
            return {}
        code, failure, sent = _send(device, parcels, seen.rsync, sum(left.values()))
        seen = None
        if code == LINK_FAILED:
            before = left
            failure = failure or "no reason given"
            continue
        if code:
            last = failure.splitlines()[-1] if failure else f"exit code {code}"
            raise SlimpiError(f"sending to {device.host.name} failed: {printable(last)}. Check its disk and this one.")
        _count(device, by_hash, sent)
        files = [[g.sha256, g.size_bytes] for g in missing]
        return call(device, "admit", {"files": files}, Admitted).refused


def _send(
    device: Device, parcels: Sequence[Parcel], device_has_rsync: bool, total: int
) -> tuple[int, str, dict[str, int]]:
    with device.progress.step(f"{device.host.name}: send {total / 1e6:.1f} MB, {len(parcels)} files") as tick:
        return transport.push(
            device.host,
            parcels,
            f"{device.contact.home}/incoming",
            device_has_rsync=device_has_rsync,
            tick=tick,
            cancel=device.cancel,
        )


def _count(device: Device, by_hash: Mapping[str, Goods], sent: Mapping[str, int]) -> None:
    for digest, count in sent.items():
        device.sent_bytes[by_hash[digest].kind] += max(0, count)


def _check_disk(device: Device, seen: Status, by_hash: Mapping[str, Goods], unpacked_bytes: int) -> None:
    missing = [by_hash[digest] for digest in seen.missing if digest in by_hash]
    if not missing:
        return
    to_send = sum(max(0, g.size_bytes - seen.partial.get(g.sha256, 0)) for g in missing)
    extra = unpacked_bytes if any(g.kind == "wheels" for g in missing) else 0
    needed = to_send + extra + DISK_RESERVE_BYTES
    if needed > seen.free_bytes:
        raise SlimpiError(
            f"{device.host.name} has {seen.free_bytes / 1e6:.0f} MB free in {printable(seen.home)}, this needs "
            f"{needed / 1e6:.0f} MB ({to_send / 1e6:.0f} to send, {extra / 1e6:.0f} unpacked, "
            f"{DISK_RESERVE_BYTES / 1e6:.0f} reserve). Run `slimpi clean {device.host.name}`, or name fewer variants."
        )


def _reasons(refused: Mapping[str, str], by_hash: Mapping[str, Goods]) -> str:
    shown = [f"{by_hash[d].path.name if d in by_hash else d[:16]} ({printable(why)})" for d, why in refused.items()]
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def forget(device: Device, hashes: Sequence[str]) -> None:
    """Remove files from the device's store, so that they are sent again."""
    call(device, "drop", {"files": list(hashes)}, Nothing)


def replace_damaged(device: Device, artifact: str, goods: Sequence[Goods], complaint: str) -> bool:
    """Send the files again that the agent's complaint names as unlike their hash; whether it names any."""
    damaged = {g.sha256 for g in goods if f"{g.path.name} " in complaint and "expected" in complaint}
    if damaged:
        device.say(f"{len(damaged)} file(s) of {artifact} were damaged on the device and are sent again")
        forget(device, sorted(damaged))
        supply(device, goods)
    return bool(damaged)


def place(device: Device, folder: str, files: Sequence[File]) -> str:
    """Lay stored files out under their names; the folder's path on the device."""
    return call(device, "place", {"folder": folder, "files": msgspec.to_builtins(list(files))}, Placed).path


def install(device: Device, site_id: str, wheels: Sequence[str]) -> str:
    return call(device, "install", {"id": site_id, "wheels": list(wheels)}, Placed).path


def start(device: Device, job: Job, pythonpath: Sequence[str]) -> str:
    request = {"job": msgspec.to_builtins(job), "pythonpath": list(pythonpath), "again": False}
    return call(device, "start", request, Started).state


def stop(device: Device, job_id: str | None) -> list[str]:
    """End one job or all; works although the run was cancelled."""
    fresh = Device(device.host, device.contact, device.code_id, device.progress, threading.Event())
    return call(fresh, "stop", {"job": job_id}, Stopped).stopped


def clean(device: Device, everything: bool) -> Freed:
    return call(device, "clean", {"all": everything}, Freed)


def goods_of(path: Path, file: File, kind: str) -> Goods:
    return Goods(path, file.sha256, file.size_bytes, kind)


def describe_sent(device: Device) -> str:
    """`bytes sent: artifact 0, wheels 0, data 0, code 0`."""
    return "bytes sent: " + ", ".join(f"{kind} {device.sent_bytes[kind]:,}" for kind in CLASSES)


def printable(text: str) -> str:
    """What a device says, fit for a terminal: one line, no control characters, not endless."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:2000]


def depot_argv(device: Device, command: str) -> list[str]:
    return [*_environment(device.host), device.host.python, f"{device.code_path}/device/depot.py", command]


def _environment(host: Host) -> list[str]:
    return ["env", f"SLIMPI_DEVICE_HOME={host.home}"] if host.home else []


def _first_contact(host: Host, code_id: str, bundle: bytes, cancel: threading.Event) -> Contact:
    program = Path(first_contact.__file__).read_text(encoding="utf-8")
    lines: list[bytes] = []
    argv = [*_environment(host), host.python, "-c", program, code_id]
    code, errors = transport.run(host, argv, bundle, lines.append, silence_s=COMMAND_SILENCE_S, cancel=cancel)
    if code == LINK_FAILED:
        raise transport.unreachable(host, errors)
    if code:
        last = errors.splitlines()[-1] if errors else f"exit code {code}"
        raise SlimpiError(
            f"{host.name} cannot run {host.python}: {printable(last)}. It needs Python 3.11 or newer: "
            "Debian or Raspberry Pi OS, bookworm or later."
        )
    contact = decode(b"".join(lines), Contact, f"what {host.name} says of itself")
    found = tuple(int(part) for part in contact.python.split(".")[:2] if part.isdigit())
    if found < (3, 11):
        raise SlimpiError(f"{host.name} has Python {printable(contact.python)}, slimpi needs 3.11. Update its system.")
    return contact
