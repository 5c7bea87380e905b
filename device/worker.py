"""`python -m device.worker`: one task in one fresh process, so that its memory is that task's memory.

Reads a wire.Request on stdin to its end, writes wire.Message lines on stdout; whatever the runtimes print goes to
stderr. Exit code 0, or 1 after a Failed message. When memory runs out, the kernel takes this process and no other.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from device.memory import MemoryWatch
from device.records import SlimpiError, decode, encode_line
from device.results import Memory
from device.tasks import TASKS
from device.wire import Failed, Finished, Message, Request, Started

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    _die_with_parent()
    die_first()
    out = claim_stdout()
    try:
        request = decode(sys.stdin.buffer.read(), Request, "the agent's request")
        if os.getppid() != request.agent_pid:  # the agent died before _die_with_parent
            return 1
        limit_memory(request.job.memory_limit_bytes)
        _send(out, Finished(memory=_run(request, out)))
    except SlimpiError as error:
        _send(out, Failed(message=str(error)))
        return 1
    except MemoryError:
        limit = request.job.memory_limit_bytes
        why = f"it needs more than memory_limit_bytes = {limit}" if limit else "the machine has no more"
        _send(out, Failed(message=f"out of memory: {why}. Raise the limit or take a smaller task or model."))
        return 1
    return 0


def limit_memory(limit_bytes: int) -> None:
    """Bound this process's private writable memory, resident or not (getrlimit(2), RLIMIT_DATA; 0 = no bound).

    Anonymous memory, that is: a mapped GGUF is shared with the page cache and does not count.
    """
    if limit_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY or limit_bytes < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _run(request: Request, out: BinaryIO) -> Memory:
    watch = MemoryWatch()
    seen: Counter[str] = Counter()
    total = 0
    for message in TASKS[type(request.task)].run(request, request.task):
        if isinstance(message, Started):
            total = message.total
            _send(out, message)
            continue
        if message.index >= request.done.get(message.series, 0):
            _send(out, message)
        seen[message.series] += 1
        watch.look(force=seen.total() == 1 or seen.total() == total)
    return watch.result()


def _send(out: BinaryIO, message: Message) -> None:
    out.write(encode_line(message))
    out.flush()


def claim_stdout() -> BinaryIO:
    """Keep stdout for messages: a stray printf of a C library must not break the stream."""
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "wb")


def _die_with_parent() -> None:
    """The kernel kills this process when the agent dies, however it dies (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_first() -> None:
    """The out-of-memory killer's first choice, so that it spares the agent and sshd (proc(5), oom_score_adj)."""
    Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    raise SystemExit(main())
