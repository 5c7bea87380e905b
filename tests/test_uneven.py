"""Uneven models: what unmodified llama.cpp computes from their files is what transformers' modules compute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llama_cpp_side import llama_logits
from test_convert import TOKENS, agreement, hf_logits

from device.schema import SlimpiError
from pipeline import fit, hessians, plan
from pipeline.architectures import tensor_shapes
from pipeline.checkpoint import Checkpoint, held, load, save
from pipeline.export.gguf import export_gguf, gguf_tensors
from pipeline.export.llama_quantize import quantize_gguf
from pipeline.export.onnx_language import export_language
from pipeline.gguf_file import read_gguf
from pipeline.gguf_keys import check_config
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
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, HEADS: [2, 4, 2, 0], KV_HEADS: [2, 2, 2, 0]},
    "tied": {"tie_word_embeddings": True, WIDTHS: [160, 96, 32, 224]},
    "biased": {**BIASED, KV_HEADS: [2, 1, 4, 2], WIDTHS: [160, 96, 0, 224]},
    "biased, no attention": {**BIASED, HEADS: [0, 4, 4, 0], KV_HEADS: [0, 2, 0, 0]},
    "one ffn": {HEADS: [0] * 4, KV_HEADS: [0] * 4, WIDTHS: [0, 0, 160, 0]},
    "one attention": {HEADS: [0, 4, 0, 0], KV_HEADS: [0, 2, 0, 0], WIDTHS: [0] * 4},
    "wide": {"hidden_size": 256, HEADS: [4, 2, 4, 0], KV_HEADS: [4, 2, 0, 0], WIDTHS: [512, 256, 0, 768], "head_dim": 64},
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


@pytest.mark.parametrize("name", ["widths", "no ffn", "linear", "llama3 scaling", "tied", "biased", "one ffn"])
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
        if name != "llama3 scaling":  # a GGUF keeps only the factors
            assert {key: again.config[key] for key in shared} == {key: model.config[key] for key in shared}
    export_gguf(dataclasses.replace(from_folder, origin=model.origin), tmp_path / "again.gguf", "F32")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
