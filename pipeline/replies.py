"""What a device answers: of first_contact.py and of each command of device/depot.py, bounded, as it is not trusted."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from device.records import Record, Sha256

Bytes = Annotated[int, Meta(ge=0, le=1 << 62)]
Text = Annotated[str, Meta(max_length=4096)]


class Contact(Record, frozen=True, kw_only=True):
    """What first_contact says."""

    home: Text
    code: bool
    python: Text
    glibc: Text
    machine: Text
    board: Text
    cores: Annotated[int, Meta(ge=1, le=4096)]
    governors: dict[Text, Text]
    time_unix_s: float
    error: str


class Status(Record, frozen=True, kw_only=True):
    """`status`: the device's room, memory and Python; which of the asked files it lacks, or has bytes of."""

    home: Text
    free_bytes: Bytes
    mem_available_bytes: Bytes
    mem_total_bytes: Bytes
    python: Text
    machine: Text
    glibc: Text
    missing: list[Sha256]
    partial: dict[Sha256, Bytes]
    running: list[Text]
    rsync: bool
    board: Text


class Admitted(Record, frozen=True, kw_only=True):
    """`admit`: files whose hash was right, and why the others were refused."""

    admitted: list[Sha256]
    refused: dict[Sha256, str]


class Placed(Record, frozen=True, kw_only=True):
    """Where an artifact or the agent's environment lies on the device."""

    path: Text


class Started(Record, frozen=True, kw_only=True):
    """Whether a job was started or runs already."""

    state: Text


class Stopped(Record, frozen=True, kw_only=True):
    """The jobs that were ended."""

    stopped: list[Text]


class Freed(Record, frozen=True, kw_only=True):
    """What `clean` removed, and what it left, since it is in use."""

    freed_bytes: Bytes
    left: list[Text]


class Nothing(Record, frozen=True, kw_only=True):
    """The reply of a command that only does something."""
