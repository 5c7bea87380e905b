"""Uneven models: what unmodified llama.cpp computes from their files is what transformers' modules compute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp_side import llama_logits
from test_convert import TOKENS, agreement, hf_logits

from device.records import SlimpiError
from pipeline import fit, hessians, plan, predicted_costs, sensitivity
from pipeline.architectures import tensor_shapes
from pipeline.checkpoint import Checkpoint, held, load, save
from pipeline.export.gguf import export_gguf, gguf_tensors
from pipeline.export.llama_quantize import quantize_gguf
from pipeline.export.onnx_language import export_language
from pipeline.gguf_file import read_gguf
from pipeline.gguf_keys import check_config, config_from_keys, gguf_keys
from pipeline.progress import quiet
from pipeline.quantize import Workshop, encoder, quantize_model
from pipeline.torch_model import in_transformers
from pipeline.uneven import STAND_IN_WIDTH, as_even, as_uneven, runnable
from tests.tiny_models import LLAMA3_SCALING, PROSE, save_tiny

Make = Callable[[str], Checkpoint]

HEADS, KV_HEADS, WIDTHS = "num_attention_heads", "num_key_value_heads", "intermediate_size"
BENT = {**LLAMA3_SCALING, "original_max_position_embeddings": 128}
BIASED = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "equal": {},
    "widths": {HEADS: [4, 2, 1, 6], KV_HEADS: [2, 1, 1, 3], WIDTHS: [160, 96, 32, 224]},
    "no attention": {HEADS: [4, 0, 0, 2], KV_HEADS: [2, 0, 0, 1]},
    "no attention first and last": {HEADS: [0, 4, 2, 0], KV_HEADS: [0, 2, 1, 0], WIDTHS: [96, 64, 160, 32]},
    "no ffn": {WIDTHS: [160, 0, 96, 160]},
    "no ffn first and last": {WIDTHS: [0, 160, 64, 0]},
    "linear": {HEADS: [4, 4, 1, 2], KV_HEADS: [2, 0, 0, 1], WIDTHS: [160, 96, 160, 64]},
    "linear first and last": {KV_HEADS: [0, 2, 1, 0]},
    "llama3 scaling": {"rope_scaling": BENT, HEADS: [0, 4, 2, 4], KV_HEADS: [0, 2, 2, 1]},
    "linear scaling": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        HEADS: [2, 4, 2, 0],
        KV_HEADS: [2, 2, 2, 0],
    },
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        HEADS: [4, 1, 4, 2],
        KV_HEADS: [2, 1, 0, 1],
    },
    "tied": {"tie_word_embeddings": True, WIDTHS: [160, 96, 32, 224]},
    "biased": {**BIASED, KV_HEADS: [2, 1, 4, 2], WIDTHS: [160, 96, 0, 224]},
    "biased, no attention": {**BIASED, HEADS: [0, 4, 4, 0], KV_HEADS: [0, 2, 0, 0]},
    "one ffn": {HEADS: [0] * 4, KV_HEADS: [0] * 4, WIDTHS: [0, 0, 160, 0]},
    "one attention": {HEADS: [0, 4, 0, 0], KV_HEADS: [0, 2, 0, 0], WIDTHS: [0] * 4},
    "wide": {
        "hidden_size": 256,
        HEADS: [4, 2, 4, 0],
        KV_HEADS: [4, 2, 0, 0],
        WIDTHS: [512, 256, 0, 768],
        "head_dim": 64,
    },
}
"""What is changed in the config of the tiny llama, whose layers have 4 heads, 2 key heads and 160 wide FFNs."""


def filled(config: dict[str, Any], like: Checkpoint, seed: int) -> Checkpoint:
    """A random model of the config, its next-token distributions as peaked as those of tiny_models."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes("deci", config).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = values * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0)
        else:
            values *= 0.35 if "embed_tokens" in name else 1.2 * shape[1] ** -0.5
        tensors[name] = held(name, values)
    return dataclasses.replace(like, architecture="deci", config=config, tensors=tensors)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    return load(folder)


@pytest.fixture(scope="module")
def make(llama: Checkpoint) -> Make:
    def make(name: str) -> Checkpoint:
        return filled({**as_uneven(llama).config, **MODELS[name]}, llama, len(name))

    return make


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_torch_does(name: str, make: Make, tmp_path: Path) -> None:
    model = make(name)
    export_gguf(runnable(model), tmp_path / "m.gguf", "F32")
    top1, kl = agreement(hf_logits(in_transformers(model), TOKENS), llama_logits(tmp_path / "m.gguf", TOKENS, tmp_path))
    assert top1 >= 0.995
    assert kl < 1e-6


def test_of_equal_layers_it_is_the_llama_itself(llama: Checkpoint, tmp_path: Path) -> None:
    """Renamed and back; transformers' llama and the uneven model give the same logits to the bit."""
    uneven = as_uneven(llama)
    assert uneven.tensors == llama.tensors
    assert uneven.config[HEADS] == [4, 4, 4, 4]
    assert np.array_equal(hf_logits(in_transformers(uneven), TOKENS), hf_logits(in_transformers(llama), TOKENS))
    again = as_even(uneven)
    assert again.architecture == "llama"
    assert {key: again.config[key] for key in llama.config} == llama.config
    assert as_even(llama) is llama
    export_gguf(uneven, tmp_path / "m.gguf", "F32")
    assert as_even(load(tmp_path / "m.gguf")).architecture == "llama"


@pytest.mark.parametrize("name", ["widths", "no attention", "linear", "biased", "wide"])
def test_what_is_uneven_stays_so(name: str, make: Make) -> None:
    model = make(name)
    assert as_even(model) is model
    assert as_uneven(model) is model


@pytest.mark.parametrize("name", ["widths", "no ffn", "linear", "tied", "biased", "one ffn"])
def test_round_trips(name: str, make: Make, tmp_path: Path) -> None:
    """GGUF -> checkpoint -> GGUF is the same file; folder -> checkpoint has the same config and tensors."""
    model = runnable(make(name))
    export_gguf(model, tmp_path / "m.gguf", "F32")
    from_gguf = load(tmp_path / "m.gguf")
    export_gguf(dataclasses.replace(from_gguf, origin=model.origin), tmp_path / "again.gguf", "F32")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    save(model, tmp_path / "hf")
    from_folder = load(tmp_path / "hf")
    for again in (from_gguf, from_folder):
        assert (again.architecture, again.vocab) == ("deci", model.vocab)
        assert list(again.tensors) == list(model.tensors)
        assert all(torch.equal(again.tensors[name].read(), t.read()) for name, t in model.tensors.items())
        shared = model.config.keys() & again.config.keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "dtype"}
        assert {key: again.config[key] for key in shared} == {key: model.config[key] for key in shared}
    export_gguf(dataclasses.replace(from_folder, origin=model.origin), tmp_path / "again.gguf", "F32")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_qwen2_fits(tmp_path: Path) -> None:
    """Its biases are read by llama.cpp's deci, whatever the number of heads; only the order of rows is another."""
    save_tiny("qwen2", tmp_path / "hf")
    original = load(tmp_path / "hf")
    uneven = as_uneven(original)
    assert uneven.tensors == original.tensors
    expected = hf_logits(in_transformers(original), TOKENS)
    assert np.array_equal(hf_logits(in_transformers(uneven), TOKENS), expected)
    export_gguf(uneven, tmp_path / "m.gguf", "F32")
    top1, kl = agreement(expected, llama_logits(tmp_path / "m.gguf", TOKENS, tmp_path))
    assert top1 >= 0.995
    assert kl < 1e-6
    again = as_even(load(tmp_path / "m.gguf"))
    assert again.architecture == "qwen2"
    check_config("qwen2", again.config)
    pruned = filled({**uneven.config, HEADS: [4, 1, 2, 0], KV_HEADS: [2, 1, 1, 0]}, original, 1)
    export_gguf(pruned, tmp_path / "m.gguf", "F32")
    top1, kl = agreement(
        hf_logits(in_transformers(pruned), TOKENS), llama_logits(tmp_path / "m.gguf", TOKENS, tmp_path)
    )
    assert top1 >= 0.995
    assert kl < 1e-6


@pytest.mark.parametrize("name", ["no ffn", "no attention first and last"])
def test_what_is_mended_llama_cpp_does_not_run(
    name: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as they are the files load and give other logits, or none."""
    model = make(name)
    monkeypatch.setattr("pipeline.export.gguf.check_config", lambda *args: None)
    export_gguf(model, tmp_path / "m.gguf", "F32")
    try:
        found = llama_logits(tmp_path / "m.gguf", TOKENS, tmp_path)
    except AssertionError:
        return
    assert agreement(hf_logits(in_transformers(model), TOKENS), found)[1] > 0.01


def test_what_runnable_changes(make: Make) -> None:
    model = make("widths")
    assert runnable(model).tensors.keys() == model.tensors.keys()
    assert all(torch.equal(runnable(model).tensors[name].read(), t.read()) for name, t in model.tensors.items())
    model = make("one ffn")
    mended = runnable(model)
    assert [mended.config[key] for key in ("num_hidden_layers", HEADS, KV_HEADS, WIDTHS)] == [1, [1], [1], [160]]
    moved, old = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(mended.tensors[moved].read(), model.tensors[old].read())
    assert not mended.tensors["model.layers.0.self_attn.o_proj.weight"].read().any()
    mended = runnable(make("no ffn"))
    assert mended.config[WIDTHS] == [160, STAND_IN_WIDTH, 96, 160]
    assert not mended.tensors["model.layers.1.mlp.down_proj.weight"].read().any()
    nothing = {HEADS: [0] * 4, KV_HEADS: [0] * 4, WIDTHS: [0] * 4}
    with pytest.raises(SlimpiError, match=r"no layer .* Prune fewer parts"):
        runnable(dataclasses.replace(model, config={**model.config, **nothing}))


@pytest.mark.parametrize("variant", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["linear", "no ffn", "biased, no attention"])
def test_llama_quantize_makes_files_that_run(variant: str, name: str, make: Make, tmp_path: Path) -> None:
    model = runnable(make(name))
    export_gguf(model, tmp_path / "base.gguf", "F32")
    quantize_gguf(tmp_path / "base.gguf", tmp_path / "q.gguf", variant, None, 1, None)
    expected = llama_logits(tmp_path / "base.gguf", TOKENS, tmp_path)
    kl = agreement(expected, llama_logits(tmp_path / "q.gguf", TOKENS, tmp_path))[1]
    assert kl < (0.01 if variant == "Q8_0" else 0.6)


@pytest.fixture(scope="module")
def calibrated(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with every kind of layer: base.gguf and stats."""
    folder = tmp_path_factory.mktemp("calibrated")
    parts = {HEADS: [4, 0, 4, 2], KV_HEADS: [2, 0, 0, 1], WIDTHS: [0, 160, 96, 224]}
    model = make("equal")
    model = runnable(filled({**model.config, **parts}, model, 3))
    export_gguf(model, folder / "base.gguf", "F32")
    hessians.collect_stats(folder / "base.gguf", PROSE, folder / "stats", n_ctx=128, n_chunks=4)
    return folder


@pytest.mark.parametrize("method", ["gptq", "search", "awq", "omniquant"])
def test_methods_quantize_every_kind_of_layer(method: str, calibrated: Path, tmp_path: Path) -> None:
    base = calibrated / "base.gguf"
    wanted = plan.uniform(plan.read_base(base), "Q4_0", embeddings="Q8_0", output="Q8_0")
    model, shop = load(base), Workshop(tmp_path / "stages", "tiny", "weights", "stats", torch.device("cpu"), str)
    parts = quantize_model(model, method, wanted, hessians.load_stats(calibrated / "stats"), shop, quiet)
    assert export_gguf(model, tmp_path / "q.gguf", "auto", encoder(parts, wanted)) == wanted.formats
    expected = llama_logits(base, TOKENS, tmp_path)
    assert agreement(expected, llama_logits(tmp_path / "q.gguf", TOKENS, tmp_path))[1] < 0.2


def test_a_budget_spends_nothing_on_zeros(calibrated: Path, tmp_path: Path) -> None:
    """The stand-in of a missing FFN feels no error, and its types cost nothing; all the others do."""
    model, base = load(calibrated / "base.gguf"), plan.read_base(calibrated / "base.gguf")
    felt = sensitivity.collect(model, torch.from_numpy(TOKENS[:256].astype(np.int64))[None], torch.device("cpu"))
    assert felt.rows.keys() == set(base.linear)
    assert all(torch.isfinite(rows).all() for rows in felt.rows.values())
    shop = Workshop(tmp_path, "tiny", "weights", "stats", torch.device("cpu"), str)
    stats, types = hessians.load_stats(calibrated / "stats"), ["Q4_0", "Q8_0"]
    costs = predicted_costs.predicted_divergence(model, base, stats, felt, types, shop, quiet)
    zeros = {f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down")}
    assert {name for name, row in costs.items() if set(row.values()) == {0.0}} == zeros
    assert all(row["Q4_0"] > row["Q8_0"] > 0 for name, row in costs.items() if name not in zeros)
    gains = predicted_costs.gains(model, base, stats, "gptq", types, shop)
    assert all(0.1 < gain <= 1.01 for gain in gains.values())


def test_the_cache_is_that_of_each_layer(make: Make, tmp_path: Path) -> None:
    export_gguf(runnable(make("linear")), tmp_path / "m.gguf", "F32")
    n_kv_heads, head_size = 2 + 0 + 0 + 1, 16
    assert fit.cache_bytes(read_gguf(tmp_path / "m.gguf").keys, 1024) == 1024 * n_kv_heads * 2 * head_size * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({WIDTHS: [160, 96, 160]}, r"intermediate_size of deci is 3 entries, not a list of 4.* Give one a layer"),
        ({WIDTHS: 160}, r"intermediate_size of deci is 160, not a list of 4 numbers"),
        ({WIDTHS: [160, -1, 160, 160]}, r"intermediate_size of deci has the entry -1. Give whole numbers from 0 on"),
        ({HEADS: [4, 4.0, 4, 4]}, r"num_attention_heads of deci has the entry 4\.0"),
        ({HEADS: [4, True, 4, 4]}, r"has the entry True"),
        ({HEADS: [4, 3, 4, 4]}, r"layer 1: 3 attention heads are no multiple of 2 key heads"),
        ({HEADS: [4, 0, 4, 4]}, r"layer 1: 0 attention heads are no multiple of 2 key heads"),
        ({WIDTHS: [160, 0, 160, 160]}, r"layer 1 lacks an FFN.*Mend it with pipeline\.uneven\.runnable"),
        ({HEADS: [0, 4, 4, 4], KV_HEADS: [0, 2, 2, 2]}, r"the first layer lacks attention.*Mend it"),
        ({HEADS: [4, 4, 4, 0], KV_HEADS: [2, 2, 2, 0], WIDTHS: [160, 160, 160, 0]}, r"layer 3 has neither"),
        ({"head_dim": 0}, r"no usable head_dim: 0"),
    ],
)
def test_lists_that_are_none_are_told(changes: dict[str, Any], message: str, make: Make, tmp_path: Path) -> None:
    model = make("equal")
    save(model, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(SlimpiError, match=message) as told:
        load(tmp_path / "hf")
    assert "\n" not in str(told.value)
    with pytest.raises(SlimpiError, match=message):
        export_gguf(dataclasses.replace(model, config={**model.config, **changes}), tmp_path / "m.gguf", "F32")


def test_a_folder_without_the_size_of_a_head_is_refused(make: Make, tmp_path: Path) -> None:
    save(make("equal"), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": None}))
    with pytest.raises(SlimpiError, match=r"lacks head_dim\. Give the size of a head"):
        load(tmp_path / "hf")


@pytest.mark.parametrize(("name", "why"), [("gemma2", "soft-capped scores"), ("gemma3", "norms of queries")])
def test_gemma_does_not_fit(name: str, why: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "hf")
    with pytest.raises(SlimpiError, match=f"{why}.*sliding windows. Prune whole layers"):
        as_uneven(load(tmp_path / "hf"))


def test_onnx_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=r"layers that differ.*Export to gguf"):
        export_language(make("widths"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deci.attention.head_count": [4, 4]}, "is 2 entries, not a list of 4"),
        ({"deci.attention.head_count": ["4"] * 4}, r"head_count is \['4'.*not supported"),
        ({"deci.feed_forward_length": [160, 0, 160, 160]}, "layer 1 lacks an FFN"),
        ({"deci.attention.head_count_kv": 0.5}, "head_count_kv is .*not supported"),
        ({"deci.block_count": 3}, "is 4 entries, not a list of 3"),
    ],
)
def test_gguf_keys_that_are_no_lists_are_told(
    changes: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    model = make("equal")
    keys = {"general.architecture": "deci", **gguf_keys("deci", model.config), **changes}
    with pytest.raises(SlimpiError, match=message):
        check_config("deci", config_from_keys(keys, gguf_tensors(model), 512, None))


def test_a_single_number_is_every_layers(make: Make) -> None:
    model = make("equal")
    keys = {"general.architecture": "deci", **gguf_keys("deci", model.config), "deci.feed_forward_length": 160}
    assert config_from_keys(keys, gguf_tensors(model), 512, None)[WIDTHS] == [160] * 4
