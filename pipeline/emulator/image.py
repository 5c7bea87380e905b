"""The disk, kernel and keys of the emulated Pi: a small Debian that boots to systemd and sshd.

Its packages are unpacked and configured by the files in data/emulator/guest, not by their own scripts: these
would run under emulation, for minutes and with root rights on the host.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from device.records import SlimpiError
from pipeline.emulator import apt, host
from pipeline.emulator.rootfs import DATA, compile_python, recipe_key, unpack
from pipeline.progress import Progressor

ALIAS = "slimpi-emulated"
USER = "pi"
DISK_GIB = 8

_PACKAGES = (
    # Debian's essential set as far as a person or the agent uses it: `extract` installs nothing by itself.
    *("base-files", "base-passwd", "bash", "coreutils", "dash", "debianutils", "diffutils", "findutils", "grep"),
    *("gzip", "hostname", "libc-bin", "login", "mawk", "procps", "sed", "tar", "util-linux"),
    *("systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "iproute2", "openssh-server", "rsync"),
    *("python3", "libgomp1", "libstdc++6"),
    # Boot only; taken out of the tree again.
    *("linux-image-cloud-arm64", "busybox-static"),
)
_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net")

# Accounts the packages' scripts would have made: name -> (uid, home, shell).
_ACCOUNTS = {
    "messagebus": (100, "/nonexistent", "/usr/sbin/nologin"),
    "sshd": (101, "/run/sshd", "/usr/sbin/nologin"),
    USER: (1000, f"/home/{USER}", "/bin/bash"),
}
_FOLDERS = ("media", "mnt", "opt", "srv")
# What their scripts would have linked: path -> target.
_LINKS = {
    "etc/systemd/system/multi-user.target.wants/ssh.service": "/lib/systemd/system/ssh.service",
    "etc/systemd/system/multi-user.target.wants/slimpi-poweroff.path": "/etc/systemd/system/slimpi-poweroff.path",
    "etc/systemd/system/default.target": "/lib/systemd/system/multi-user.target",
    "usr/bin/awk": "mawk",
    "usr/bin/which": "which.debianutils",
}
# Units this machine has no use for, and each costs seconds of boot: no device comes or goes, nobody sits at it.
_MASKED = (
    *("systemd-udevd.service", "systemd-udev-trigger.service"),
    *("systemd-udevd-control.socket", "systemd-udevd-kernel.socket"),
    *("modprobe@.service", "kmod-static-nodes.service", "systemd-modules-load.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *("proc-sys-fs-binfmt_misc.automount", "systemd-initctl.socket", "systemd-update-utmp.service"),
    *("systemd-random-seed.service", "systemd-ask-password-console.path", "systemd-ask-password-wall.path"),
    *("getty@.service", "serial-getty@.service"),
)


@dataclass(frozen=True)
class Image:
    """A pristine machine; every boot writes to an overlay of `disk`. The keys belong to this image alone."""

    key: str
    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.img"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    @property
    def identity(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"


def build(cache: Path, progress: Progressor, apt_sources: Path | None = None) -> Image:
    """The emulated Pi's image: made once for each recipe, then found in `cache`.

    Needs the apt packages of `host.system_tools()` and the machine's own Debian mirror; no root, no binfmt.
    """
    host.need(host.system_tools())
    recipe: dict[str, Any] = {"packages": _PACKAGES, "modules": _MODULES, "accounts": _ACCOUNTS, "links": _LINKS}
    recipe |= {"masked": _MASKED, "folders": _FOLDERS, "suite": apt.GUEST_SUITE, "disk_gib": DISK_GIB}
    key = recipe_key(recipe, [DATA / "init", *guest_files()])
    with progress.step("image of the emulated Pi"):
        return Image(key, host.cached_folder(cache, f"pi-{key}", partial(_make, key, apt_sources=apt_sources)))


def guest_files() -> list[Path]:
    """The configuration the guest gets, as a tree in the repository."""
    return sorted(path for path in (DATA / "guest").rglob("*") if path.is_file())


def _make(key: str, folder: Path, apt_sources: Path | None) -> None:
    image = Image(key, folder)
    root = folder / "root"
    umask = os.umask(0o022)  # a stricter one would hide the guest's /etc from its own user
    try:
        unpack(root, _PACKAGES, apt_sources)
        _take_boot_files(root, image)
        _make_keys(image)
        _configure(root, image)
        compile_python(root)
    finally:
        os.umask(umask)
    _make_disk(root, image.disk)
    shutil.rmtree(root)


def _take_boot_files(root: Path, image: Image) -> None:
    """Move the kernel out of the tree, make the initrd of its drivers, and drop the rest of both packages."""
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise SlimpiError(f"expected one kernel in Debian's package, found {len(kernels)}. Report this.")
    modules = root / "usr/lib/modules" / kernels[0].name.removeprefix("vmlinuz-")
    shutil.copyfile(kernels[0], image.kernel)
    image.initrd.write_bytes(initrd((root / "bin/busybox").read_bytes(), module_files(modules, _MODULES)))
    for unneeded in (*(root / "boot").iterdir(), modules, *(root / "usr/lib").glob("linux-image-*")):
        shutil.rmtree(unneeded) if unneeded.is_dir() else unneeded.unlink()


def module_files(modules: Path, wanted: Sequence[str]) -> list[Path]:
    """The kernel modules' files with what they depend on, in an order that loads. Built-in ones have none.

    A module names its dependencies in its .modinfo section, so depmod's index is not needed.
    """
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    builtin = (modules / "modules.builtin").read_text(encoding="utf-8")
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in ordered or re.search(rf"/{name.replace('_', '[-_]')}\.ko$", builtin, re.MULTILINE):
            return
        if name not in files:
            raise SlimpiError(f"Debian's kernel {modules.name} has no module {name}. Report this with the version.")
        depends = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for dependency in (depends[1].decode() if depends else "").split(","):
            if dependency:
                add(dependency.replace("-", "_"))
        ordered[name] = files[name]

    for name in wanted:
        add(name)
    return list(ordered.values())


def initrd(busybox: bytes, modules: Sequence[Path]) -> bytes:
    """An uncompressed initial RAM disk: data/emulator/init, busybox and the modules, numbered in load order."""
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "modules", "root")]
    entries += [("init", stat.S_IFREG | 0o755, (DATA / "init").read_bytes())]
    entries += [("bin/busybox", stat.S_IFREG | 0o755, busybox)]
    entries += [
        (f"modules/{i:02d}-{path.name}", stat.S_IFREG | 0o644, path.read_bytes()) for i, path in enumerate(modules)
    ]
    return b"".join(_cpio(*entry, inode=i) for i, entry in enumerate(entries, 1)) + _cpio("TRAILER!!!", 0, b"")


def _cpio(name: str, mode: int, data: bytes, inode: int = 0) -> bytes:
    """One entry of the kernel's initramfs format, "newc" (Documentation/driver-api/early-userspace/buffer-format)."""
    label = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(label), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + label
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)


def _make_keys(image: Image) -> None:
    tool = host.need(host.system_tools())["ssh-keygen"]
    for pair in (image.identity, image.folder / "host_key"):
        argv = [tool, "-q", "-t", "ed25519", "-N", "", "-C", ALIAS, "-f", str(pair)]
        host.run_tool(argv, "make the emulated Pi's ssh keys")
    public = (image.folder / "host_key.pub").read_text(encoding="utf-8").split()
    image.known_hosts.write_text(f"{ALIAS} {public[0]} {public[1]}\n", encoding="utf-8")


def _configure(root: Path, image: Image) -> None:
    """What the packages' own scripts would have done, and the user."""
    for source in guest_files():
        path = root / source.relative_to(DATA / "guest")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    _add_accounts(root)
    for name in _FOLDERS:
        (root / name).mkdir(exist_ok=True)
    masked = {f"etc/systemd/system/{unit}": "/dev/null" for unit in _MASKED}
    for name, target in {**_LINKS, **masked}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    # With an id and these stamps systemd takes the machine as set up and skips its first-boot work.
    (root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    for stamp in ("etc/.updated", "var/.updated"):
        (root / stamp).touch()
    ssh = root / "home" / USER / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    shutil.copyfile(image.identity.with_suffix(".pub"), ssh / "authorized_keys")
    shutil.copyfile(root / "usr/share/openssh/sshd_config", root / "etc/ssh/sshd_config")
    key = root / "etc/ssh/ssh_host_ed25519_key"
    shutil.move(image.folder / "host_key", key)
    key.chmod(0o600)


def _add_accounts(root: Path) -> None:
    masters = root / "usr/share/base-passwd"
    passwd = (masters / "passwd.master").read_text(encoding="utf-8")
    group = (masters / "group.master").read_text(encoding="utf-8")
    for name, (uid, home, shell) in _ACCOUNTS.items():
        passwd += f"{name}:*:{uid}:{uid}::{home}:{shell}\n"
        group += f"{name}:*:{uid}:\n"
    (root / "etc/passwd").write_text(passwd, encoding="utf-8")
    (root / "etc/group").write_text(group, encoding="utf-8")


def _make_disk(root: Path, disk: Path) -> None:
    """An ext4 file system of DISK_GIB with the tree in it, in a sparse file; everything belongs to root."""
    tools = host.need(host.system_tools())
    with disk.open("wb") as out:
        out.truncate(DISK_GIB << 30)
    as_root = [] if os.geteuid() == 0 else [tools["fakeroot"], "--"]
    argv = [*as_root, tools["mke2fs"], "-q", "-t", "ext4", "-F", "-L", "slimpi", "-d", str(root), str(disk)]
    host.run_tool(argv, "make the emulated Pi's disk")
