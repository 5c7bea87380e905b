"""What records on the wire are made of: their base, how they are read and written, and the one user-facing error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

SCHEMA_VERSION = 1

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]

_SAFE_ID = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class SlimpiError(Exception):
    """The one user-facing error: what was wrong, with which value, and what to do. Exit code 1, no traceback."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything on the wire: immutable, keyword-only, unknown fields rejected."""


R = TypeVar("R")


def check_id(value: str) -> None:
    """Ids become folder names: letters, digits, dot, dash, underscore; no separators, no leading dot."""
    if not _SAFE_ID.match(value):
        raise ValueError(f"id {value[:80]!r} is not a plain name")


def check_relative(value: str) -> None:
    """Refuse paths that could leave their folder (absolute, `..`, backslash, NUL, empty)."""
    path = PurePosixPath(value)
    bad = not value or path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value
    if bad or str(path) != value or value == ".":
        raise ValueError(f"path {value[:120]!r} must be relative and stay inside its folder")


def decode(data: bytes | str, kind: type[R], origin: str) -> R:
    """JSON to a record; SlimpiError names the origin and the offending field."""
    try:
        return msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise SlimpiError(
            f"{origin} is not a valid {_name(kind)}: {error}. "
            f"It must be written by slimpi with schema version {SCHEMA_VERSION}."
        ) from error


def encode(record: Record) -> bytes:
    """A record as indented JSON with a final newline, for files people read."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def encode_line(record: Record) -> bytes:
    """A record as one JSON line, for streams."""
    return msgspec.json.encode(record) + b"\n"


def read_record(path: Path, kind: type[R]) -> R:
    """A file's record. SlimpiError if it cannot be read or is not of that kind."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    return decode(data, kind, str(path))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise SlimpiError(f"cannot write {path}: {error.strerror}. {write_remedy(error)}") from error


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_remedy(error: OSError) -> str:
    """What to do about a file that cannot be written."""
    if error.errno in (errno.EIO, errno.EROFS):
        return "The disk is failing or mounted read-only: check it (dmesg), replace the card if need be."
    return "Free some space or fix permissions."


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", "event")
