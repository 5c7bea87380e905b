"""Plans found by measuring: what may be searched, and a genetic algorithm (pipeline.plan_evolve: from a good plan on).

It knows levels (a tensor's formats in order of size) and a fitness function, nothing of models. Lower is better. The
same seed and fitness give the same answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from device.records import SlimpiError
from pipeline.plan import Sizes

Formats = dict[str, str]
Genome = tuple[int, ...]
"""The level of each gene."""


@dataclass(frozen=True)
class Space:
    """What may be chosen: genes (tensors, or any names) with the formats open to each, smallest first.

    `budget_bytes`: no candidate is larger; None = no bound.
    """

    sizes: Sizes
    budget_bytes: int | None = None
    levels: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        if not self.sizes or not all(self.sizes.values()):
            raise SlimpiError("there is nothing to search: a tensor without formats, or no tensors. Give it choices.")
        levels = {name: sorted(row, key=lambda kind: (row[kind], kind)) for name, row in self.sizes.items()}
        object.__setattr__(self, "levels", levels)
        least = self.bytes_of((0,) * len(levels))
        if self.budget_bytes is not None and least > self.budget_bytes:
            raise SlimpiError(
                f"{self.budget_bytes} bytes are too few: the smallest candidate takes {least}. Allow more."
            )

    def formats(self, genome: Genome) -> Formats:
        return {name: kinds[level] for (name, kinds), level in zip(self.levels.items(), genome, strict=True)}

    def genome(self, formats: Mapping[str, str]) -> Genome:
        """SlimpiError unless `formats` has one of the open formats for every gene."""
        if formats.keys() != self.levels.keys():
            odd = min(formats.keys() ^ self.levels.keys())
            raise SlimpiError(
                f"{odd} is in the plan or in the choices, not in both. Start from a plan of these tensors."
            )
        for name, kind in formats.items():
            if kind not in self.levels[name]:
                raise SlimpiError(f"{name} is {kind} in the plan, open to it are {', '.join(self.levels[name])}.")
        return tuple(kinds.index(formats[name]) for name, kinds in self.levels.items())

    def bytes_of(self, genome: Genome) -> int:
        return sum(self.sizes[name][kind] for name, kind in self.formats(genome).items())

    def fits(self, genome: Genome) -> bool:
        return self.budget_bytes is None or self.bytes_of(genome) <= self.budget_bytes


@dataclass(frozen=True)
class GeneticSettings:
    """`elites` pass on as they are, `mutated_elites` as mutated copies; the rest are children of tournament winners.

    crossover_rate: of children with two parents. mutation_rate: of genes that change in a mutation.
    """

    population: int = 30
    generations: int = 20
    elites: int = 3
    mutated_elites: int = 3
    tournament: int = 3
    crossover_rate: float = 0.8
    mutation_rate: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.elites <= self.elites + self.mutated_elites < self.population or self.generations < 1:
            raise SlimpiError(
                f"a population of {self.population} with {self.elites} elites and {self.mutated_elites} mutated ones, "
                f"{self.generations} generations: keep 1 elite or more, room for children, and 1 generation or more."
            )


@dataclass(frozen=True)
class Found:
    """The best candidate, its fitness, the best fitness after each generation, and the candidates measured."""

    formats: Formats
    fitness: float
    history: list[float]
    n_evaluated: int


def penalized_fitness(
    loss: float, bits: float, accuracy: float, *, max_bits: float, accuracy_floor: float, penalty: float = 10.0
) -> float:
    """Fitness of the disaster-tweets report: validation loss + normalized bits + a penalty for accuracy below a floor.

    bits / max_bits is in (0, 1]; the penalty grows with how far (0...1) the accuracy is below the floor.
    """
    return loss + bits / max_bits + penalty * max(0.0, accuracy_floor - accuracy)


def genetic(
    space: Space,
    fitness: Callable[[Formats], float],
    settings: GeneticSettings,
    seed: int,
    start: Sequence[Mapping[str, str]] = (),
) -> Found:
    """Genetic algorithm with elitism, crossover, mutation and mutated elitism; `start` joins the first population.

    Children over the budget are repaired: random genes go down a level until they fit. Equal candidates are measured
    once.
    """
    rng = random.Random(seed)  # noqa: S311 - a search, not a secret
    known: dict[Genome, float] = {}

    def score(genome: Genome) -> float:
        if genome not in known:
            known[genome] = number(fitness(space.formats(genome)))
        return known[genome]

    first = [_repaired(space, space.genome(formats), rng) for formats in start][: settings.population]
    population = first + [_random(space, rng) for _ in range(settings.population - len(first))]
    history = []
    for generation in range(settings.generations):
        if generation:
            population = _next_generation(space, population, settings, rng)
        population.sort(key=score)  # stable: of equals the earlier one stays ahead
        history.append(score(population[0]))
    return Found(space.formats(population[0]), history[-1], history, len(known))


def _next_generation(space: Space, ranked: list[Genome], settings: GeneticSettings, rng: random.Random) -> list[Genome]:
    """From a population, best first."""
    elites = ranked[: settings.elites]
    made = elites + [
        _mutated(space, elites[i % len(elites)], settings.mutation_rate, rng) for i in range(settings.mutated_elites)
    ]
    while len(made) < settings.population:
        child = _winner(ranked, settings.tournament, rng)
        if rng.random() < settings.crossover_rate:
            other = _winner(ranked, settings.tournament, rng)
            child = tuple(rng.choice(pair) for pair in zip(child, other, strict=True))
        made.append(_mutated(space, child, settings.mutation_rate, rng))
    return made


def _winner(ranked: list[Genome], tournament: int, rng: random.Random) -> Genome:
    return ranked[min(rng.randrange(len(ranked)) for _ in range(tournament))]


def _random(space: Space, rng: random.Random) -> Genome:
    return _repaired(space, tuple(rng.randrange(len(kinds)) for kinds in space.levels.values()), rng)


def _mutated(space: Space, genome: Genome, rate: float, rng: random.Random) -> Genome:
    """Each gene with a choice changes with probability `rate`, at least one does."""
    counts = [len(kinds) for kinds in space.levels.values()]
    free = [index for index, count in enumerate(counts) if count > 1]
    if not free:
        return genome
    changed, sure = list(genome), rng.choice(free)
    for index in free:
        if index == sure or rng.random() < rate:
            changed[index] = (genome[index] + rng.randrange(1, counts[index])) % counts[index]
    return _repaired(space, tuple(changed), rng)


def _repaired(space: Space, genome: Genome, rng: random.Random) -> Genome:
    while not space.fits(genome):
        index = rng.choice([i for i, level in enumerate(genome) if level])
        genome = (*genome[:index], genome[index] - 1, *genome[index + 1 :])
    return genome


def number(value: float) -> float:
    """NaN is the worst there is: a diverged candidate must not win a comparison."""
    return math.inf if math.isnan(value) else value
