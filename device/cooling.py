"""Waiting for a cool CPU, so that timed tasks start alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from device.firmware import temperature_c

LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Cooling:
    """How a wait ended. temperature_c None = there is no sensor, so nothing was waited for."""

    waited_s: float
    temperature_c: float | None
    limit_c: float

    @property
    def reached(self) -> bool:
        return self.temperature_c is not None and self.temperature_c < self.limit_c

    def __str__(self) -> str:
        if self.temperature_c is None:
            return f"wait_cool_c = {self.limit_c:g} C: this machine has no temperature sensor, not waited"
        state = "is below" if self.reached else "is still not below"
        return f"waited {self.waited_s:.0f} s: {self.temperature_c:.1f} C {state} wait_cool_c = {self.limit_c:g} C"


def wait_cool(
    limit_c: float,
    max_s: float,
    read: Callable[[], float | None] = temperature_c,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Cooling:
    """Wait until the CPU is below limit_c, at most max_s seconds; the last three are seams for tests."""
    begin_s = now()
    while True:
        cooling = Cooling(now() - begin_s, read(), limit_c)
        if cooling.reached or cooling.temperature_c is None or cooling.waited_s >= max_s:
            return cooling
        sleep(min(LOOK_EVERY_S, max_s - cooling.waited_s))
