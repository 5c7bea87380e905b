"""Genetic search over which components of an encoder are fine-tuned and which stay frozen.

A chromosome has one gene a component (`transformer.components`), True = trained; the head always is. The fitness is
the validation loss after fine-tuning from the same checkpoint and seed. From one generation to the next go the elite as
they are (elitism), the elite with one gene flipped (mutated elitism), and children of two parents chosen by tournament,
whose genes come from either (uniform crossover) and flip at `mutation_rate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from device.records import Record, SlimpiError, encode_line
from pipeline.progress import Tick, quiet
from pipeline.tweets.settings import Settings

Chromosome = tuple[bool, ...]


class Evolution(Settings, frozen=True, kw_only=True):
    """population: chromosomes a generation, of which `elite` go on unchanged and `elite` mutated."""

    population: int = 8
    generations: int = 5
    elite: int = 2
    mutation_rate: float = 0.1
    tournament: int = 2

    def __post_init__(self) -> None:
        if not (self.generations >= 1 and self.elite >= 1 and self.population > 2 * self.elite):
            raise ValueError("an evolution needs generations >= 1, elite >= 1 and population > 2 * elite")
        if not (0 <= self.mutation_rate <= 1 and self.tournament >= 1):
            raise ValueError("mutation_rate is from 0 to 1 and tournament at least 1")


class Tried(Record, frozen=True, kw_only=True):
    """One line of the journal: which components were trained, and the validation loss."""

    key: str
    trained: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class Evolved:
    """The best components and loss, how many fine-tunings it took, and the best loss of each generation."""

    trained: tuple[str, ...]
    loss: float
    n_tried: int
    best_by_generation: tuple[float, ...]


def search_components(
    names: Sequence[str],
    fitness: Callable[[tuple[str, ...]], float],
    settings: Evolution,
    seed: int,
    journal: Path,
    key: str,
    progress: Tick = quiet,
) -> Evolved:
    """Evolve which of the components `names` to train; the last is the head, which always is.

    fitness: validation loss, lower is better, the same for the same components; each is asked for once. journal: every
    answer is appended there, and a search that was killed goes on from it; key tells searches of one journal apart
    (checkpoint, rows, fine-tuning). SlimpiError for a journal that is not one, or fewer than two components.
    """
    if len(names) < 2:
        raise SlimpiError(f"components are {list(names)}: a search needs the head and one more.")
    known = _read(journal, key)
    total = settings.population * settings.generations

    def loss_of(genes: Chromosome) -> float:
        trained = tuple(name for name, gene in zip(names, (*genes, True), strict=True) if gene)
        if trained not in known:
            known[trained] = fitness(trained)
            _append(journal, Tried(key=key, trained=trained, loss=known[trained]))
        return known[trained]

    rng = np.random.default_rng(seed)
    n_genes = len(names) - 1
    population = _first(n_genes, settings.population, rng)
    best: list[float] = []
    for generation in range(settings.generations):
        losses = []
        for i, genes in enumerate(population):
            losses.append(loss_of(genes))
            progress(generation * settings.population + i + 1, total, f"chromosomes, loss {min(losses):.4f}")
        ranked = [population[i] for i in np.argsort(losses, kind="stable")]
        best.append(min(losses))
        if generation + 1 < settings.generations:
            population = _next(ranked, settings, rng)
    trained = min(known, key=lambda trained: (known[trained], trained))
    return Evolved(trained, known[trained], len(known), tuple(best))


def _first(n_genes: int, size: int, rng: np.random.Generator) -> list[Chromosome]:
    """Everything, nothing but the head, the upper half, then random ones."""
    upper = tuple(i >= n_genes // 2 for i in range(n_genes))
    fixed = [(True,) * n_genes, (False,) * n_genes, upper]
    drawn = [tuple(bool(gene) for gene in rng.random(n_genes) < 0.5) for _ in range(size)]
    return [*fixed, *drawn][:size]


def _next(ranked: list[Chromosome], settings: Evolution, rng: np.random.Generator) -> list[Chromosome]:
    """The generation after one that is ranked from the best to the worst."""
    elite = ranked[: settings.elite]
    mutated = [_flip(genes, int(rng.integers(len(genes)))) for genes in elite]
    children = []
    for _ in range(settings.population - 2 * settings.elite):
        a, b = (ranked[int(rng.integers(len(ranked), size=settings.tournament).min())] for _ in range(2))
        child = [a[i] if rng.random() < 0.5 else b[i] for i in range(len(a))]
        children.append(tuple(gene != (rng.random() < settings.mutation_rate) for gene in child))
    return [*elite, *mutated, *children]


def _flip(genes: Chromosome, at: int) -> Chromosome:
    return tuple(gene != (i == at) for i, gene in enumerate(genes))


def _read(journal: Path, key: str) -> dict[tuple[str, ...], float]:
    """{trained components: loss} of this search; a last line that was cut short is left out."""
    if not journal.exists():
        return {}
    found = {}
    lines = journal.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            tried = msgspec.json.decode(line, type=Tried)
        except msgspec.DecodeError as error:
            if number == len(lines):  # no newline behind it: the process died while writing
                continue
            raise SlimpiError(f"{journal}, line {number}: {error}. Delete the file to search anew.") from error
        if tried.key == key:
            found[tried.trained] = tried.loss
    return found


def _append(journal: Path, tried: Tried) -> None:
    """One line; what is left of a line that was cut short is taken off first."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a+b") as handle:
            handle.seek(0)
            whole = handle.read()
            handle.truncate(whole.rfind(b"\n") + 1)
            handle.write(encode_line(tried))
    except OSError as error:
        raise SlimpiError(f"cannot write {journal}: {error.strerror or error}. Free some space.") from error
