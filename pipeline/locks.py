"""One process at a time in a folder of slimpi's own."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device.records import SlimpiError


@contextmanager
def locked(folder: Path, busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets go of it when the process ends, however it ends.

    `busy` is called once if another process holds it; what it raises ends the attempt, else this waits.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise SlimpiError(f"cannot write in {folder}: {error.strerror}. Choose another folder.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
