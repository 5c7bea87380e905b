"""The seam: what goes over it, and what happens when the other side misbehaves."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from device.schema import SlimpiError
from pipeline import deploy


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_feeds_stdin_and_hands_over_lines() -> None:
    lines: list[bytes] = []
    code, errors = deploy.run(
        "local",
        python("import sys; print(sys.stdin.read()); print('b'); print('oops', file=sys.stderr); sys.exit(3)"),
        b"a" * 100_000,
        lines.append,
    )
    assert (code, errors) == (3, "oops")
    assert [len(line) for line in lines] == [100_001, 2]


def test_unknown_host_is_refused() -> None:
    with pytest.raises(SlimpiError, match=r"'pi@x'.*local"):
        deploy.run("pi@x", ["true"], b"", lambda line: None)


def test_agent_without_report_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "encode", lambda job: b"")
    monkeypatch.setattr(deploy.sys, "executable", "/bin/false")
    with pytest.raises(SlimpiError, match="ended with code 1 and no report"):
        deploy.run_job("local", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", [b"not json\n", b"{}\n", b'{"event":"sample"}\n', b'{"event":"zap"}\n'])
def test_garbage_events_are_an_error(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    def fake(host: str, argv: list[str], stdin: bytes, on_line: deploy.Callable[[bytes], None]) -> tuple[int, str]:
        on_line(line)
        return 0, ""

    monkeypatch.setattr(deploy, "run", fake)
    monkeypatch.setattr(deploy, "encode", lambda job: b"")
    with pytest.raises(SlimpiError, match=r"an event from local"):
        deploy.run_job("local", None)  # type: ignore[arg-type]


def test_interrupt_stops_the_child(tmp_path: Path) -> None:
    """Ctrl-C on the host: the child gets SIGTERM, may tidy up, and is gone when the exception surfaces."""
    mark = tmp_path / "tidied"
    code = (
        "import signal,sys,time,pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *a: (pathlib.Path({str(mark)!r}).touch(), sys.exit(0)))\n"
        "print('up', flush=True)\ntime.sleep(60)"
    )
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        deploy.run("local", python(code), b"", lambda line: None)
    assert mark.exists()
    assert time.monotonic() - started < 20
