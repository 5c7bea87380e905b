"""What the depot's files share: its error, checks of a request, files written whole. Standard library only."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any

MAX_REQUEST_BYTES = 1 << 26

SHA256 = re.compile(r"[0-9a-f]{64}")
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # schema.check_id


class DepotError(Exception):
    """What was wrong, with which value, what to do; schema.SlimpiError's twin, which is not there yet."""


def read_request(request: bytes, fields: dict[str, tuple[tuple[type, ...], Any]]) -> dict[str, Any]:
    """The request's arguments by `fields` {name: (types, default)}; DepotError for anything else in it."""
    if len(request) > MAX_REQUEST_BYTES:
        raise DepotError(f"the request has over {MAX_REQUEST_BYTES} bytes. Ask for less at once")
    try:
        given = json.loads(request)
    except (ValueError, RecursionError) as error:
        raise DepotError(f"the request is not JSON: {error}. It must be written by slimpi") from error
    if not isinstance(given, dict) or given.keys() - fields.keys():
        raise DepotError(f"the request has fields {', '.join(fields)}, got {short(given)}. Use the host's own version")
    arguments = {}
    for name, (types, default) in fields.items():
        value = given.get(name, default)
        if type(value) not in types:
            wanted = " or ".join(kind.__name__ for kind in types)
            raise DepotError(f"`{name}` must be {wanted}, got {short(given.get(name))}. Use the host's own version")
        arguments[name] = value
    return arguments


def read_sizes(pairs: list[Any]) -> dict[str, int]:
    """{sha256: bytes} of [[sha256, bytes], ...]; DepotError for anything else."""
    sizes = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[1]) is not int or not 0 <= pair[1] < 1 << 62:
            raise DepotError(f"a file is [sha256, size], got {short(pair)}. Use the host's own version")
        sizes[check(SHA256, pair[0], "a sha256")] = pair[1]
    return sizes


def check(pattern: re.Pattern[str], value: Any, what: str, shown: Any = None) -> str:
    """`value`, if it is a string that `pattern` fits whole; DepotError otherwise."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise DepotError(f"{short(value if shown is None else shown)} is not {what}. Use the host's own version")
    return value


def check_relative(value: Any) -> str:
    """schema.check_relative, and a name a file system takes."""
    path = PurePosixPath(value) if isinstance(value, str) else PurePosixPath("/")
    bad = not path.parts or path.is_absolute() or ".." in path.parts or str(path) != value
    if bad or re.search(r"[\\\0-\x1f\ud800-\udfff]", value) or len(value) > 1024 or max(map(len, path.parts)) > 200:
        raise DepotError(f"path {short(value)} must be relative and stay inside its folder. Rename the file")
    return str(path)


def is_inside(root: Path, path: Path) -> bool:
    odd = re.search(r"[\0\ud800-\udfff]", str(path))  # no file system takes these
    return not odd and path.is_absolute() and path.resolve().is_relative_to(root)


def file_size(path: Path) -> int:
    """Bytes of a regular file; -1 for anything else."""
    try:
        found = path.lstat()
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def read_text(path: Path) -> str:
    """A file's text, or none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, sync, rename: after a loss of power the old content is there, or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What was renamed in it is so after a loss of power, too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def short(value: Any) -> str:
    return ascii(value)[:120]
