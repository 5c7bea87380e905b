"""llama.cpp in a fresh process: its C++ may abort the whole process it runs in, so it never gets ours.

Parent: `run_fresh`. Child: `serve`, called by a module run as `python -m`. The request goes to the child as
JSON on stdin; the child's output, its own lines and llama.cpp's log alike, comes back as lines on one pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device.records import SlimpiError

ERROR_PREFIX = "slimpi-error: "
KEPT_LINES = 6
_ROOT = Path(__file__).resolve().parents[1]


def run_fresh(module: str, request: dict[str, Any], on_line: Callable[[str], None], what: str) -> None:
    """Run `python -m module` on `request`, giving each output line to `on_line`.

    The child is killed if anything interrupts the wait. SlimpiError if it fails: its own message if it raised
    one, else `what`, how it ended and its last lines.
    """
    # -P keeps the working directory off sys.path; no backtrace: ggml would start a debugger to print one.
    env = {**os.environ, "PYTHONPATH": _python_path(), "GGML_NO_BACKTRACE": "1"}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        encoding="utf-8",
        errors="replace",
    )
    last: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died before it listened: its exit code tells
            child.stdin.write(json.dumps(request))
            child.stdin.close()
        for line in child.stdout:
            if line.strip():
                last.append(line.strip())
            on_line(line.rstrip("\n"))
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    if code:
        raise SlimpiError(_failure(what, code, last))


def serve(handle: Callable[[dict[str, Any]], None]) -> int:
    """Child side: read the request, send llama.cpp's log to stdout, handle; exit code 1 on a SlimpiError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent got the same Ctrl-C and ends this process
    sys.unraisablehook = _die  # ctypes would print what a callback raises and carry on without it
    request = json.loads(sys.stdin.read())
    _send_log_to_stdout()
    try:
        handle(request)
    except SlimpiError as error:
        emit(ERROR_PREFIX + str(error))
        return 1
    return 0


def emit(line: str) -> None:
    """Child side: one line to the parent, unbuffered."""
    _write(line.encode() + b"\n")


def _write(data: bytes) -> None:
    try:
        os.write(1, data)
    except BrokenPipeError:
        os._exit(1)  # nobody listens any more: work for a dead parent must not go on


def _die(unraisable: Any) -> None:
    _write(f"{unraisable.err_msg}: {unraisable.exc_value!r}\n".encode())
    os._exit(1)


_KEPT: list[Any] = []  # callbacks C++ may call until the process ends


def _send_log_to_stdout() -> None:
    """Route llama.cpp's log, pieces of lines as they come, to stdout."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def write(level: int, text: bytes, user_data: Any) -> None:
        _write(text)

    _KEPT.append(write)
    llama_cpp.llama_log_set(write, None)


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return f"{_ROOT}{os.pathsep}{inherited}" if inherited else str(_ROOT)


def _failure(what: str, code: int, last: deque[str]) -> str:
    told = [line.removeprefix(ERROR_PREFIX) for line in last if line.startswith(ERROR_PREFIX)]
    if told:
        return told[-1]
    end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = " | ".join(last) or "no output"
    return f"{what} failed ({end}): {lines}. Check that the GGUF is whole and that memory and disk space suffice."
