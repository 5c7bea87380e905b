"""Evolutionary search on a measured fitness, from a plan that is good already, until its time is over.

After EvoPress (Sieberling et al. 2024, "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
algorithm 1): a parent, offspring by level switches that keep the size, selection in steps on more and more samples,
the parent replaced only by something better. Theirs switches among tensors of one size; ours among all, and keeps the
budget in bytes.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from device.records import Record, SlimpiError, write_atomic
from pipeline.plan_search import Formats, Genome, Space, number
from pipeline.progress import Tick, quiet
from pipeline.store import digest

_TRIES = 20  # per offspring, at making one that is new
_SAVE_EVERY_S = 1.0  # a kill costs that much, and the measurement under way; Ctrl-C only the latter


@dataclass(frozen=True)
class EvolutionSettings:
    """`stages`: (samples to measure on, survivors) of each selection step; the last has one survivor, and the parent
    competes there. `max_switches`: levels moved up in one offspring, small numbers being likelier."""

    offspring: int = 32
    stages: tuple[tuple[int, int], ...] = ((1, 8), (4, 2), (16, 1))
    max_switches: int = 3
    max_generations: int | None = None

    def __post_init__(self) -> None:
        kept = [self.offspring, *(survivors for _, survivors in self.stages)]
        samples = [n for n, _ in self.stages]
        narrowing = kept == sorted(kept, reverse=True) and samples == sorted(samples)
        if not self.stages or not narrowing or kept[-1] != 1 or samples[0] < 1 or self.max_switches < 1:
            raise SlimpiError(
                f"stages {self.stages} for {self.offspring} offspring: give (samples, survivors) with samples growing, "
                "survivors falling to 1, and max_switches from 1 on."
            )


@dataclass(frozen=True)
class Evolved:
    """The best plan, its fitness on the last stage's samples, and how the search went: (generation, seconds,
    fitness) at the start and whenever a better one was found."""

    formats: Formats
    fitness: float
    generations: int
    elapsed_s: float
    history: list[tuple[int, float, float]]
    stopped: Literal["time", "generations", "no neighbours"]


class _State(Record, frozen=True, kw_only=True):
    """What a search needs to go on: the state file. `measured` is of the generation under way."""

    version: Literal[1] = 1
    search: str
    generation: int = 0
    parent: list[int]
    fitness: float | None = None
    rng: list[Any]
    elapsed_s: float = 0.0
    history: list[tuple[int, float, float]] = msgspec.field(default_factory=list)
    measured: dict[str, float] = msgspec.field(default_factory=dict)


def evolve(
    space: Space,
    start: Mapping[str, str],
    fitness: Callable[[Formats, int], float],
    settings: EvolutionSettings,
    *,
    seed: int,
    state_path: Path,
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
    tick: Tick = quiet,
) -> Evolved:
    """Improve `start` for budget_s seconds of measuring, those of earlier runs included.

    fitness(formats, n_samples): lower is better, the same for the same arguments. What was measured is saved to
    state_path; a search that was ended goes on from there to the very answer it would have had. A space without
    a budget gets the start's size. SlimpiError if the start exceeds the budget, or state_path is another search's.
    """
    parent = space.genome(start)
    if space.budget_bytes is None:
        space = Space(space.sizes, space.bytes_of(parent))
    if not space.fits(parent):
        raise SlimpiError(f"the start takes {space.bytes_of(parent)} bytes, over {space.budget_bytes}. Start smaller.")
    key = digest(
        [space.sizes, space.budget_bytes, dict(start), settings.offspring, settings.stages, settings.max_switches, seed]
    )
    search = _Search(space, fitness, settings, state_path, budget_s, clock, _load(state_path, key, parent, seed), tick)
    return search.run()


class _OutOfTime(Exception):  # noqa: N818 - ends the loop, no error
    pass


@dataclass
class _Search:
    space: Space
    fitness: Callable[[Formats, int], float]
    settings: EvolutionSettings
    path: Path
    budget_s: float
    clock: Callable[[], float]
    state: _State
    tick: Tick
    begin_s: float = field(init=False)
    written_s: float = -math.inf

    def run(self) -> Evolved:
        self.begin_s = self.clock() - self.state.elapsed_s
        try:
            return self.search()
        finally:
            self.write()

    def search(self) -> Evolved:
        try:
            if self.state.fitness is None:
                first = self.measure(tuple(self.state.parent), self.settings.stages[-1][0])
                self.save(fitness=first, history=[(0, self.elapsed_s, first)], measured={})
            while self.settings.max_generations is None or self.state.generation < self.settings.max_generations:
                if not self.generation():
                    return self.result("no neighbours")
        except _OutOfTime:
            return self.result("time")
        return self.result("generations")

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.begin_s

    def generation(self) -> bool:
        """One round of offspring and selection; False if there are no other candidates."""
        rng = random.Random()  # noqa: S311 - a search, not a secret
        version, internal, gauss = self.state.rng
        rng.setstate((version, tuple(internal), gauss))
        parent, best = tuple(self.state.parent), self.state.fitness
        assert best is not None
        candidates = _offspring(self.space, parent, self.settings, rng)
        if not candidates:
            return False
        values: dict[Genome, float] = {}
        for n_samples, survivors in self.settings.stages:
            values = {genome: self.measure(genome, n_samples) for genome in candidates}
            candidates = sorted(candidates, key=values.__getitem__)[:survivors]
        winner = candidates[0]
        number_of, history = self.state.generation + 1, self.state.history
        if values[winner] < best:
            parent, best = winner, values[winner]
            history = [*history, (number_of, self.elapsed_s, best)]
        state = rng.getstate()
        self.save(
            generation=number_of, parent=list(parent), fitness=best, history=history, measured={}, rng=list(state)
        )
        self.tick(number_of, self.settings.max_generations or 0, f"best {best:.6g} after {self.elapsed_s:.0f} s")
        return True

    def measure(self, genome: Genome, n_samples: int) -> float:
        """The fitness, from the state file if it was measured before this generation was broken off."""
        key = f"{n_samples}:{','.join(map(str, genome))}"
        if key not in self.state.measured:
            if self.elapsed_s >= self.budget_s:
                raise _OutOfTime
            value = number(self.fitness(self.space.formats(genome), n_samples))
            self.save(measured={**self.state.measured, key: value})
        return self.state.measured[key]

    def save(self, **changes: Any) -> None:
        self.state = msgspec.structs.replace(self.state, elapsed_s=self.elapsed_s, **changes)
        if self.elapsed_s - self.written_s >= _SAVE_EVERY_S:
            self.write()

    def write(self) -> None:
        self.written_s = self.elapsed_s
        # Not msgspec's JSON: a diverged candidate's fitness is infinite.
        write_atomic(self.path, json.dumps(msgspec.to_builtins(self.state)).encode())

    def result(self, stopped: Literal["time", "generations", "no neighbours"]) -> Evolved:
        state = self.state
        if state.fitness is None:
            raise SlimpiError(f"{self.budget_s:.0f} s were over before the start was measured. Allow more time.")
        formats = self.space.formats(tuple(state.parent))
        return Evolved(formats, state.fitness, state.generation, state.elapsed_s, state.history, stopped)


def _offspring(space: Space, parent: Genome, settings: EvolutionSettings, rng: random.Random) -> list[Genome]:
    """Up to settings.offspring different candidates, none of them the parent."""
    made: dict[Genome, None] = {}
    for _ in range(_TRIES * settings.offspring):
        if len(made) == settings.offspring:
            break
        child = switched(space, parent, settings.max_switches, rng)
        if child != parent:
            made[child] = None
    return list(made)


def switched(space: Space, genome: Genome, max_switches: int, rng: random.Random) -> Genome:
    """Raise a few genes by a level, lower others until the budget is kept, and use up what that leaves over."""
    levels, tops = list(genome), [len(kinds) - 1 for kinds in space.levels.values()]
    raised: set[int] = set()
    for _ in range(min(rng.randint(1, max_switches), rng.randint(1, max_switches))):
        if open_to := [i for i, top in enumerate(tops) if levels[i] < top and i not in raised]:
            raised.add(index := rng.choice(open_to))
            levels[index] += 1
    lowered: set[int] = set()
    while not space.fits(tuple(levels)):
        # Only where nothing else is left to lower do the raised ones go down again.
        others = [i for i, level in enumerate(levels) if level and i not in raised]
        lowered.add(index := rng.choice(others or [i for i, level in enumerate(levels) if level]))
        levels[index] -= 1
    if lowered:
        for index in rng.sample(range(len(levels)), len(levels)):
            more = (*levels[:index], levels[index] + 1, *levels[index + 1 :])
            if levels[index] < tops[index] and index not in lowered and space.fits(more):
                levels = list(more)
    gained = any(new > old for new, old in zip(levels, genome, strict=True))
    return tuple(levels) if gained else genome  # one that only loses cannot be better


def _load(path: Path, search: str, parent: Genome, seed: int) -> _State:
    if not path.exists():
        state = random.Random(seed).getstate()  # noqa: S311
        return _State(search=search, parent=list(parent), rng=list(state))
    try:
        found = msgspec.convert(json.loads(path.read_bytes()), _State)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise SlimpiError(f"{path} is not a search's state: {error}. Remove it to start anew.") from error
    if found.search != search:
        raise SlimpiError(f"{path} is the state of another search (other choices, start, settings or seed). Remove it.")
    return found
