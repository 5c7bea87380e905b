"""Debian arm64 trees, unpacked but not configured, and single arm64 programs run in them by QEMU's user emulation.

Unpacking needs neither root nor binfmt: no arm64 program runs while a tree is made, except Python to compile
its own library, and that through `run_user`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from device.records import SlimpiError
from pipeline.emulator import apt, host
from pipeline.progress import Progressor

DATA = Path(__file__).parent.parent / "data" / "emulator"
GUEST_PYTHON = "3.11"
PYTHON = f"/usr/bin/python{GUEST_PYTHON}"

# QEMU's default CPU executes sdot and the rest of what the board lacks, so checks would pass on the wrong kernels.
CPU = "cortex-a72"

_USER_PACKAGES = ("base-files", "python3", "libgomp1", "libstdc++6")
_UNREAD = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache", "etc/apt")


def user_rootfs(cache: Path, progress: Progressor, apt_sources: Path | None = None, python: str = GUEST_PYTHON) -> Path:
    """A tree of the Debian with this Python (apt.SUITES), libgomp1 and libstdc++6 for `run_user`; made once, then found
    in `cache`.

    Read-only by agreement: install wheels elsewhere and name that folder in PYTHONPATH.
    """
    host.need(host.USER_TOOLS)
    key = recipe_key({"packages": _USER_PACKAGES, "suite": apt.SUITES[python]}, [DATA / "cpuinfo-pi4"])
    make = partial(_make_user_rootfs, apt_sources=apt_sources, python=python)
    with progress.step(f"Debian {apt.SUITES[python]} arm64 tree for QEMU's user emulation"):
        return host.cached_folder(cache, f"user-{key}", make) / "root"


def _make_user_rootfs(folder: Path, apt_sources: Path | None, python: str) -> None:
    root = folder / "root"
    unpack(root, _USER_PACKAGES, apt_sources, apt.SUITES[python])
    # onnxruntime reads /proc/cpuinfo at import and crashes on the x86 one; QEMU looks in the tree first.
    (root / "proc").mkdir(exist_ok=True)
    shutil.copyfile(DATA / "cpuinfo-pi4", root / "proc" / "cpuinfo")
    compile_python(root, python)


def run_user(
    root: Path,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    stdin: bytes = b"",
    timeout_s: float = 600.0,
) -> subprocess.CompletedProcess[bytes]:
    """Run one arm64 program of `root` (argv[0] = its path in the tree) on an emulated Cortex-A72.

    A program that dies of a signal has returncode -signal: -4 is SIGILL. It sees the host's files at the
    host's paths; its own child processes are not emulated. Only `env` and a plain locale are passed on.
    """
    qemu = host.need({"qemu-aarch64-static": "qemu-user-static"})["qemu-aarch64-static"]
    settings = {"LANG": "C.UTF-8", "HOME": "/nonexistent", "PATH": os.defpath, **(env or {})}
    settings |= {"QEMU_CPU": CPU, "QEMU_LD_PREFIX": str(root.resolve())}
    program = str(root.resolve() / argv[0].lstrip("/"))
    try:
        return subprocess.run(
            [qemu, program, *argv[1:]], input=stdin, capture_output=True, env=settings, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise SlimpiError(f"{argv[0]} took over {timeout_s:.0f} s on the emulated CPU. Allow it more time.") from error


def recipe_key(recipe: Mapping[str, Any], files: Sequence[Path]) -> str:
    """Sixteen hex digits over a recipe and the content of the data files it uses."""
    content = {str(path.relative_to(DATA)): path.read_text(encoding="utf-8") for path in files}
    text = json.dumps({"recipe": recipe, "files": content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unpack(root: Path, packages: Sequence[str], apt_sources: Path | None, suite: str = apt.GUEST_SUITE) -> None:
    """Unpack a release's arm64 packages and what they need into `root`; /bin, /lib and /sbin merged into /usr."""
    sources = root.parent / "guest.sources"
    sources.write_text(apt.render(apt.read_sources(only=apt_sources, suite=suite)), encoding="utf-8")
    # `extract` runs no maintainer script and `chrootless` neither mounts nor changes root, so no privilege is needed.
    argv = [host.need(host.USER_TOOLS)["mmdebstrap"], "--arch=arm64", "--variant=extract", "--mode=chrootless"]
    argv += [f"--aptopt={option}" for option in apt.access_options()]
    argv += [f"--include={','.join(packages)}", suite, str(root), str(sources)]
    host.run_tool(argv, f"unpack Debian {suite} for arm64")
    sources.unlink()
    for name in _UNREAD:
        shutil.rmtree(root / name, ignore_errors=True)
    _merge_usr(root)


def _merge_usr(root: Path) -> None:
    """As every installed Debian has it; dpkg's archives still carry both places."""
    for name in ("bin", "sbin", "lib"):
        old = root / name
        if old.is_dir() and not old.is_symlink():
            shutil.copytree(old, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(old)
        if not old.is_symlink():
            old.symlink_to(f"usr/{name}")


def compile_python(root: Path, python: str = GUEST_PYTHON) -> None:
    """Byte-compile the guest's library, as the package's own script would: emulated, each import is slow without."""
    folders = [str(root / f"usr/lib/python{python}"), str(root / "usr/lib/python3")]
    done = run_user(root, [f"/usr/bin/python{python}", "-m", "compileall", "-q", "-s", str(root), *folders])
    if done.returncode != 0:
        raise SlimpiError(f"the guest's Python does not compile its library: {host.tail(done.stdout + done.stderr)}.")
