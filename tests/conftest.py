"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import World

from device import facts

REPO = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Past the time that $SLIMPI_SLOW_UNTIL names (seconds since 1970; .ci/run sets it), slow tests are skipped.

    Machines that run the gate differ by a factor of 2.5; it has to end within its limit on all of them.
    """
    until = os.environ.get("SLIMPI_SLOW_UNTIL")
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip("the gate's time for slow tests is over: make test-slow runs them all")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: $SLIMPI_DATA, else shared/data beside the repository.

    Without it a test skips with a reason, except under CI=true, where it fails: a green run there must have run it.
    """
    named = os.environ.get("SLIMPI_DATA")
    folder = Path(named) if named else REPO.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    reason = f"no data in {folder}: point SLIMPI_DATA at a folder laid out like shared/data"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables as wide as in a log file, and signal handlers that a tested entry point set do not outlive its test."""
    monkeypatch.setenv("COLUMNS", "210")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def quick_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """How busy the machine is, from a glance in place of a look."""
    monkeypatch.setattr(facts, "BUSY_WINDOW_S", 0.01)
    monkeypatch.setattr(facts, "SPIN_S", 0.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A small model, a small classifier and their data, in a folder of the test's own."""
    return World.make(tmp_path)
