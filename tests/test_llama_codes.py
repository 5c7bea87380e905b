"""Types whose codes are llama.cpp's own, under our feedback and in our plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ggml_side
import msgspec
import numpy as np
import pytest
import torch
from test_plan_costs import profile_report
from test_quantize import models, quantized, tiny_recipe
from toy_layers import samples, stats_of, toy_layer

from device.records import SlimpiError, encode
from device.schema import Artifact
from pipeline import fit, hessians, plan, plan_costs, predicted_costs, sensitivity
from pipeline.build import build
from pipeline.checkpoint import Tensor, held, load
from pipeline.export.gguf import gguf_tensors
from pipeline.formats import FORMATS, Packed
from pipeline.gguf_file import read_gguf
from pipeline.methods import METHODS, gptq, llama_codes, search
from pipeline.plan_costs import PROFILED
from pipeline.planning import source_types
from pipeline.progress import Progressor
from pipeline.quantize import Workshop
from pipeline.recipes import PlanTable, Recipe
from pipeline.store import Places, load_artifact

__all__ = ["models"]
TAKING = [name for name, entry in METHODS.items() if entry.lattices]


def matrix(rows: int = 24, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", llama_codes.TYPES)
def test_codes_are_llama_cpps_whatever_the_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance, kind = matrix(), samples(50, 512, 1).square().mean(0), FORMATS[name]
    assert kind.ggml_type is not None
    expected = ggml_side.quantize(w.numpy(), kind.ggml_type, importance.numpy())
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = llama_codes.choose(w, importance, kind)
        assert np.array_equal(found.data, expected)
    assert found.shape == w.shape
    theirs = ggml_side.dequantize(expected, kind.ggml_type, 512)
    assert np.allclose(found.dequantize().numpy(), theirs, rtol=1e-6, atol=1e-9)


def test_columns_without_importance_and_zero_rows_are_no_trouble() -> None:
    w, importance = matrix(), torch.ones(512)
    importance[::7], w[3] = 0, 0
    for name in llama_codes.TYPES:
        found = llama_codes.choose(w, importance, FORMATS[name]).dequantize()
        assert found.isfinite().all()
        assert not found[3].any()


@pytest.mark.parametrize("name", llama_codes.TYPES)
def test_feedback_from_block_to_block_lowers_the_loss(name: str) -> None:
    x = samples(2000, 1024, 3)
    w, stats = matrix(64, 1024, 1), stats_of(x)

    def loss(q: object) -> float:
        assert isinstance(q, Packed)
        return float(((w - q.dequantize()) @ x.T).square().mean())

    with_it = gptq.quantize(w, stats, FORMATS[name])[0]
    without = search.quantize(w, stats, FORMATS[name])[0]
    assert loss(with_it) < 0.97 * loss(without)


def test_matrices_with_one_input_are_coded_together_and_taken_apart_again() -> None:
    layer, stats = toy_layer()
    kinds = dict.fromkeys(("attn_q.weight", "attn_k.weight"), FORMATS["IQ3_XXS"]) | {"attn_v.weight": FORMATS["Q3_K"]}
    made = gptq.run(layer, stats, kinds).tensors
    for name in kinds:
        assert made[name].shape == layer.matrices[name].shape
        alone = gptq.quantize(layer.matrices[name], stats[name], kinds[name])[0]
        if name != "attn_v.weight":
            assert np.array_equal(made[name].data, alone.data)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [m for m in METHODS if m not in TAKING])
def test_a_method_that_takes_none_is_never_given_one(
    method: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = models("llama-wide")
    base = plan.read_base(folder / "base.gguf")
    wanted = plan.uniform(base, "IQ3_XXS", embeddings="Q8_0", output="Q8_0")
    with pytest.raises(SlimpiError, match=r"whose codes only llama\.cpp chooses"):
        quantized(folder, method, wanted, tmp_path)


@pytest.mark.parametrize("method", TAKING)
def test_a_file_holds_what_was_chosen(method: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """Mixed with a type of ours, and a part of the file that other readers of GGUF give back as it was chosen."""
    folder = models("llama-wide")
    base = plan.read_base(folder / "base.gguf")
    wanted = plan.uniform(base, "IQ2_S", embeddings="Q8_0", output="Q8_0", overrides={"*.attn_output.weight": "Q3_K"})
    out = read_gguf(quantized(folder, method, wanted, tmp_path)).tensors
    stats, tensors = hessians.load_stats(folder / "stats"), gguf_tensors(load(folder / "base.gguf"))
    for name in ("blk.0.ffn_down.weight", "blk.1.attn_q.weight"):
        assert out[name].type.name == "IQ2_S"
        single = METHODS[method].outside or search.quantize
        chosen = single(tensors[name].read().float(), stats[name], FORMATS["IQ2_S"])[0]
        assert np.array_equal(out[name].read_rows(0, out[name].n_rows), chosen.data)  # type: ignore[union-attr]


def test_what_a_method_gains_is_measured_a_type(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("llama-wide")
    checkpoint, base = load(folder / "base.gguf"), plan.read_base(folder / "base.gguf")
    shop = Workshop(tmp_path, "tiny", "weights", "stats", torch.device("cpu"), say=lambda message: None)
    stats, types = hessians.load_stats(folder / "stats"), ["Q2_K", "Q3_K", "IQ3_XXS"]
    found = {m: predicted_costs.gains(checkpoint, base, stats, m, types, shop) for m in ("gptq", "search")}
    assert all(gain > 1 for gain in predicted_costs.gains(checkpoint, base, stats, "rtn", types[:2], shop).values())
    assert found["search"] == dict.fromkeys(types, 1.0)
    assert all(0 < found["gptq"][kind] < 0.97 for kind in ("Q2_K", "Q3_K"))
    assert found["gptq"]["IQ3_XXS"] == pytest.approx(1, rel=0.05), "rows of one block have nobody to hand errors on to"
    costs = {"a": {"Q2_K": 2.0, "Q3_K": 3.0}}
    assert predicted_costs.scaled(costs, {"Q2_K": 0.5, "Q3_K": 1.0}) == {"a": {"Q2_K": 1.0, "Q3_K": 3.0}}
    felt = sensitivity.Sensitivity({}, {})
    assert predicted_costs.outer_costs(checkpoint, base, felt, types, shop) == {}


def test_a_gain_is_not_that_of_finding_the_sources_own_grid(models: Callable[[str], Path], tmp_path: Path) -> None:
    """On a grid of Q4_1 one method finds it to the last bit and another not; elsewhere there is nothing of the kind."""
    folder = models("llama-wide")
    base = plan.read_base(folder / "base.gguf")
    shop = Workshop(tmp_path, "tiny", "weights", "stats", torch.device("cpu"), say=lambda message: None)
    plain = load(folder / "base.gguf")
    stats = hessians.load_stats(folder / "stats")
    on_grid = replace(plain, tensors={name: _on_grid(tensor) for name, tensor in plain.tensors.items()})
    for method in ("gptq", "rtn"):
        free, usual = (
            predicted_costs.gains(model, base, stats, method, ["Q4_1", "Q8_0"], shop) for model in (on_grid, plain)
        )
        assert free["Q4_1"] == pytest.approx(usual["Q4_1"], rel=0.3)


def _on_grid(tensor: Tensor) -> Tensor:
    if len(tensor.shape) != 2:
        return tensor
    return held(tensor.name, search.quantize(tensor.read().float(), None, FORMATS["Q4_1"])[0].dequantize())


def recipe(folder: Path, variant: str, types: list[str]) -> Recipe:
    return msgspec.structs.replace(tiny_recipe(folder, ["BF16", variant]), plan=PlanTable(types=types))


def test_a_recipe_names_the_types_of_its_budgets(tmp_path: Path) -> None:
    made = recipe(tmp_path / "hf", "GPTQ-0.2MiB", ["IQ4_NL", "Q5_0", "Q8_0"])
    artifact = load_artifact(build(made, Places(tmp_path / "home"), Progressor(plain=True))[1])
    kinds = {kind for name, kind in artifact.plan.items() if kind not in ("F32", "BF16")}
    assert kinds <= {"IQ4_NL", "Q5_0", "Q8_0"}
    assert 0.19 * 2**20 < artifact.size_bytes <= 0.2 * 2**20
    assert artifact.plan["token_embd.weight"] in {"IQ4_NL", "Q5_0", "Q8_0"}


def test_a_budget_of_memory_leaves_room_for_the_context(tmp_path: Path) -> None:
    first = recipe(tmp_path / "hf", "Q8_0", ["IQ4_NL", "Q8_0"])
    places = Places(tmp_path / "home")
    build(first, places, Progressor(plain=True))
    (base,) = places.stages.glob("*/base.gguf")
    room = plan.memory_limit(base, 2048, 100 * 2**20)
    mib = 100 - fit.MARGIN * (room / 2**20 - 0.2)  # little is left beside a context of 2048 tokens
    bits = []
    for n_ctx in (2048, 512):
        variant = f"SEARCH-{mib:.2f}MiB-ctx{n_ctx}"
        made = load_artifact(build(msgspec.structs.replace(first, variants=["BF16", variant]), places, Progressor())[1])
        assert made.size_bytes <= plan.memory_limit(base, n_ctx, int(round(mib, 2) * 2**20))
        bits.append(made.bits_per_weight)
    assert bits[0] < bits[1] - 1, "a shorter context leaves more for the weights"
    with pytest.raises(SlimpiError, match="do not hold the KV cache"):
        build(msgspec.structs.replace(first, variants=["BF16", "SEARCH-1MiB-ctx2048"]), places, Progressor())


def test_a_profile_and_tokens_a_second_bound_the_plan(tmp_path: Path) -> None:
    """Q8_0 is made fast and everything else slow: with the bound the plan may not have but a little of it."""
    first = recipe(tmp_path / "hf", "Q8_0", ["IQ4_NL", "Q8_0"])
    places = Places(tmp_path / "home")
    build(first, places, Progressor(plain=True))
    base = plan.read_base(next(places.stages.glob("*/base.gguf")))
    times = {
        (p.format, p.rows, p.columns): [1.0 if p.format == "Q8_0" else 10.0]
        for p in plan_costs.products(base, PROFILED)
    }
    (tmp_path / "report.json").write_bytes(encode(profile_report(times)))
    n_weights = sum(math.prod(base.shapes[name]) for name in base.matrices) - math.prod(base.shapes[plan.EMBEDDINGS])
    n_weights += 0 if plan.OUTPUT in base.shapes else math.prod(base.shapes[plan.EMBEDDINGS])

    def planned(**table: object) -> Artifact:
        made = msgspec.structs.replace(
            first, variants=["BF16", "SEARCH-1MiB"], plan=PlanTable(types=["IQ4_NL", "Q8_0"], **table)
        )  # type: ignore[arg-type]
        return load_artifact(build(made, places, Progressor(plain=True))[1])

    profile = str(tmp_path / "report.json")
    assert set(planned().plan.values()) == {"Q8_0", "F32"}
    assert planned(profile=profile, tokens_per_s=1e9 / n_weights / 1.001).plan == planned().plan
    (tmp_path / "report.json").write_bytes(
        encode(profile_report({key: [11.0 - value[0]] for key, value in times.items()}))
    )
    slow = planned(profile=profile, tokens_per_s=1e9 / n_weights / 2)
    looked_up = {plan.EMBEDDINGS} if plan.OUTPUT in base.shapes else set()
    shares = dict.fromkeys(("IQ4_NL", "Q8_0", "F32"), 0)
    for name, kind in slow.plan.items():
        shares[kind] += 0 if name in looked_up else math.prod(base.shapes[name])
    assert 0 < shares["Q8_0"] < 0.2 * shares["IQ4_NL"]
    with pytest.raises(SlimpiError, match="ns"):
        planned(profile=profile, tokens_per_s=1e9 / n_weights * 2)
    with pytest.raises(SlimpiError, match=r"nothing\.json"):
        planned(profile=str(tmp_path / "nothing.json"), tokens_per_s=1)
    with pytest.raises(ValueError, match="go together"):
        planned(profile=profile)


def test_a_plan_can_avoid_the_types_its_source_was_in(tmp_path: Path) -> None:
    first = recipe(tmp_path / "hf", "Q4_0", ["IQ4_NL", "Q4_0"])
    places = Places(tmp_path / "home")
    source = build(first, places, Progressor(plain=True))[1]
    was = load_artifact(source)
    types = ["IQ4_NL", "Q4_1", "Q5_0", "Q8_0"]

    def planned(**table: object) -> dict[str, str]:
        made = msgspec.structs.replace(
            first, source=f"path:{source / was.entry}", variants=["BF16", "SEARCH-0.2MiB"], plan=PlanTable(**table)
        )  # type: ignore[arg-type]
        return load_artifact(build(made, places, Progressor(plain=True))[1]).plan

    taken = {name for name, kind in was.plan.items() if kind == "Q4_0"}
    free = planned(types=types)
    spared = planned(types=types, avoid_source_types=True)
    assert {free[name] for name in taken} & {"Q4_1", "Q5_0"}, "without the rule they are the best there is"
    assert {spared[name] for name in taken} <= {"IQ4_NL", "Q8_0"}
    with pytest.raises(SlimpiError, match="no type left but those of its source"):
        planned(types=["Q4_1"], avoid_source_types=True)


def test_a_source_that_is_no_gguf_has_no_types_to_avoid(tmp_path: Path) -> None:
    assert source_types(tmp_path) == {}


@pytest.mark.parametrize(
    ("types", "variant", "said"),
    [(["Q9_K"], "SEARCH-0.2MiB", "types has 'Q9_K'"), (["IQ3_S"], "RTN-0.2MiB", "rtn chooses codes for none of IQ3_S")],
)
def test_wrong_types_are_refused(types: list[str], variant: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=said):
        build(recipe(tmp_path / "hf", variant, types), Places(tmp_path / "home"), Progressor(plain=True))
    assert not list((tmp_path / "home").glob("**/*RTN*.gguf"))
