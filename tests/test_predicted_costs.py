"""Plans under a budget: the predicted divergence is the measured one, and the budget is kept to the byte."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_convert import TOKENS, agreement, hf_logits

from device.records import SlimpiError
from pipeline import hessians, plan, predicted_costs, sensitivity
from pipeline.architectures import gguf_names, row_order
from pipeline.build import build
from pipeline.checkpoint import Checkpoint, load
from pipeline.export.gguf import export_gguf
from pipeline.plan import Base, Plan
from pipeline.plan_budgets import Budget, best_plan
from pipeline.predicted_costs import CANDIDATES
from pipeline.progress import Progressor, quiet
from pipeline.quantize import Workshop
from pipeline.recipes import Calibration, Golden, Recipe
from pipeline.store import Places, load_artifact
from pipeline.torch_model import in_transformers, streamed

CPU = torch.device("cpu")
CHUNKS = torch.from_numpy(TOKENS.astype(np.int64)).reshape(-1, 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.nn.Module]]:
    root = tmp_path_factory.mktemp("models")
    made: dict[str, torch.nn.Module] = {}

    def get(name: str) -> tuple[Path, torch.nn.Module]:
        folder = root / name
        if name not in made:
            made[name] = tiny_models.save_tiny(name, folder / "hf")
            export_gguf(load(folder / "hf"), folder / "base.gguf", "auto")
        return folder, made[name]

    return get


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "gemma2", "gemma3"])
def test_predicted_divergence_is_the_measured_one(
    name: str, models: Callable[[str], tuple[Path, torch.nn.Module]]
) -> None:
    """Small noise in some rows of one matrix raises the KL divergence by what the rows' sensitivities say."""
    folder, model = models(name)
    checkpoint = load(folder / "hf")
    felt = sensitivity.collect(checkpoint, CHUNKS, CPU)
    names = gguf_names(checkpoint.architecture, list(checkpoint.tensors), checkpoint.config["num_hidden_layers"])
    modules = dict(model.named_modules())
    ratios = []
    for part in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        for index in (0, 2):
            hf = f"model.layers.{index}.{part}"
            ratios.append(measured_over_predicted(checkpoint, model, modules[hf], hf, felt.rows[names[f"{hf}.weight"]]))
    assert felt.rows.keys() == {n for n in names.values() if n.startswith("blk.") and "weight" in n and "norm" not in n}
    assert 0.85 < np.exp(np.mean(np.log(ratios))) < 1.15
    assert 0.6 < min(ratios) < max(ratios) < 1.6


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "gemma3"])
def test_predicted_divergence_of_embeddings_and_output_is_the_measured_one(
    name: str, models: Callable[[str], tuple[Path, torch.nn.Module]]
) -> None:
    folder, model = models(name)
    checkpoint = load(folder / "hf")
    felt = sensitivity.collect(checkpoint, CHUNKS, CPU)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {n: len(terms) for n, terms in felt.outer.items()} == (
        {plan.EMBEDDINGS: 2} if tied else {plan.EMBEDDINGS: 1, plan.OUTPUT: 1}
    )
    before = np.concatenate([hf_logits(model, chunk.numpy()) for chunk in CHUNKS])
    for tensor, terms in felt.outer.items():
        module = model.get_input_embeddings() if tensor == plan.EMBEDDINGS else model.get_output_embeddings()
        noise = (
            0.01 * module.weight.std() * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
        )
        with torch.no_grad():
            module.weight += noise
        after = np.concatenate([hf_logits(model, chunk.numpy()) for chunk in CHUNKS])
        with torch.no_grad():
            module.weight -= noise
        predicted = sum(float((t.weights @ ((noise @ t.hessian) * noise).sum(1)).detach()) for t in terms) / 2
        assert 0.6 < agreement(before, after)[1] / predicted < 1.6, tensor


def measured_over_predicted(
    checkpoint: Checkpoint, model: torch.nn.Module, module: torch.nn.Module, name: str, felt: torch.Tensor
) -> float:
    """The rows are a quarter of them, in GGUF's order: a wrong order of rows would show."""
    order = row_order(checkpoint.architecture, checkpoint.config, f"{name}.weight")
    weight = module.weight
    rows = torch.arange(weight.shape[0])[: weight.shape[0] // 4]
    in_hf = rows if order is None else torch.from_numpy(order.copy())[rows]
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, weight.shape[1])))
    before = np.concatenate([hf_logits(model, chunk.numpy()) for chunk in CHUNKS])
    hook.remove()
    mean_x2 = torch.cat(seen).square().mean(0)
    noise = torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(1)
    noise[in_hf] = 0.01 * weight.std() * torch.randn(len(rows), weight.shape[1], generator=generator)
    with torch.no_grad():
        weight += noise
    after = np.concatenate([hf_logits(model, chunk.numpy()) for chunk in CHUNKS])
    with torch.no_grad():
        weight -= noise
    predicted = 0.5 * float((felt[rows] * (noise[in_hf].square() * mean_x2).sum(1)).sum().detach())
    return agreement(before, after)[1] / predicted


def test_the_same_seed_gives_the_same_sensitivities(
    models: Callable[[str], tuple[Path, torch.nn.Module]], tmp_path: Path
) -> None:
    checkpoint = load(models("qwen2")[0] / "base.gguf")
    first, again, other = (sensitivity.collect(checkpoint, CHUNKS[:2], CPU, seed) for seed in (0, 0, 1))
    assert all(torch.equal(rows, again.rows[name]) for name, rows in first.rows.items())
    assert not all(torch.equal(rows, other.rows[name]) for name, rows in first.rows.items())
    sensitivity.save(tmp_path / "s.npz", first)
    loaded = sensitivity.load(tmp_path / "s.npz")
    assert loaded.rows.keys() == first.rows.keys()
    assert all(torch.equal(rows, loaded.rows[name]) for name, rows in first.rows.items())
    assert {n: len(terms) for n, terms in loaded.outer.items()} == {n: len(terms) for n, terms in first.outer.items()}
    for name, terms in first.outer.items():
        for mine, theirs in zip(terms, loaded.outer[name], strict=True):
            assert torch.equal(mine.weights, theirs.weights)
            assert torch.equal(mine.hessian, theirs.hessian)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "gemma2", "gemma3"])
def test_one_block_at_a_time_feels_what_gradients_of_the_whole_models_weights_say(
    name: str, models: Callable[[str], tuple[Path, torch.nn.Module]]
) -> None:
    checkpoint = load(models(name)[0] / "hf")
    felt = sensitivity.collect(checkpoint, CHUNKS[:3], CPU)
    model = in_transformers(checkpoint)
    lent = sensitivity.collect(checkpoint, CHUNKS[:3], CPU, model=model)
    rows = naive_rows(checkpoint, model, CHUNKS[:3])
    assert felt.rows.keys() == lent.rows.keys() == rows.keys()
    for tensor, expected in rows.items():
        torch.testing.assert_close(felt.rows[tensor].double(), expected, rtol=2e-3, atol=0)
        torch.testing.assert_close(lent.rows[tensor].double(), expected, rtol=2e-3, atol=0)
    for tensor, terms in lent.outer.items():
        for ours, whole in zip(felt.outer[tensor], terms, strict=True):
            torch.testing.assert_close(ours.weights, whole.weights, rtol=1e-3, atol=1e-7)
            scale = float(whole.hessian.abs().max())
            torch.testing.assert_close(ours.hessian, whole.hessian, rtol=1e-3, atol=1e-4 * scale)


def naive_rows(checkpoint: Checkpoint, model: torch.nn.Module, chunks: torch.Tensor) -> dict[str, torch.Tensor]:
    """{matrix: |G_r|^2 summed over chunks / |x|^2 summed over tokens}, G by differentiating the weights."""
    names = gguf_names(checkpoint.architecture, list(checkpoint.tensors), checkpoint.config["num_hidden_layers"])
    wanted = {n: p for n, p in model.named_parameters() if n.startswith("model.layers.") and p.ndim == 2}
    inputs = dict.fromkeys(wanted, 0.0)

    def counted(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] += float(args[0].detach().double().square().sum())

        return count

    modules = dict(model.named_modules())
    hooks = [modules[n.removesuffix(".weight")].register_forward_pre_hook(counted(n)) for n in wanted]
    sums = {name: torch.zeros(len(p), dtype=torch.float64) for name, p in wanted.items()}
    generator = torch.Generator().manual_seed(0)
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    for chunk in chunks:
        log_p = torch.log_softmax(model(chunk[None], use_cache=False).logits[0].float(), -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(wanted.values()))
        for name, gradient in zip(wanted, gradients, strict=True):
            sums[name] += gradient.double().square().sum(1)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, of_rows in sums.items():
        order = row_order(checkpoint.architecture, checkpoint.config, name)
        in_gguf = of_rows if order is None else of_rows[torch.from_numpy(order.copy())]
        found[names[name]] = in_gguf / inputs[name]
    return found


def test_of_the_decoder_blocks_one_is_in_memory(models: Callable[[str], tuple[Path, torch.nn.Module]]) -> None:
    checkpoint = load(models("llama-biased")[0] / "base.gguf")
    model = streamed(checkpoint, CPU)
    blocks, seen = list(model.model.layers), list[tuple[int, ...]]()

    def look(module: torch.nn.Module, args: object) -> None:
        seen.append(tuple(i for i, b in enumerate(blocks) if any(not p.is_meta for p in b.parameters())))

    for block in blocks:
        block.mlp.down_proj.register_forward_pre_hook(look)
    embedded = model.get_input_embeddings()(CHUNKS[:2]).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    there = [(i,) for i in range(len(blocks))]
    assert seen == [*there, *reversed(there)]


def test_nothing_of_the_model_stays_in_memory(
    models: Callable[[str], tuple[Path, torch.nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.nn.Module]] = []

    def watched(*args: Any) -> Any:
        model = streamed(*args)
        made.append(weakref.ref(model.model.layers[0]))
        return model

    monkeypatch.setattr(sensitivity, "streamed", watched)
    gc.disable()
    try:
        sensitivity.collect(load(models("qwen2")[0] / "base.gguf"), CHUNKS[:1], CPU)
        left = [ref() is not None for ref in made]
    finally:
        gc.enable()
    assert left == [False]


def test_chunks_are_those_of_llama_cpp(models: Callable[[str], tuple[Path, torch.nn.Module]]) -> None:
    from llama_cpp_side import llama_tokens

    folder, _ = models("gemma3")
    chunks = sensitivity.cut(load(folder / "base.gguf"), tiny_models.PROSE, 32, 3)
    text = tiny_models.PROSE.read_text(encoding="utf-8")
    theirs = np.array(llama_tokens(folder / "base.gguf", [text], folder, add_special=False)[0][:96]).reshape(3, 32)
    assert np.array_equal(chunks[:, 1:], theirs[:, 1:])
    assert chunks[:, 0].tolist() == [2, 2, 2]
    with pytest.raises(SlimpiError, match=r"has \d+ chunks of 32 tokens, 99999 asked"):
        sensitivity.cut(load(folder / "base.gguf"), tiny_models.PROSE, 32, 99999)


@pytest.fixture(scope="module")
def costed(models: Callable[[str], tuple[Path, torch.nn.Module]]) -> tuple[Base, Plan, dict[str, dict[str, float]]]:
    """A base, a plan whose embeddings stay, and what each block matrix costs in each format."""
    folder, _ = models("qwen2")
    checkpoint = load(folder / "base.gguf")
    hessians.collect_stats(folder / "base.gguf", tiny_models.PROSE, folder / "stats", n_ctx=64, n_chunks=4)
    shop = Workshop(folder / "stages", "tiny", "weights", "stats", CPU, say=lambda message: None)
    base = plan.read_base(folder / "base.gguf")
    felt = sensitivity.collect(checkpoint, CHUNKS[:4], CPU)
    stats = hessians.load_stats(folder / "stats")
    costs = predicted_costs.predicted_divergence(checkpoint, base, stats, felt, CANDIDATES, shop, quiet)
    nothing = sensitivity.Sensitivity({}, {})
    again = predicted_costs.predicted_divergence(checkpoint, base, {}, nothing, CANDIDATES, shop, quiet)
    assert costs == again, "each block is kept"
    outer = predicted_costs.outer_costs(checkpoint, base, felt, CANDIDATES, shop)
    assert outer.keys() == set(base.matrices) - set(base.linear)
    for row in outer.values():
        assert 0 < row["Q8_0"] < row["Q5_1"] < row["Q4_1"]
    return base, plan.uniform(base, "Q4_0", embeddings="Q4_0", output="Q8_0"), costs


def test_more_bits_cost_less(costed: tuple[Base, Plan, dict[str, dict[str, float]]]) -> None:
    base, _, costs = costed
    assert costs.keys() == set(base.linear)
    for row in costs.values():
        assert row.keys() == {"IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
        assert row["Q8_0"] < row["Q5_1"] < min(row["Q4_1"], row["IQ4_NL"])
        assert 0 < row["Q8_0"] < row["IQ4_NL"] / 50


@pytest.mark.parametrize("bits", [4.5, 4.75, 5.1, 8.5, 20])
def test_the_budget_of_bits_is_kept_and_used(
    bits: float, costed: tuple[Base, Plan, dict[str, dict[str, float]]]
) -> None:
    base, fixed, costs = costed
    found = best_plan(base, fixed, costs, Budget(linear_bits=bits))[0]
    got = plan.linear_bits_per_weight(base, found)
    assert got <= bits + 1e-9
    assert got > min(bits, 8.5) - 0.1
    assert found.formats["token_embd.weight"] == fixed.formats["token_embd.weight"]
    assert {f.tensor for f in found.fallbacks} <= {"token_embd.weight", "output.weight"}
    lost = sum(costs[name][found.formats[name]] for name in costs)
    uniform = [sum(row[kind] for row in costs.values()) for kind in ("IQ4_NL", "Q5_0") if plan_bits(kind) <= bits]
    assert lost <= min(uniform)


def plan_bits(kind: str) -> float:
    return {"IQ4_NL": 4.5, "Q5_0": 5.5}[kind]


def test_the_budget_of_bytes_is_the_file(costed: tuple[Base, Plan, dict[str, dict[str, float]]]) -> None:
    base, fixed, costs = costed
    limit = plan.file_bytes(base, fixed) + 9_000
    found = best_plan(base, fixed, costs, Budget(file_bytes=limit))[0]
    assert limit - 2_000 < plan.file_bytes(base, found) <= limit


def test_a_recipe_names_budgets(tmp_path: Path) -> None:
    tiny_models.save_tiny("qwen2", tmp_path / "hf", torch.bfloat16)
    recipe = Recipe(
        name="tiny",
        source=f"path:{tmp_path / 'hf'}",
        export="gguf",
        variants=["BF16", "SEARCH-5bpw", "RTN-0.2MiB"],
        calibration=Calibration(n_ctx=64, n_chunks=8),
        golden=Golden(n=4, n_tokens=16),
    )
    _, bits, size = [load_artifact(f) for f in build(recipe, Places(tmp_path / "home"), Progressor(plain=True))]
    assert 4.9 < bits.bits_per_linear_weight <= 5
    assert len({kind for name, kind in bits.plan.items() if name.startswith("blk.")}) > 2
    assert [step.action for step in bits.lineage] == ["convert", "calibrate", "sensitivity", "quantize"]
    assert bits.lineage[-1].settings["plan"] == "5bpw"
    assert 0.19 * 2**20 < size.size_bytes <= 0.2 * 2**20
