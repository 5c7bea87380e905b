"""Searches on fitness functions whose optimum is known by enumeration."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.records import SlimpiError
from pipeline import plan_evolve, plan_search
from pipeline.plan_evolve import EvolutionSettings, Evolved, evolve, switched
from pipeline.plan_search import Formats, GeneticSettings, Space, genetic, penalized_fitness

BITS = {"Q2_K": 2.625, "Q4_K": 4.5, "Q6_K": 6.5625}


def space_of(n: int, budget_bits: float | None, seed: int = 0) -> Space:
    """n tensors of a few sizes, each open to three formats; the budget in bits a weight."""
    rng = random.Random(seed)
    weights = [rng.choice([256, 512, 1024]) for _ in range(n)]
    sizes = {f"t{i}": {kind: round(w * bits / 8) for kind, bits in BITS.items()} for i, w in enumerate(weights)}
    return Space(sizes, None if budget_bits is None else int(sum(weights) * budget_bits / 8))


def touchy(space: Space, seed: int = 0) -> Any:
    """A loss that is no sum over tensors: neighbours in low bits hurt together."""
    rng = random.Random(seed)
    weight = {name: math.exp(rng.gauss(0, 1.5)) for name in space.levels}

    def loss(formats: Formats) -> float:
        errors = [weight[name] * 4.0 ** -BITS[kind] for name, kind in formats.items()]
        return sum(errors) + 3 * sum(math.sqrt(a * b) for a, b in itertools.pairwise(errors))

    return loss


def optimum(space: Space, loss: Any) -> float:
    genomes = itertools.product(*(range(len(kinds)) for kinds in space.levels.values()))
    return min(loss(space.formats(genome)) for genome in genomes if space.fits(genome))


def test_a_space_orders_formats_by_size_and_checks_plans() -> None:
    space = Space({"a": {"Q6_K": 30, "Q2_K": 10}, "b": {"Q4_K": 20}}, 50)
    assert space.levels == {"a": ["Q2_K", "Q6_K"], "b": ["Q4_K"]}
    assert space.formats((1, 0)) == {"a": "Q6_K", "b": "Q4_K"}
    assert space.genome({"b": "Q4_K", "a": "Q6_K"}) == (1, 0)
    assert (space.bytes_of((1, 0)), space.fits((1, 0))) == (50, True)
    with pytest.raises(SlimpiError, match="c is in the plan or in the choices"):
        space.genome({"a": "Q2_K", "b": "Q4_K", "c": "Q4_K"})
    with pytest.raises(SlimpiError, match="b is Q2_K in the plan, open to it are Q4_K"):
        space.genome({"a": "Q2_K", "b": "Q2_K"})
    with pytest.raises(SlimpiError, match="29 bytes are too few: the smallest candidate takes 30"):
        Space(space.sizes, 29)
    for nothing in ({}, {"a": {}}):
        with pytest.raises(SlimpiError, match="nothing to search"):
            Space(nothing)


# Genetic


@pytest.mark.parametrize("seed", range(4))
def test_genetic_finds_the_optimum_and_keeps_the_budget(seed: int) -> None:
    space = space_of(7, 4.2, seed)
    loss = touchy(space, seed)
    seen: list[Formats] = []

    def fitness(formats: Formats) -> float:
        seen.append(formats)
        return float(loss(formats))

    found = genetic(space, fitness, GeneticSettings(population=40, generations=25), seed)
    assert found.fitness == pytest.approx(optimum(space, loss))
    assert found.fitness == loss(found.formats)
    assert all(space.fits(space.genome(formats)) for formats in seen)
    assert found.n_evaluated == len(seen) == len({tuple(formats.values()) for formats in seen})
    assert found.history == sorted(found.history, reverse=True), "elites pass on: it never gets worse"
    assert len(found.history) == 25


def test_genetic_without_a_budget_weighs_bits_against_loss() -> None:
    """The report's fitness: without an accuracy floor the small wins, with one the large."""
    space = space_of(5, None)

    def fitness(floor: float) -> Any:
        def of(formats: Formats) -> float:
            bits = sum(BITS[kind] for kind in formats.values()) / len(formats)
            return penalized_fitness(0.1, bits, bits / 8, max_bits=16, accuracy_floor=floor)

        return of

    small = genetic(space, fitness(0.0), GeneticSettings(), 0)
    large = genetic(space, fitness(6.5 / 8), GeneticSettings(), 0)
    assert set(small.formats.values()) == {"Q2_K"}
    assert set(large.formats.values()) == {"Q6_K"}


def test_penalized_fitness_by_hand() -> None:
    assert penalized_fitness(0.5, 4, 0.80, max_bits=16, accuracy_floor=0.79) == pytest.approx(0.75)
    assert penalized_fitness(0.5, 4, 0.77, max_bits=16, accuracy_floor=0.79, penalty=5) == pytest.approx(0.85)


def test_the_same_seed_gives_the_same_search() -> None:
    space = space_of(8, 4.0)
    loss = touchy(space)
    runs = [genetic(space, loss, GeneticSettings(generations=4), seed) for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0].history != runs[2].history


def test_the_start_takes_part() -> None:
    space = space_of(7, 4.2)
    loss = touchy(space)
    best = min(
        (space.formats(g) for g in itertools.product(range(3), repeat=7) if space.fits(g)), key=loss
    )  # fmt: skip
    found = genetic(space, loss, GeneticSettings(population=8, elites=1, mutated_elites=1, generations=1), 0, [best])
    assert found.formats == best


def test_generations_are_elites_mutated_elites_and_children() -> None:
    space = space_of(30, None)
    rng = random.Random(1)
    ranked = [plan_search._random(space, rng) for _ in range(20)]
    wanted = GeneticSettings(population=20, elites=2, mutated_elites=4, mutation_rate=0.0, crossover_rate=1.0)
    made = plan_search._next_generation(space, ranked, wanted, rng)
    assert len(made) == 20
    assert made[:2] == ranked[:2]

    def n_different(a: Any, b: Any) -> int:
        return sum(x != y for x, y in zip(a, b, strict=True))

    assert [n_different(made[2 + i], ranked[i % 2]) for i in range(4)] == [1, 1, 1, 1]
    for child in made[6:]:
        parents = [set(pair) for pair in zip(*ranked, strict=True)]
        assert sum(gene not in parent for gene, parent in zip(child, parents, strict=True)) <= 1
    mixed = [min(n_different(child, parent) for parent in ranked) for child in made[6:]]
    assert sum(n > 1 for n in mixed) > len(mixed) / 2, "most children have genes of two parents"
    one_parent = GeneticSettings(population=20, elites=2, mutated_elites=4, mutation_rate=0.0, crossover_rate=0.0)
    for child in plan_search._next_generation(space, ranked, one_parent, rng)[6:]:
        assert min(n_different(child, parent) for parent in ranked) == 1


def test_winners_are_the_better_ones_of_their_tournaments() -> None:
    ranked = [(i,) for i in range(10)]
    rng = random.Random(0)
    wins = [plan_search._winner(ranked, 3, rng)[0] for _ in range(2000)]
    assert sum(wins) / 2000 == pytest.approx(2.025, abs=0.15)  # mean of the least of 3 out of 0...9
    assert set(wins) >= set(range(6))


def test_a_candidate_that_diverged_never_wins() -> None:
    space = space_of(4, None)
    for seed in range(10):
        found = genetic(
            space, lambda f: math.nan if f["t0"] == "Q2_K" else 1.0, GeneticSettings(generations=2), seed
        )  # fmt: skip
        assert found.history == [1.0, 1.0]
        assert found.formats["t0"] != "Q2_K"


def test_genes_without_a_choice_stay() -> None:
    space = Space({"a": {"Q4_K": 1}, "b": {"Q4_K": 1}})
    found = genetic(space, lambda f: 1.0, GeneticSettings(generations=2), 0)
    assert (found.formats, found.n_evaluated) == ({"a": "Q4_K", "b": "Q4_K"}, 1)


@pytest.mark.parametrize("changes", [{"elites": 0}, {"population": 6}, {"generations": 0}])
def test_settings_that_leave_no_room_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(SlimpiError, match="keep 1 elite or more"):
        GeneticSettings(**changes)


# Evolutionary

SMALL = EvolutionSettings(offspring=8, stages=((1, 4), (2, 2), (5, 1)), max_generations=30)


def start_of(space: Space) -> Formats:
    """The largest plan that lowers tensors in the order of their names."""
    genome = tuple(len(kinds) - 1 for kinds in space.levels.values())
    while not space.fits(genome):
        index = next(i for i, level in enumerate(genome) if level)
        genome = (*genome[:index], genome[index] - 1, *genome[index + 1 :])
    return space.formats(genome)


def run(space: Space, fitness: Any, path: Path, wanted: EvolutionSettings = SMALL, **changes: Any) -> Evolved:
    arguments: dict[str, Any] = {"seed": 3, "state_path": path / "state.json", "budget_s": 1e9, **changes}
    return evolve(space, start_of(space), fitness, wanted, **arguments)


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_the_optimum_and_keeps_the_budget(tmp_path: Path, seed: int) -> None:
    space = space_of(7, 4.2, seed)
    loss = touchy(space, seed)
    seen: list[Formats] = []

    def fitness(formats: Formats, n_samples: int) -> float:
        seen.append(formats)
        return float(loss(formats))

    assert loss(start_of(space)) > 1.05 * optimum(space, loss)
    found = run(space, fitness, tmp_path, seed=seed)
    assert found.fitness == pytest.approx(optimum(space, loss))
    assert found.fitness == loss(found.formats)
    assert found.stopped == "generations"
    assert all(space.fits(space.genome(formats)) for formats in seen)
    values = [value for _, _, value in found.history]
    assert values == sorted(values, reverse=True)
    assert values[0] == loss(start_of(space))


def test_selection_narrows_on_growing_samples(tmp_path: Path) -> None:
    space = space_of(12, 4.2)
    loss = touchy(space)
    calls: list[tuple[int, Formats]] = []

    def fitness(formats: Formats, n_samples: int) -> float:
        calls.append((n_samples, formats))
        return float(loss(formats))

    wanted = EvolutionSettings(offspring=8, stages=((1, 4), (2, 2), (5, 1)), max_generations=1)
    run(space, fitness, tmp_path, wanted)
    assert [n for n, _ in calls] == [5] + [1] * 8 + [2] * 4 + [5] * 2
    first, second = [f for _, f in calls[1:9]], [f for _, f in calls[9:13]]
    assert second == sorted(first, key=loss)[:4]
    assert [f for _, f in calls[13:]] == sorted(second, key=loss)[:2]
    assert len({tuple(f.values()) for f in first}) == 8, "offspring differ"
    assert calls[0][1] not in first


def test_the_last_stage_decides_and_only_the_better_replaces(tmp_path: Path) -> None:
    """On few samples everything looks better than the start, on the last ones nothing is."""
    space = space_of(10, 4.2)
    start = start_of(space)

    def fitness(formats: Formats, n_samples: int) -> float:
        return (0.0 if formats == start else 1.0) if n_samples == 5 else -1.0

    found = run(space, fitness, tmp_path, EvolutionSettings(8, SMALL.stages, max_generations=5))
    assert (found.formats, found.fitness, len(found.history)) == (start, 0.0, 1)
    level = run(space, lambda f, n: 7.0, tmp_path / "level", EvolutionSettings(8, SMALL.stages, max_generations=5))
    assert level.formats == start, "an equal candidate does not replace the parent"


@pytest.mark.parametrize("calls", [0, 1, 5, 13, 15, 40, 77])
def test_a_search_that_was_ended_gives_the_same_answer(tmp_path: Path, calls: int) -> None:
    space = space_of(9, 4.2)
    loss = touchy(space)
    made: list[int] = []

    def fitness(formats: Formats, n_samples: int) -> float:
        made.append(n_samples)
        return float(loss(formats)) * (1 + 1 / n_samples)

    def ended(formats: Formats, n_samples: int) -> float:
        if len(made) == calls:
            raise KeyboardInterrupt
        return fitness(formats, n_samples)

    wanted = EvolutionSettings(offspring=8, stages=SMALL.stages, max_generations=8)
    whole = run(space, fitness, tmp_path / "whole", wanted)
    n_whole = len(made)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        run(space, ended, tmp_path / "ended", wanted)
    resumed = run(space, fitness, tmp_path / "ended", wanted)
    assert (resumed.formats, resumed.fitness) == (whole.formats, whole.fitness)
    assert [(g, v) for g, _, v in resumed.history] == [(g, v) for g, _, v in whole.history]
    assert len(made) == n_whole, "nothing was measured twice"
    state = json.loads((tmp_path / "ended" / "state.json").read_text())
    assert (state["measured"], state["generation"]) == ({}, 8), "only the generation under way is kept"
    assert run(space, ended, tmp_path / "ended", wanted).formats == whole.formats, "it is over: nothing is measured"


@pytest.mark.parametrize("calls", [1, 14, 20])
def test_a_search_that_was_killed_goes_on_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The file as a kill at that moment would leave it; with a write after each measurement nothing is lost."""
    monkeypatch.setattr(plan_evolve, "_SAVE_EVERY_S", 0.0)
    space = space_of(9, 4.2)
    loss = touchy(space)
    made: list[int] = []
    left: list[bytes] = []

    def fitness(formats: Formats, n_samples: int) -> float:
        made.append(n_samples)
        if len(made) == calls + 1:
            left.append((tmp_path / "state.json").read_bytes())
        return float(loss(formats))

    wanted = EvolutionSettings(offspring=8, stages=SMALL.stages, max_generations=2)
    whole = run(space, fitness, tmp_path, wanted)
    n_whole = len(made)
    (tmp_path / "state.json").write_bytes(left[0])
    made[:] = [0] * (calls + 1)
    resumed = run(space, fitness, tmp_path, wanted)
    assert (resumed.formats, resumed.fitness) == (whole.formats, whole.fitness)
    assert len(made) - 1 == n_whole


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_is_over_when_measuring_took_it_and_counts_over_runs(tmp_path: Path) -> None:
    space = space_of(9, 4.2)
    loss = touchy(space)
    clock, calls = Clock(), []

    def fitness(formats: Formats, n_samples: int) -> float:
        clock.now_s += n_samples
        calls.append(n_samples)
        return float(loss(formats))

    found = run(space, fitness, tmp_path, budget_s=100, clock=clock)
    assert found.stopped == "time"
    assert 100 <= sum(calls) < 105, "the measurement under way when time ran out counts"
    assert found.elapsed_s == sum(calls)
    assert found.fitness == loss(found.formats)
    n = len(calls)
    clock.now_s += 10_000  # between the runs no time counts
    assert run(space, fitness, tmp_path, budget_s=100, clock=clock).formats == found.formats
    assert len(calls) == n
    more = run(space, fitness, tmp_path, budget_s=150, clock=clock)
    assert more.stopped == "time"
    assert 150 <= sum(calls) < 155
    assert [g for g, _, _ in more.history] == sorted(g for g, _, _ in more.history)


def test_no_time_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match="over before the start was measured"):
        run(space_of(4, 4.2), lambda f, n: 1.0, tmp_path, budget_s=0)


def test_a_start_without_neighbours_is_the_answer(tmp_path: Path) -> None:
    space = Space({"a": {"Q4_K": 10, "Q6_K": 20}}, 10)
    found = run(space, lambda f, n: 1.0, tmp_path)
    assert (found.formats, found.stopped) == ({"a": "Q4_K"}, "no neighbours")


def test_without_a_budget_the_start_is_it(tmp_path: Path) -> None:
    space = space_of(6, 4.2)
    free = Space(space.sizes)
    loss = touchy(space)
    start = start_of(space)
    found = evolve(
        free, start, lambda f, n: loss(f), SMALL, seed=0, state_path=tmp_path / "state.json", budget_s=1e9
    )  # fmt: skip
    assert free.bytes_of(free.genome(found.formats)) <= free.bytes_of(free.genome(start))


def test_a_diverged_candidate_is_saved_and_never_wins(tmp_path: Path) -> None:
    space = space_of(8, 4.2)
    start = start_of(space)

    def fitness(formats: Formats, n_samples: int) -> float:
        return 1.0 if formats == start else math.nan

    wanted = EvolutionSettings(offspring=4, stages=((1, 2), (2, 1)), max_generations=2)
    assert run(space, fitness, tmp_path, wanted).formats == start

    def ended(formats: Formats, n_samples: int) -> float:
        ended.calls += 1  # type: ignore[attr-defined]
        if ended.calls == 4:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return fitness(formats, n_samples)

    ended.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run(space, ended, tmp_path / "b", wanted)
    assert run(space, fitness, tmp_path / "b", wanted).formats == start


def test_another_searchs_state_is_refused(tmp_path: Path) -> None:
    space = space_of(6, 4.2)
    run(space, lambda f, n: 1.0, tmp_path)
    run(space, lambda f, n: 1.0, tmp_path, EvolutionSettings(8, SMALL.stages, max_generations=31))  # goes on
    for changed in (space_of(6, 4.3), space_of(6, 4.2, seed=1)):
        with pytest.raises(SlimpiError, match="the state of another search"):
            run(changed, lambda f, n: 1.0, tmp_path)
    with pytest.raises(SlimpiError, match="the state of another search"):
        run(space, lambda f, n: 1.0, tmp_path, seed=4)
    (tmp_path / "state.json").write_text('{"version": 1, "sea')
    with pytest.raises(SlimpiError, match="is not a search's state"):
        run(space, lambda f, n: 1.0, tmp_path)
    (tmp_path / "state.json").write_text('{"version": 1}')
    with pytest.raises(SlimpiError, match="is not a search's state"):
        run(space, lambda f, n: 1.0, tmp_path)


def test_a_start_over_the_budget_is_refused(tmp_path: Path) -> None:
    space = Space({"a": {"Q4_K": 10, "Q6_K": 20}}, 15)
    with pytest.raises(SlimpiError, match="the start takes 20 bytes, over 15"):
        evolve(
            space, {"a": "Q6_K"}, lambda f, n: 1.0, SMALL, seed=0, state_path=tmp_path / "state.json", budget_s=1
        )  # fmt: skip


@pytest.mark.parametrize(
    "stages", [(), ((1, 8), (4, 2)), ((4, 8), (1, 1)), ((1, 2), (4, 8), (8, 1)), ((1, 64), (2, 1)), ((0, 1),)]
)
def test_stages_that_do_not_narrow_are_refused(stages: Any) -> None:
    with pytest.raises(SlimpiError, match="survivors falling to 1"):
        EvolutionSettings(offspring=32, stages=stages)


@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(2.7, 6.5), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_switches_keep_the_budget_and_move_few_levels(seed: int, n: int, bits: float, most: int) -> None:
    space = space_of(n, bits, seed)
    rng = random.Random(seed)
    parent = space.genome(start_of(space))
    child = switched(space, parent, most, rng)
    assert space.fits(child)
    assert all(0 <= level < len(kinds) for level, kinds in zip(child, space.levels.values(), strict=True))
    moved = [b - a for a, b in zip(parent, child, strict=True)]
    fully = all(level == len(kinds) - 1 for level, kinds in zip(parent, space.levels.values(), strict=True))
    if child != parent:
        assert max(moved) >= 1, "a child that only loses cannot be better"
    if fully:
        assert child == parent
    made = plan_evolve._offspring(space, parent, SMALL, rng)
    assert len(set(made)) == len(made) <= SMALL.offspring
    assert parent not in made


def test_what_lowering_a_large_tensor_leaves_over_is_used() -> None:
    small = {f"s{i}": {"Q2_K": 10, "Q4_K": 20} for i in range(5)}
    space = Space({"large": {"Q2_K": 100, "Q4_K": 200}, **small}, 250)
    for seed in range(10):
        assert switched(space, (1, 0, 0, 0, 0, 0), 1, random.Random(seed)) == (0, 1, 1, 1, 1, 1)
