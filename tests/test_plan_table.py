"""benchmarks/plan_table.py: a whole run on a tiny model; every plan keeps its size, and swapped weights count."""

from __future__ import annotations

from pathlib import Path

import plan_table
import pytest
import torch
from test_plan_costs import profile_report
from tiny_models import save_tiny

from device.records import encode, read_record
from device.results import Report
from pipeline import plan
from pipeline.build import build
from pipeline.plan_costs import products
from pipeline.progress import Progressor
from pipeline.recipes import read_recipe
from pipeline.store import load_artifact, places


def test_a_whole_run_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "hf", torch.bfloat16)
    (tmp_path / "tiny.toml").write_text(
        f'name = "tiny"\nsource = "path:{tmp_path / "hf"}"\nexport = "gguf"\nvariants = ["F16"]\n'
        "[calibration]\nn_ctx = 64\nn_chunks = 4\n[golden]\nn = 4\nn_tokens = 16\n"
    )
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path))
    monkeypatch.setattr(plan_table, "N_CTX", 32)
    monkeypatch.setattr(
        plan_table, "GENETIC", plan_table.GeneticSettings(population=4, generations=2, elites=1, mutated_elites=1)
    )
    profile, out = tmp_path / "profile.json", tmp_path / "plans.json"
    profile.write_bytes(encode(_profiled(tmp_path / "tiny.toml", {"IQ4_NL": 3.0, "Q5_0": 2.0, "Q8_0": 1.0})))
    argv = [str(tmp_path / "tiny.toml"), "--bits", "5.25", "--seconds", "1", "--text", "demo:prose_test.txt"]
    assert (
        plan_table.main([*argv, "--chunks", "3", "--threads", "1", "--out", str(out), "--profile", str(profile)]) == 0
    )
    rows = {row.label: row for row in read_record(out, plan_table.Plans).rows}
    assert rows.keys() == {"uniform IQ4_NL", "uniform Q5_0", *plan_table.WAYS, *plan_table.IN_TIME}
    uniform, mixed = rows.pop("uniform IQ4_NL"), rows.pop("uniform Q5_0")
    assert (uniform.bits_per_linear_weight, mixed.bits_per_linear_weight) == (4.5, 5.5)
    assert all(4.5 < row.bits_per_linear_weight <= 5.25 for row in rows.values())
    assert 0 < sum(mixed.kld_chunks) < sum(uniform.kld_chunks)
    program, found = rows["program, predicted divergence"], rows["evolutionary search from the last program"]
    assert found.fitness <= program.fitness, "the search never ends below where it starts"
    assert found.n_measured > program.n_measured == 0
    assert rows["genetic algorithm by layer"].n_measured >= 4
    half, fastest = (rows[label].token_us or 0.0 for label in plan_table.IN_TIME)
    own = program.token_us or 0.0
    assert 0 < fastest < half <= (own + fastest) / 2 * 1.001, "more bits are faster here, so that there is time to save"
    assert all((row.token_us or 0.0) >= fastest * 0.999 for row in rows.values()), "none of this size is faster"


def _profiled(recipe_path: Path, ns_per_weight: dict[str, float]) -> Report:
    """As if a device had timed the recipe's products, each type's at one speed whatever the shape."""
    recipe = read_recipe(recipe_path)
    (folder,) = build(recipe, places(), Progressor(), 1, [recipe.reference])
    found = products(plan.read_base(folder / load_artifact(folder).entry), ns_per_weight)
    return profile_report({(p.format, p.rows, p.columns): [ns_per_weight[p.format]] for p in found})
