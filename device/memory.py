"""The memory of this process as the kernel counts it, anonymous and file-backed apart."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path

from device.results import Memory

KIB = 1024
_LOOK_EVERY_S = 1.0
_FIELD = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


def parse_kib_fields(text: str) -> dict[str, int]:
    """`Name:   123 kB` lines of a /proc file in bytes; repeated names (as in smaps) are summed."""
    fields: dict[str, int] = {}
    for name, kib in _FIELD.findall(text):
        fields[name] = fields.get(name, 0) + int(kib) * KIB
    return fields


class MemoryWatch:
    """Looks at this process between samples, never inside a timed section, at most once a second."""

    def __init__(self) -> None:
        self._rss = self._anon = self._file = self._pss = self._swap = 0
        self._next_look_s = 0.0

    def look(self, force: bool = False) -> None:
        if not force and time.monotonic() < self._next_look_s:
            return
        status = parse_kib_fields(Path("/proc/self/status").read_text())
        if status.get("VmRSS", 0) >= self._rss:
            self._rss, self._anon, self._file = status["VmRSS"], status["RssAnon"], status["RssFile"]
        self._swap = max(self._swap, status.get("VmSwap", 0))
        self._pss = max(self._pss, _pss_bytes())
        self._next_look_s = time.monotonic() + _LOOK_EVERY_S

    def result(self) -> Memory:
        """The peaks so far. RSS is the kernel's own high-water mark; the other figures are from the looks:
        anonymous and file-backed at the highest RSS seen, PSS and swap at their own highest."""
        status = parse_kib_fields(Path("/proc/self/status").read_text())
        return Memory(
            peak_rss_bytes=max(status["VmHWM"], self._rss),
            peak_pss_bytes=self._pss,
            rss_anon_bytes=self._anon,
            rss_file_bytes=self._file,
            swap_bytes=self._swap,
            major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        )


def _pss_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup")
    source = rollup if rollup.exists() else Path("/proc/self/smaps")  # kernels before 4.14, QEMU's user mode
    return parse_kib_fields(source.read_text())["Pss"]
