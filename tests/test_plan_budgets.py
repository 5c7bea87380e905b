"""From tables to plans to files: budgets kept by the file that is written, and the searches against the program."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import LlamaShape, write_llama

from device.records import SlimpiError
from pipeline import checkpoint, plan, plan_costs, plan_milp, quantize
from pipeline.export.gguf import export_gguf
from pipeline.methods import METHODS
from pipeline.plan_budgets import Budget, best_plan
from pipeline.plan_evolve import EvolutionSettings, evolve
from pipeline.plan_search import GeneticSettings, Space, genetic
from pipeline.progress import quiet

KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "Q8_0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, base, fixed plan, errors) of a small llama whose ffn_down has 288 columns."""
    folder = tmp_path_factory.mktemp("model")
    write_llama(folder / "source.gguf", LlamaShape(dim=256, ffn=288))
    model = checkpoint.load(folder / "source.gguf")
    export_gguf(model, folder / "base.gguf", "auto")
    base = plan.read_base(folder / "base.gguf")
    fixed = plan.uniform(base, "Q4_0", embeddings="Q8_0", output="Q6_K")
    open_to = plan.choices(base, base.linear, KINDS)
    errors: plan_costs.Costs = {}
    tensors = quantize.gguf_tensors(model)
    for index in range(2):
        layer = quantize.read_layer(tensors, index, (), torch.device("cpu"))
        errors |= plan_costs.layer_errors(layer, {}, open_to, METHODS["rtn"].run, plan_costs.frobenius)
    return model, base, fixed, errors


def write(model: Any, made: plan.Plan, folder: Path) -> Path:
    shop = quantize.Workshop(folder / "stages", "t", "w", "s", torch.device("cpu"), say=lambda message: None)
    parts = quantize.quantize_model(model, "rtn", made, {}, shop, quiet)
    export_gguf(model, folder / "out.gguf", "auto", quantize.encoder(parts, made))
    return folder / "out.gguf"


@pytest.mark.parametrize("budget", [Budget(linear_bits=3.6), Budget(linear_bits=5.0), Budget(file_bytes=700_000)])
def test_the_file_that_is_written_keeps_the_budget(model: Any, tmp_path: Path, budget: Budget) -> None:
    checkpoint, base, fixed, errors = model
    made, choice = best_plan(base, fixed, errors, budget)
    out = write(checkpoint, made, tmp_path)
    written = plan.read_base(out)
    assert dict(written.formats) == dict(made.formats)
    size = out.stat().st_size
    # llama.cpp has file types for single formats only, so that the key may be absent: up to 33 bytes, padded.
    assert 0 <= plan.file_bytes(base, made) - size <= 64
    if budget.file_bytes is not None:
        assert 0 <= budget.file_bytes - size < 40_000
        assert choice.size_bytes <= plan.file_budget(base, fixed, errors, budget.file_bytes)
    else:
        assert budget.linear_bits is not None
        assert budget.linear_bits - 0.3 < plan.linear_bits_per_weight(base, made) <= budget.linear_bits
    assert {made.formats["token_embd.weight"], made.formats["output.weight"]} == {"Q8_0", "Q6_K"}
    assert made.fallbacks == ()


def test_more_budget_is_never_worse_and_a_peers_size_can_be_hit(model: Any) -> None:
    _, base, fixed, errors = model
    totals = [best_plan(base, fixed, errors, Budget(linear_bits=b))[1].error for b in (3.5, 4.0, 4.5, 5.0, 6.0)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]
    peer = plan.file_bytes(base, fixed)
    made, choice = best_plan(base, fixed, errors, Budget(file_bytes=peer))
    assert plan.file_bytes(base, made) <= peer
    assert choice.error <= sum(errors[name]["Q4_0"] for name in errors), "the peer's own plan was open"


def test_bits_are_over_exactly_the_linear_layers(model: Any) -> None:
    _, base, fixed, errors = model
    fewer = dict(list(errors.items())[1:])
    with pytest.raises(SlimpiError, match=r"but blk\.0\.attn_[a-z]+\.weight is on one side only"):
        best_plan(base, fixed, fewer, Budget(linear_bits=4))
    assert best_plan(base, fixed, fewer, Budget(file_bytes=800_000))[0].formats.keys() == base.shapes.keys()
    for wrong in ({}, {"linear_bits": 4.0, "file_bytes": 1}):
        with pytest.raises(SlimpiError, match="is no budget"):
            Budget(**wrong)  # type: ignore[arg-type]


def test_a_budget_of_time_reaches_the_program(model: Any) -> None:
    _, base, fixed, errors = model
    rng = random.Random(0)
    latency = {name: {kind: rng.uniform(1, 2) for kind in row} for name, row in errors.items()}
    free = best_plan(base, fixed, errors, Budget(linear_bits=5.0), latency=latency)[1]
    assert free.latency_ns is not None
    hurried = best_plan(base, fixed, errors, Budget(linear_bits=5.0, latency_ns=0.9 * free.latency_ns), latency=latency)
    assert hurried[1].latency_ns <= 0.9 * free.latency_ns  # type: ignore[operator]
    with pytest.raises(SlimpiError, match="needs a table of latencies"):
        best_plan(base, fixed, errors, Budget(linear_bits=5.0, latency_ns=10.0))


def test_on_sums_of_errors_no_search_beats_the_program(model: Any, tmp_path: Path) -> None:
    """The program's answer is the optimum there: searches come near it, and started from it they keep it."""
    _, base, _, errors = model
    sizes = plan.sizes(base, errors, padded=False)
    budget = plan.bits_budget(base, 4.2)
    best = plan_milp.solve(errors, sizes, budget)
    space = Space(sizes, budget)

    def total(formats: dict[str, str], n_samples: int = 1) -> float:
        return sum(errors[name][kind] for name, kind in formats.items())

    found = genetic(space, total, GeneticSettings(population=60, generations=40), seed=0)
    assert best.error <= found.fitness * (1 + 1e-9)
    assert found.fitness < 1.1 * best.error
    started = genetic(space, total, GeneticSettings(population=10, generations=2), 0, [best.formats])
    assert started.fitness == pytest.approx(best.error)
    wanted = EvolutionSettings(offspring=16, stages=((1, 1),), max_generations=15)
    kept = evolve(space, best.formats, total, wanted, seed=0, state_path=tmp_path / "kept.json", budget_s=60)
    assert kept.fitness == pytest.approx(best.error)
    evolved = evolve(space, found.formats, total, wanted, seed=0, state_path=tmp_path / "more.json", budget_s=60)
    assert best.error * (1 - 1e-9) <= evolved.fitness <= found.fitness


def test_bits_count_no_padding_and_files_do() -> None:
    names = ["blk.0.a.weight", "blk.0.b.weight"]
    base = plan.Base(dict.fromkeys(names, (1, 32)), dict.fromkeys(names, "F16"), 96)
    fixed = plan.Plan(base.formats)
    errors = {name: {"Q4_0": 1.0, "Q8_0": 0.1} for name in names}
    made, choice = best_plan(base, fixed, errors, Budget(linear_bits=4.5))
    assert (set(made.formats.values()), choice.size_bytes) == ({"Q4_0"}, 2 * 18)
    made, choice = best_plan(base, fixed, errors, Budget(file_bytes=96 + 32 + 64))
    assert (sorted(made.formats.values()), choice.size_bytes) == (["Q4_0", "Q8_0"], 32 + 64)
    with pytest.raises(SlimpiError, match="the smallest choice takes 64 bytes"):
        best_plan(base, fixed, errors, Budget(file_bytes=96 + 63))
