"""What a device needs besides the artifact: its wheels, and for the time of the run its clock governor."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from device.records import SlimpiError
from pipeline import remote, transport
from pipeline.remote import Device, Goods, printable
from pipeline.store import Places, digest

_ASSEMBLING = threading.Lock()  # devices side by side share one wheelhouse
_GOVERNOR_FILE = re.compile(r"/sys/devices/system/cpu/cpufreq/policy\d+/scaling_governor")
_GOVERNOR = re.compile(r"[a-z_]{1,32}")


def wheels(device: Device, places: Places) -> tuple[list[Goods], int]:
    """The checked wheels for the device's Python and glibc, and what they take unpacked; none if it has its own."""
    if device.host.site_provided:
        return [], 0
    from pipeline.wheelhouse import DEVICE_PACKAGE, assemble

    seen = device.contact
    if seen.machine != "aarch64":
        raise SlimpiError(
            f"{device.host.name} is {printable(seen.machine)}; wheels are made for aarch64, 64-bit Debian or Raspberry "
            "Pi OS. Use --on local for this machine."
        )
    python = ".".join(seen.python.split(".")[:2])
    glibc = tuple(int(part) for part in seen.glibc.split(".") if part.isdigit())
    if len(glibc) != 2:
        raise SlimpiError(f"{device.host.name} has no glibc. Use 64-bit Debian or Raspberry Pi OS.")
    title = f"{device.host.name}: wheels for Python {python}, glibc {seen.glibc}"
    with _ASSEMBLING, device.progress.step(title) as tick:
        caches = places.artifacts / ".wheelhouse", places.artifacts / ".emulator"
        house = assemble(caches[0], python, (glibc[0], glibc[1]), tick, emulator_cache=caches[1])
    # The agent's own code goes its own way (first_contact), so that a change in it sends only itself.
    chosen = [wheel for wheel in house.wheels if wheel.package != DEVICE_PACKAGE]
    goods = [Goods(house.folder / w.file, w.sha256, w.size_bytes, "wheels") for w in chosen]
    return goods, sum(wheel.installed_bytes for wheel in chosen)


def site(device: Device, wanted: Sequence[Goods], unpacked_bytes: int) -> list[str]:
    """Unpack the wheels on the device, once; the folder for its PYTHONPATH. A damaged wheel is sent again, once."""
    if not wanted:
        return []
    hashes = [goods.sha256 for goods in wanted]
    site_id = f"site-{digest(sorted(hashes))[:16]}"
    with device.progress.step(f"{device.host.name}: unpack {len(hashes)} wheels"):
        try:
            return [remote.install(device, site_id, hashes)]
        except SlimpiError as error:
            damaged = [digest for digest in hashes if digest[:16] in str(error)]
            if not damaged:
                raise
        remote.forget(device, damaged)
        remote.supply(device, wanted, unpacked_bytes=unpacked_bytes)
        return [remote.install(device, site_id, hashes)]


@contextmanager
def governor(device: Device, wanted: str) -> Iterator[None]:
    """Set the clock governor of every core with sudo, and put the old ones back at the end."""
    before = device.contact.governors
    bad = [p for p, g in before.items() if not _GOVERNOR_FILE.fullmatch(p) or not _GOVERNOR.fullmatch(g)]
    if not before or bad:
        raise SlimpiError(f"{device.host.name} has no clock governor to set. Leave --governor out.")
    try:
        _write_governors(device, dict.fromkeys(before, wanted))
        yield
    finally:
        _write_governors(device, before)


def _write_governors(device: Device, values: Mapping[str, str]) -> None:
    for path, value in values.items():
        # dd, since it writes a file named by an argument: no shell runs as root.
        argv = ["sudo", "-n", "dd", f"of={path}", "conv=notrunc", "status=none"]
        code, errors = transport.run(device.host, argv, value.encode() + b"\n", lambda line: None)
        if code:
            said = printable(errors.splitlines()[-1]) if errors else f"exit code {code}"
            raise SlimpiError(
                f"{device.host.name} does not let sudo set its governor to {value}: {said}. "
                "Allow it without a password, or leave --governor out."
            )
