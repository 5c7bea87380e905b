"""The agent's side of a worker: start it, read it, know how it ended, never leave it behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec

from device.firmware import read
from device.records import SlimpiError, decode
from device.wire import Message, Request

_CHUNK_BYTES = 1 << 16
_QUOTED_LINES = 3
_OFTEN: dict[int, str] = {
    signal.SIGKILL: " (often: out of memory)",
    signal.SIGABRT: " (often: memory that could not be had, or a broken model)",
}
_MESSAGE = cast(Any, Message)  # a union is no type[...] to mypy


class Worker:
    """One `python -m device.worker`, in its own process group so that the terminal's Ctrl-C reaches only the agent.

    `peak_rss_bytes` is known once it has ended, however it ended. Leaving the `with` block kills it if it still runs.
    """

    def __init__(self, request: Request, log: Path) -> None:
        self._log = log
        self._timeout_s = request.job.timeout_s
        self._deadline_s = time.monotonic() + self._timeout_s
        self._timed_out = False
        self._memory_limit_bytes = request.job.memory_limit_bytes
        self.peak_rss_bytes = 0
        threads = str(request.job.threads)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            # llama.cpp asks OpenMP for its threads itself; this holds for the tokenizers' pool and anything else.
            "OMP_NUM_THREADS": threads,
            "RAYON_NUM_THREADS": threads,
        }
        try:
            with log.open("wb") as stderr:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "device.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=environment,
                    process_group=0,
                )
        except OSError as error:
            raise SlimpiError(f"cannot start a worker logging to {log}: {error.strerror}. Free some space.") from error
        self._request = request

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kill=True)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def messages(self) -> Iterator[list[Message]]:
        """Send the request, then yield what the worker says, as many messages at a time as have come.

        Ends when the worker ends or its time is over; it has ended then, see `obituary`.
        """
        self._send_request()
        pending = b""
        while chunk := self._next_chunk():
            *lines, pending = (pending + chunk).split(b"\n")
            if lines:
                yield [decode(line, _MESSAGE, "the worker's output") for line in lines]
        self._end(kill=self._timed_out)

    def obituary(self) -> str:
        """How the worker ended, its peak memory and its last words; empty if it ended well."""
        code = self._process.returncode
        if self._timed_out:
            how = f"took longer than timeout_s = {self._timeout_s} s and was stopped"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += _OFTEN.get(-code, "")
        elif code > 0:
            how = f"ended with exit code {code}"
        else:
            return ""
        peak = f", peak resident memory {self.peak_rss_bytes / 1e6:.0f} MB" if self.peak_rss_bytes else ""
        limit = f", memory_limit_bytes = {self._memory_limit_bytes}" if self._memory_limit_bytes else ""
        return f"the worker {how}{peak}{limit}; see {self._log}{self._last_words()}"

    def _send_request(self) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(msgspec.json.encode(self._request))
            self._process.stdin.close()
        except BrokenPipeError:
            return  # it died already; its end is told by obituary()

    def _next_chunk(self) -> bytes:
        assert self._process.stdout
        remaining_s = max(0.0, self._deadline_s - time.monotonic())
        ready, _, _ = select.select([self._process.stdout], [], [], remaining_s)
        if not ready:
            self._timed_out = True
            return b""
        return os.read(self._process.stdout.fileno(), _CHUNK_BYTES)

    def _end(self, kill: bool) -> None:
        if self._process.returncode is not None:
            return
        if kill:  # not Popen.kill(): it reaps a process that has just ended, and wait4 then finds none
            os.kill(self._process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_rss_bytes = usage.ru_maxrss * 1024  # the kernel's own mark: known even after SIGKILL

    def _last_words(self) -> str:
        lines = (read(self._log) or "").strip().splitlines()[-_QUOTED_LINES:]
        return ": " + " | ".join(line.strip()[:200] for line in lines) if lines else ""
