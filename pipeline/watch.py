"""The agent's events as progress on this terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from device.results import Event, Note, Sample, TaskEnded, TaskStarted
from pipeline.progress import Progressor, Tick, quiet


@contextmanager
def watch(progress: Progressor, name: str) -> Iterator[Callable[[Event], None]]:
    """What takes the events of the device `name`: one progress step a task. Says at the end if nothing had to run."""
    with ExitStack() as stack:
        follower = _Follower(stack, progress, name)
        yield follower
    if not follower.started:
        progress.say(f"  {name}: measured before, replayed from its journal")


class _Follower:
    def __init__(self, stack: ExitStack, progress: Progressor, name: str) -> None:
        self.stack, self.progress, self.name = stack, progress, name
        self.started = False
        self.done = self.total = 0
        self.tick: Tick = quiet

    def __call__(self, event: Event) -> None:
        match event:
            case TaskStarted():
                self.started = True
                self.done, self.total = 0, event.total
                self.tick = self.stack.enter_context(self.progress.step(f"{self.name} {event.name}"))
            case Sample():
                self.done += 1
                self.tick(self.done, self.total, event.series)
            case TaskEnded():
                self.stack.close()
            case Note():
                self.progress.say(f"  {self.name}: {event.message}")
