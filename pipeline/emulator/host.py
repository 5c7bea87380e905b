"""The host's side of the emulator: the programs it needs, the apt packages that have them, locks and cache folders."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from device.records import SlimpiError
from pipeline.locks import locked

# Program -> the Debian package that has it.
USER_TOOLS: Mapping[str, str] = {"qemu-aarch64-static": "qemu-user-static", "mmdebstrap": "mmdebstrap"}
SYSTEM_TOOLS: Mapping[str, str] = {
    **USER_TOOLS,
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
# An ordinary user's mke2fs would record the user as owner of the guest's system files.
ORDINARY_USER_TOOLS: Mapping[str, str] = {"fakeroot": "fakeroot"}

_INSTALL = ("apt-get", "install", "-y", "--no-install-recommends")


def find_tool(name: str) -> str | None:
    """Full path of a program; the sbin folders are not on an ordinary user's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def system_tools() -> dict[str, str]:
    """What building and booting the whole machine needs for the user who asks."""
    return {**SYSTEM_TOOLS, **({} if os.geteuid() == 0 else ORDINARY_USER_TOOLS)}


def missing_packages(tools: Mapping[str, str]) -> list[str]:
    return sorted({package for name, package in tools.items() if find_tool(name) is None})


def need(tools: Mapping[str, str]) -> dict[str, str]:
    """Program name -> full path; SlimpiError with the apt-get command if any is missing."""
    if missing := missing_packages(tools):
        raise SlimpiError(
            f"the emulated Pi needs {len(missing)} apt package(s) that are not installed: "
            f"sudo {' '.join(_INSTALL)} {' '.join(missing)}"
        )
    return {name: find_tool(name) or name for name in tools}


def install_packages() -> list[str]:
    """Install what is missing with apt-get, as root; the packages installed."""
    missing = missing_packages(system_tools())
    if not missing:
        return []
    if os.geteuid() != 0:
        raise SlimpiError(f"installing packages needs root: sudo {' '.join(_INSTALL)} {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run_tool(["apt-get", "update"], "read the apt archive", env=env)
    run_tool([*_INSTALL, *missing], f"install {', '.join(missing)}", env=env)
    return missing


def run_tool(
    argv: Sequence[str],
    what: str,
    *,
    remedy: str = "Check the network and the disk space and try again.",
    timeout_s: float = 900.0,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a host program to its end; SlimpiError with the end of its stderr if it fails."""
    try:
        done = subprocess.run(list(argv), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, env=env)
    except subprocess.TimeoutExpired as error:
        raise SlimpiError(f"could not {what}: {argv[0]} took over {timeout_s:.0f} s. {remedy}") from error
    except OSError as error:
        raise SlimpiError(f"could not {what}: {argv[0]}: {error.strerror}. Is it installed?") from error
    if done.returncode != 0:
        raise SlimpiError(
            f"could not {what}: {Path(argv[0]).name} ended with {done.returncode}: {tail(done.stderr)} {remedy}"
        )
    return done


def tail(data: bytes, lines: int = 6) -> str:
    return " | ".join(data.decode(errors="replace").strip().splitlines()[-lines:])


def cached_folder(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """cache/name, made by `make(temporary folder)` if it is not there yet; never half of it."""
    final = cache.resolve() / name
    with locked(cache):
        if final.is_dir():
            return final
        partial = final.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(mode=0o700)
            make(partial)
            partial.replace(final)
        except OSError as error:
            raise SlimpiError(
                f"cannot write {final}: {error.strerror} ({error.filename}). Free some space or fix permissions."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final
