"""The genetic search over components: it finds what is best, repeats with its seed, and goes on where it was killed."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.records import SlimpiError
from pipeline.tweets.freezing import Evolution, _flip, _next, search_components

NAMES = ["embeddings", "layer.0", "layer.1", "layer.2", "layer.3", "head"]
GOOD = ("layer.1", "layer.3", "head")


def loss(trained: tuple[str, ...]) -> float:
    """Components that differ from GOOD; a pair of them interacts."""
    wrong = set(trained) ^ set(GOOD)
    return len(wrong) + 0.3 * ("embeddings" in trained and "layer.0" in trained)


def test_it_finds_the_best_of_all_chromosomes(tmp_path: Path) -> None:
    everything = [
        tuple(n for n, g in zip(NAMES, (*genes, True), strict=True) if g) for genes in product([0, 1], repeat=5)
    ]
    assert min(everything, key=loss) == GOOD
    found = search_components(NAMES, loss, Evolution(population=10, generations=8), 0, tmp_path / "j", "k")
    assert found.trained == GOOD
    assert found.loss == 0
    assert found.n_tried < len(everything)
    assert list(found.best_by_generation) == sorted(found.best_by_generation, reverse=True)  # elitism


def test_a_killed_search_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def dying(trained: tuple[str, ...]) -> float:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(trained)
        return loss(trained)

    def counting(trained: tuple[str, ...]) -> float:
        asked.append(trained)
        return loss(trained)

    settings = Evolution(population=8, generations=6)
    whole = search_components(NAMES, loss, settings, 3, tmp_path / "whole", "k")
    with pytest.raises(KeyboardInterrupt):
        search_components(NAMES, dying, settings, 3, tmp_path / "cut", "k")
    with (tmp_path / "cut").open("ab") as handle:
        handle.write(b'{"key":"k","trained":["he')  # the power went while a line was written
    assert search_components(NAMES, counting, settings, 3, tmp_path / "cut", "k") == whole
    assert len(asked) == len(set(asked)) == whole.n_tried
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_key_asks_anew_and_a_broken_journal_is_told(tmp_path: Path) -> None:
    small = Evolution(population=3, generations=1, elite=1)
    search_components(NAMES, loss, small, 0, tmp_path / "j", "a")
    found = search_components(NAMES, lambda trained: loss(trained) + 1, small, 0, tmp_path / "j", "b")
    assert found.loss >= 1
    (tmp_path / "j").write_bytes(b"no json\n")
    with pytest.raises(SlimpiError, match="j, line 1"):
        search_components(NAMES, loss, small, 0, tmp_path / "j", "a")
    with pytest.raises(SlimpiError, match="needs the head and one more"):
        search_components(["head"], loss, small, 0, tmp_path / "j", "a")


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_a_generation_keeps_its_elite_and_mutates_it_by_one_gene(seed: int, n_genes: int, elite: int) -> None:
    rng = np.random.default_rng(seed)
    ranked = [tuple(bool(g) for g in rng.random(n_genes) < 0.5) for _ in range(8)]
    after = _next(ranked, Evolution(population=8, elite=elite, mutation_rate=0.0), rng)
    assert len(after) == 8
    assert after[:elite] == ranked[:elite]
    for old, new in zip(ranked[:elite], after[elite : 2 * elite], strict=True):
        assert sum(a != b for a, b in zip(old, new, strict=True)) == 1
    for child in after[2 * elite :]:  # without mutation a gene comes from a parent
        assert all(any(parent[i] == child[i] for parent in ranked) for i in range(n_genes))
    assert _flip(_flip(ranked[0], 0), 0) == ranked[0]


@pytest.mark.parametrize("table", [{"elite": 4}, {"generations": 0}, {"mutation_rate": 1.5}, {"tournament": 0}])
def test_bad_settings_are_refused(table: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(table, Evolution)
