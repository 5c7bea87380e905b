"""The folder lock: others wait or are refused, and a process that dies holds nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from device.records import SlimpiError
from pipeline.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from pipeline.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_waits_says_so_once_and_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    waiting, inside = threading.Event(), threading.Event()

    def busy() -> None:
        said.append("busy")
        waiting.set()

    def second() -> None:
        with locked(tmp_path, busy):
            inside.set()

    thread = threading.Thread(target=second)
    with locked(tmp_path):
        thread.start()
        assert waiting.wait(30)
        assert not inside.wait(0.2)
    thread.join(30)
    assert inside.is_set()
    assert said == ["busy"]


def test_what_busy_raises_ends_the_attempt_and_leaves_the_lock_alone(tmp_path: Path) -> None:
    def refuse() -> None:
        raise SlimpiError("taken")

    with locked(tmp_path):
        with pytest.raises(SlimpiError, match="taken"), locked(tmp_path, refuse):
            pytest.fail("got in")
        with pytest.raises(SlimpiError, match="taken"), locked(tmp_path, refuse):
            pytest.fail("got in")


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"held\n"
    child.kill()
    child.wait()

    def refuse() -> None:
        raise SlimpiError("taken")

    with locked(tmp_path, refuse):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SlimpiError, match=r"file/inside: .*Choose another folder"),
        locked(tmp_path / "file" / "inside"),
    ):
        pytest.fail("got in")
