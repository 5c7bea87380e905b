"""The append-only record of what a job has measured: what is in it survives a crash, a full disk, a power cut.

`journal.jsonl` holds one {"crc": ..., "event": {...}} a line; crc is the CRC-32 of the event's bytes. The
first event names the job, the rest are schema.Event in the order they happened. Reading stops at the first
line that is torn or corrupt; that line and what follows are cut off before anything is appended.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import msgspec

from device.records import Record, Sha256, SlimpiError, decode, sync_folder, write_remedy
from device.results import Event, Sample, TaskEnded, TaskResult
from device.schema import Job

_EVENT = cast(Any, Event)  # a union is no type[...] to mypy


class Head(Record, frozen=True, kw_only=True, tag="journal", tag_field="event"):
    """The first event of a journal: whose samples these are."""

    schema: Literal[1] = 1
    job_id: str
    work_sha256: Sha256


class _Line(msgspec.Struct, frozen=True):
    crc: int
    event: msgspec.Raw


class Journal:
    """The journal of `job` in `folder`, read back and open for appending; one agent a folder.

    `samples[i][series]` are those of task i in order, `results[i]` is its result once it ended well,
    `notes` says what had to be dropped on reading. Raises SlimpiError for a journal of another job, a folder
    another agent works in, and a disk that takes no more.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.path = folder / "journal.jsonl"
        self.samples: dict[int, dict[str, list[Sample]]] = {}
        self.results: dict[int, TaskResult] = {}
        self.notes: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            remedy = f"Choose another work_dir. {write_remedy(error)}"
            raise SlimpiError(f"cannot open {self.path}: {error.strerror}. {remedy}") from error
        try:
            self._lock()
            self._size = self._read(_line(_head_of(job)))
        except OSError as error:
            os.close(self._fd)
            raise SlimpiError(f"cannot read {self.path}: {error.strerror}. {write_remedy(error)}") from error
        except SlimpiError:
            os.close(self._fd)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def append(self, events: Iterable[Event]) -> None:
        """Write the events and wait until the disk has them."""
        events = list(events)
        self._write(b"".join(_line(event) for event in events))
        for event in events:
            self._take(event)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SlimpiError(
                f"another agent is working in {self.path.parent}. Wait for it, stop it, or choose another work_dir."
            ) from error

    def _read(self, head: bytes) -> int:
        """Take in what the file holds, cut off what is bad; returns the length of the good part."""
        data = self.path.read_bytes()
        first, newline, rest = data.partition(b"\n")
        self._size = 0
        if not newline and head.startswith(first):  # new, or the power went while the head was written
            os.ftruncate(self._fd, 0)
            self._write(head)
            sync_folder(self.path.parent)
            return self._size
        if first + newline != head:
            self._refuse(first)
        size = len(first) + 1
        lines = rest.splitlines(keepends=True)
        for i, line in enumerate(lines):
            origin = f"{self.path} line {i + 2}"
            event = _event(line, origin)
            if event is None or not self._take(event):
                state = "damaged" if line.endswith(b"\n") else "torn"
                self.notes.append(f"{origin} is {state}: dropped {len(lines) - i} line(s), to be measured again")
                break
            size += len(line)
        os.ftruncate(self._fd, size)
        return size

    def _refuse(self, first: bytes) -> None:
        remedy = "Choose another work_dir, or move that file away to measure from the start."
        raw = _checked(first + b"\n")
        if raw is None:
            raise SlimpiError(f"{self.path} is not a journal of slimpi, or its first line is damaged. {remedy}")
        head = decode(raw, Head, str(self.path))
        raise SlimpiError(f"{self.path} belongs to job {head.job_id} with other content. {remedy}")

    def _take(self, event: Event) -> bool:
        """Add one event to what is known; False if it cannot follow what came before."""
        if isinstance(event, Sample):
            known = self.samples.setdefault(event.task, {}).setdefault(event.series, [])
            if event.index != len(known):
                return False
            known.append(event)
        elif isinstance(event, TaskEnded) and event.result.status == "ok":
            self.results[event.task] = event.result
        return True

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            os.lseek(self._fd, self._size, os.SEEK_SET)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise SlimpiError(
                f"cannot write {self.path}: {error.strerror}. {write_remedy(error)} Then run the same job again: "
                "it goes on from the last sample written."
            ) from error
        self._size += len(data)


def _head_of(job: Job) -> Head:
    """Paths and limits may change between two runs of a job; what its samples mean may not."""
    work = [job.artifact, job.tasks, job.threads, job.provenance]
    return Head(job_id=job.id, work_sha256=hashlib.sha256(msgspec.json.encode(work)).hexdigest())


def _line(event: Event | Head) -> bytes:
    raw = msgspec.json.encode(event)
    return msgspec.json.encode(_Line(crc=zlib.crc32(raw), event=msgspec.Raw(raw))) + b"\n"


def _checked(line: bytes) -> bytes | None:
    """The event's bytes of a whole line whose checksum holds."""
    if not line.endswith(b"\n"):
        return None
    try:
        parsed = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    raw = bytes(parsed.event)
    return raw if zlib.crc32(raw) == parsed.crc else None


def _event(line: bytes, origin: str) -> Event | None:
    raw = _checked(line)
    return None if raw is None else decode(raw, _EVENT, origin)
