"""The device's depot: receives files by content, lays them out, starts the agent apart from the link, tells of it.

    python3 PATH/device/depot.py COMMAND < request.json

One JSON object on stdin, one on stdout (`follow`: one a line); an error is one line on stderr and exit code 1.
It runs before any wheel is there, so depot*.py need nothing but Python's standard library. Everything lies in one
folder, ~/.slimpi or $SLIMPI_DEVICE_HOME: incoming/ store/<sha256> site/<id>/ artifacts/<id>/ data/ jobs/<id>/.
COMMANDS lists the commands with the fields of their requests; a field left out has the default given there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path: what is beside it is the package `device`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device.depot_base import (
    MAX_REQUEST_BYTES,
    PLAIN,
    SHA256,
    DepotError,
    check,
    check_relative,
    file_size,
    read_request,
    read_sizes,
    read_text,
    short,
    sync_folder,
)
from device.depot_jobs import follow, running, start, stop

STALLED_WRITE_S = 60  # a link that takes nothing for so long is dead: `follow` ends
FOLDERS = ("incoming", "store", "site", "artifacts", "data", "jobs")

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def status(root: Path, want: list[Any]) -> dict[str, Any]:
    """The machine, and which of the wanted files the store lacks. A file of the right size counts as there: its content
    was checked when it was admitted and is again before it is used."""
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read_text(Path("/proc/meminfo")), re.MULTILINE))
    wanted = read_sizes(want)
    missing = [digest for digest, size in wanted.items() if file_size(root / "store" / digest) != size]
    sizes = {digest: file_size(root / "incoming" / digest) for digest in missing}
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    return {
        "home": str(root),
        "free_bytes": shutil.disk_usage(root).free,
        "mem_available_bytes": int(memory.get("MemAvailable", 0)) * 1024,
        "mem_total_bytes": int(memory.get("MemTotal", 0)) * 1024,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "glibc": (libc or "").removeprefix("glibc "),
        "missing": missing,
        "partial": {digest: size for digest, size in sizes.items() if size > 0},
        "running": running(root),
        "rsync": shutil.which("rsync") is not None,
        "board": read_text(Path("/proc/device-tree/model")).rstrip("\0").strip(),
    }


def admit(root: Path, files: list[Any]) -> dict[str, Any]:
    """Move what has come whole from incoming/ to store/. What is too short stays and can be resumed; what is wrong is
    deleted. Both are told in `refused`, and so is what has not come at all."""
    admitted, refused = [], {}
    for digest, size in read_sizes(files).items():
        incoming, stored = root / "incoming" / digest, root / "store" / digest
        found = file_size(incoming)
        if found < 0 and file_size(stored) == size:
            admitted.append(digest)
        elif found < 0:
            refused[digest] = "it is not in incoming"
        elif found < size:
            refused[digest] = f"truncated: {found} of {size} bytes, kept to be resumed"
        elif found > size or _digest(incoming, sync=True) != digest:
            incoming.unlink()
            refused[digest] = f"{found} bytes, expected {size}" if found > size else "its sha256 is another: damaged"
        else:
            incoming.chmod(0o444)  # artifacts/ and data/ will share this file by hard links
            incoming.replace(stored)
            admitted.append(digest)
    sync_folder(root / "store")
    return {"admitted": admitted, "refused": refused}


def drop(root: Path, files: list[Any]) -> dict[str, Any]:
    """Forget stored and incoming files, so that they are sent again."""
    for digest in [check(SHA256, item, "a sha256") for item in files]:
        for folder in ("store", "incoming"):
            (root / folder / digest).unlink(missing_ok=True)
    return {}


def install(root: Path, id: str, wheels: list[Any]) -> dict[str, Any]:  # noqa: A002
    """Unzip stored wheels into site/<id>/, once: the folder appears whole or not at all."""
    target = root / "site" / check(PLAIN, id, "a site's id")
    digests = [check(SHA256, item, "a sha256") for item in wheels]
    if target.is_dir():
        return {"path": str(target)}
    scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        scratch.mkdir()
        for digest in digests:
            if file_size(root / "store" / digest) < 0 or _digest(root / "store" / digest) != digest:
                raise DepotError(
                    f"wheel {digest[:16]}... is missing or damaged in the store. Drop it and send it again"
                )
            _unzip(root / "store" / digest, scratch)
        os.sync()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(target.parent)
    return {"path": str(target)}


def place(root: Path, folder: str, files: list[Any]) -> dict[str, Any]:
    """Make stored files appear under their own names in artifacts/<id> or data, by hard links (copies without them)."""
    if folder != "data":
        start, _, name = folder.partition("/")
        check(PLAIN, name if start == "artifacts" else "", "`data` or `artifacts/<id>`", shown=folder)
    target = root / folder
    wanted = []
    for item in files:
        if not isinstance(item, dict) or item.keys() != {"path", "sha256", "size_bytes"}:
            raise DepotError(f"a file has path, sha256 and size_bytes, got {short(item)}. Send all three")
        wanted.append((check_relative(item["path"]), *read_sizes([[item["sha256"], item["size_bytes"]]]).popitem()))
    for path, digest, size in wanted:
        if file_size(root / "store" / digest) != size:
            raise DepotError(f"{path} ({digest[:16]}...) is not in the store. Send it first")
    for path, digest, _ in wanted:
        place_at = target / path
        place_at.parent.mkdir(parents=True, exist_ok=True)
        if not place_at.parent.resolve().is_relative_to(target):
            raise DepotError(f"{place_at.parent} leaves {target} through a link. Remove the link")
        _link(root / "store" / digest, place_at)
    target.mkdir(parents=True, exist_ok=True)
    return {"path": str(target)}


def clean(root: Path, all: bool) -> dict[str, Any]:  # noqa: A002
    """Empty the depot; refused while jobs run. Without `all`, jobs/ (what was measured) stays, and so does this code.
    Entries of the folder that are not the depot's own are left alone and named in `left`."""
    if busy := running(root):
        raise DepotError(f"running: {', '.join(busy)}. Wait for them or stop them first")
    names = set(FOLDERS) if all else set(FOLDERS) - {"jobs"}
    here = Path(__file__).resolve()
    if all and here.is_relative_to(root):
        names.add(here.relative_to(root).parts[0])
    freed = 0
    for name in sorted(names):
        freed += _disk_bytes(root / name)
        if (root / name).is_dir() and not (root / name).is_symlink():
            shutil.rmtree(root / name)
        else:
            (root / name).unlink(missing_ok=True)
    left = sorted(path.name for path in root.iterdir())
    if not left:
        root.rmdir()
    return {"freed_bytes": freed, "left": left}


COMMANDS: dict[str, tuple[Callable[..., Any], dict[str, tuple[tuple[type, ...], Any]]]] = {
    # command: (function, {field: (types, default; ... = must be given)})
    "status": (status, {"want": ((list,), [])}),
    "admit": (admit, {"files": ((list,), ...)}),
    "drop": (drop, {"files": ((list,), ...)}),
    "install": (install, {"id": ((str,), ...), "wheels": ((list,), ...)}),
    "place": (place, {"folder": ((str,), ...), "files": ((list,), ...)}),
    "start": (start, {"job": ((dict,), ...), "pythonpath": ((list,), ...), "again": ((bool,), False)}),
    "follow": (follow, {"job": ((str,), ...), "offset": ((int,), 0)}),
    "stop": (stop, {"job": ((str, type(None)), ...)}),
    "clean": (clean, {"all": ((bool,), False)}),
}


def answer(root: Path, command: str, request: bytes) -> Iterator[bytes]:
    """What one command says, line by line. DepotError or OSError if it cannot do what is asked."""
    if command not in COMMANDS:
        raise DepotError(f"command {short(command)} is not one of {', '.join(COMMANDS)}. Use the host's own version")
    function, fields = COMMANDS[command]
    arguments = read_request(request, fields)
    for name in FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    said = function(root, **arguments)
    yield from (said if isinstance(said, Iterator) else [json.dumps(said).encode() + b"\n"])


def main() -> int:
    home = os.environ.get("SLIMPI_DEVICE_HOME")
    try:
        root = (Path(home) if home else Path.home() / ".slimpi").resolve()
        if len(sys.argv) != 2:
            raise DepotError(f"got {len(sys.argv) - 1} arguments, expected one of {', '.join(COMMANDS)}")
        for line in answer(root, sys.argv[1], sys.stdin.buffer.read(MAX_REQUEST_BYTES + 1)):
            signal.alarm(STALLED_WRITE_S)
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            signal.alarm(0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again when it flushes at exit
        return 1
    except OSError as error:
        return _complain(f"{error.filename or 'the device'}: {error.strerror}. Free some space or mend its permissions")
    except (DepotError, RuntimeError) as error:  # RuntimeError: pathlib's, for links that go round
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _complain(message: str) -> int:
    sys.stderr.write(f"slimpi depot: {' '.join(message.split())}\n")
    return 1


def _unzip(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            needed, free = sum(member.file_size for member in members), shutil.disk_usage(target).free
            if needed > free:
                raise DepotError(f"wheel {wheel.name[:16]}... unpacks to {needed} bytes, {free} are free. Free some")
            for member in members:
                path = target / check_relative(member.filename)
                if stat.S_ISLNK(member.external_attr >> 16) or path.exists():
                    raise DepotError(f"{member.filename} is a link or comes twice. Send another wheel")
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("xb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except _ZIP_ERRORS as error:
        raise DepotError(f"wheel {wheel.name[:16]}... cannot be unzipped: {error}. Send another") from error


def _link(stored: Path, path: Path) -> None:
    if path.is_file() and not path.is_symlink() and path.samefile(stored):
        return
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(stored, partial)
        except OSError:  # no hard links on this file system, or too many of this file
            shutil.copyfile(stored, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if sync:
            os.fsync(handle.fileno())
    return digest


def _disk_bytes(path: Path) -> int:
    """What a tree takes on disk; a file with several names in it or elsewhere counts its share for each."""
    total = 0.0
    for folder, _, names in os.walk(path):
        for name in [".", *names]:
            found = (Path(folder) / name).lstat()
            total += found.st_blocks * 512 / (found.st_nlink if stat.S_ISREG(found.st_mode) else 1)
    return round(total)


if __name__ == "__main__":
    raise SystemExit(main())
