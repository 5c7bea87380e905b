"""Progress of long work: a bar on a terminal, plain lines elsewhere. All of it goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Tick = Callable[[int, int, str], None]  # done, total, what

PLAIN_INTERVAL_S = 15.0


def quiet(done: int, total: int, what: str) -> None:
    """A Tick that shows nothing."""


def remaining(elapsed_s: float, done: int, left: int) -> str:
    """ ", about 3 min left" at the pace so far; empty while there is none to tell."""
    if done <= 0 or left <= 0:
        return ""
    left_s = elapsed_s / done * left
    return f", about {left_s / 60:.0f} min left" if left_s >= 90 else f", about {left_s:.0f} s left"


class Progressor:
    """Shows one step of work at a time; `plain` forces lines even on a terminal."""

    def __init__(self, plain: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.plain = plain or not self.console.is_terminal

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Tick]:
        """Announce `title`, yield a Tick to report with, and close with the seconds it took."""
        started = time.monotonic()
        shower = self._plain_lines(title) if self.plain else self._bar(title)
        with shower as tick:
            yield tick
        self.say(f"  {title}: {time.monotonic() - started:.1f} s")

    @contextmanager
    def _plain_lines(self, title: str) -> Iterator[Tick]:
        last = time.monotonic()
        first: tuple[float, int] | None = None

        def tick(done: int, total: int, what: str) -> None:
            nonlocal last, first
            now = time.monotonic()
            first = first or (now, done)
            if now - last >= PLAIN_INTERVAL_S:
                last = now
                self.say(
                    f"  {title}: {done}/{total or '?'} {what}{remaining(now - first[0], done - first[1], total - done)}"
                )

        yield tick

    @contextmanager
    def _bar(self, title: str) -> Iterator[Tick]:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=None, what="")
            yield lambda done, total, what: bar.update(task, completed=done, total=total or None, what=what[-40:])
