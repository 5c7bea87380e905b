"""Checkpoints: what is loaded is what is in the files, what is saved loads in transformers, damage is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from device.records import SlimpiError
from pipeline import checkpoint as checkpoint_module
from pipeline.checkpoint import Checkpoint, load, save
from pipeline.export.gguf import EncodedTensor, export_gguf, read_gguf_types
from pipeline.safetensors_file import read_safetensors
from tests.real_models import real_gguf
from tests.tiny_models import TINY, save_tiny

EVERY_TYPE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved tiny model a family; tests that break one work on a copy."""
    made = {}
    for name in ("llama", "llama-tied", "qwen2", "gemma2", "gemma3"):
        made[name] = tmp_path_factory.mktemp(name)
        save_tiny(name, made[name], torch.bfloat16 if name == "qwen2" else torch.float32)
    return made


@pytest.fixture
def llama(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["llama"], tmp_path / "llama"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) drop tensors of a one-file checkpoint."""
    tensors = {**load_file(folder / "model.safetensors"), **{k: v for k, v in change.items() if v is not None}}
    save_file({k: v for k, v in tensors.items() if change.get(k, v) is not None}, folder / "model.safetensors")


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    return list(one.tensors) == list(other.tensors) and all(
        torch.equal(one.tensors[name].read(), other.tensors[name].read()) for name in one.tensors
    )


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma2", "gemma3"])
def test_load_equals_the_safetensors_package(name: str, folders: dict[str, Path]) -> None:
    checkpoint = load(folders[name])
    expected = load_file(folders[name] / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    assert ("lm_head.weight" in expected) == (name in ("llama", "qwen2"))
    for key, tensor in checkpoint.tensors.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor.read(), expected[key])
        assert torch.equal(torch.cat(list(tensor.chunks())), expected[key])
    rows = checkpoint.tensors["model.embed_tokens.weight"].read_rows(5, 9)
    assert torch.equal(rows, expected["model.embed_tokens.weight"][5:9])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_save_loads_in_transformers(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 100_000)
    original = load(folders[name])
    save(original, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto", local_files_only=True)
    reference = AutoModelForCausalLM.from_pretrained(folders[name], dtype="auto", local_files_only=True)
    assert model.dtype == (torch.bfloat16 if name == "qwen2" else torch.float32)
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)
    again = load(tmp_path / "saved")
    assert same_tensors(original, again)
    assert again.vocab == original.vocab
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    text = "The garden at 7 o'clock,  twice."
    assert tokenizer(text)["input_ids"] == original.vocab.to_tokenizers().encode(text).ids
    with pytest.raises(SlimpiError, match="already exists"):
        save(original, tmp_path / "saved")


def test_a_tokenizer_changed_after_saving_is_not_silently_ignored(folders: dict[str, Path], tmp_path: Path) -> None:
    save(load(folders["llama"]), tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text((folders["qwen2"] / "tokenizer.json").read_text())
    with pytest.raises(SlimpiError, match=r"delete vocabulary\.gguf"):
        load(tmp_path / "saved")
    (tmp_path / "saved" / "vocabulary.gguf").unlink()
    assert load(tmp_path / "saved").vocab.get("pre") == "qwen2"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma2", "gemma3"])
def test_gguf_round_trip(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Folder -> GGUF -> checkpoint gives the same config, vocabulary and, up to float32's last bit in Gemma's
    norms, the same tensors; checkpoint -> GGUF again gives the same file, byte for byte."""
    original = load(folders[name])
    export_gguf(original, tmp_path / "m.gguf", "F32")
    again = load(tmp_path / "m.gguf")
    assert again.vocab == original.vocab
    assert again.architecture == original.architecture
    for key, value in again.config.items():
        assert original.config[key] == value, key
    for key, tensor in original.tensors.items():
        torch.testing.assert_close(again.tensors[key].read(), tensor.read().float(), rtol=0, atol=1e-7)
    if not name.startswith("gemma"):
        assert all(torch.equal(again.tensors[k].read(), t.read().float()) for k, t in original.tensors.items())
    again = dataclasses.replace(again, origin=original.origin)
    export_gguf(again, tmp_path / "again.gguf", "F32")
    if not name.startswith("gemma"):
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_quantized_gguf_dequantizes_as_the_gguf_package_does(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """GGUF -> checkpoint -> F32 GGUF equals gguf's own dequantization of the first file, tensor by tensor."""
    ggml_type = gguf.GGMLQuantizationType[kind]

    def encode(name: str, tensor: checkpoint_module.Tensor) -> EncodedTensor | None:
        if len(tensor.shape) == 1:
            return None
        blocks = gguf.quants.quantize(tensor.read().float().numpy(), ggml_type)
        return EncodedTensor(ggml_type, lambda: blocks.view(np.uint8))

    export_gguf(load(folders["llama"]), tmp_path / "q.gguf", "F32", encode)
    quantized = load(tmp_path / "q.gguf")
    assert quantized.notes == ([] if kind in ("BF16", "F16", "F32") else [f"dequantized from {kind}"])
    export_gguf(quantized, tmp_path / "f.gguf", "F32")
    flat = {t.name: t for t in gguf.GGUFReader(tmp_path / "f.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(flat[tensor.name].data, expected), tensor.name
    rows = quantized.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(rows.read_rows(3, 41), rows.read()[3:41])


def test_transformers_5_rope_parameters(folders: dict[str, Path], tmp_path: Path) -> None:
    """The newer spelling of the same settings; unread, transformers 4 would silently take theta 10,000."""
    folder = Path(shutil.copytree(folders["gemma3"], tmp_path / "g"))
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("rope_theta"), raw.pop("rope_local_base_freq"), raw.pop("rope_scaling", None)
    raw["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    config = load(folder).config
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (500000.0, 20000.0)
    assert config["rope_scaling"]["factor"] == 8.0


def test_multimodal_gemma3_is_read_as_its_text_part(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["gemma3"], tmp_path / "g"))
    tensors = {f"language_model.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.patch.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    checkpoint = load(folder)
    assert checkpoint.architecture == "gemma3_text"
    assert same_tensors(checkpoint, load(folders["gemma3"]))
    assert checkpoint.notes == ["1 tensors left out: *vision_tower.*"]


def test_ignored_tensors_are_noted(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama-tied"], tmp_path / "t"))
    extra = {"lm_head.weight": torch.ones(512, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite_tensors(folder, extra)
    checkpoint = load(folder)
    assert same_tensors(checkpoint, load(folders["llama-tied"]))
    assert checkpoint.notes == [
        "1 tensors left out: *rotary_emb.*",
        "lm_head.weight left out: config.json ties it to the embeddings",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lacks the tensor model.norm.weight"),
        ({"lm_head.weight": None}, "lacks the tensor lm_head.weight"),
        ({"model.layers.0.adapter": torch.ones(2)}, r"1 tensors that its architecture does not know: model\.layers"),
        ({"model.layers.4.mlp.up_proj.weight": torch.ones(2)}, "does not know"),
        ({"model.norm.weight": torch.ones(65)}, r"is \[65\], its config says \[64\]"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "must be float32"),
    ],
)
def test_tensors_must_be_exactly_those_of_the_config(
    change: dict[str, torch.Tensor | None], message: str, llama: Path
) -> None:
    rewrite_tensors(llama, change)
    with pytest.raises(SlimpiError, match=message):
        load(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported. Supported: llama, qwen2"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized"),
        ({"num_hidden_layers": 5}, "lacks the tensor model.layers.4"),
        ({"num_hidden_layers": "many"}, "no usable num_hidden_layers: 'many'"),
        ({"num_hidden_layers": 1000}, "more than llama.cpp's 512"),
        ({"num_attention_heads": 0, "head_dim": None}, "not valid"),
        ({"rope_theta": None}, "rope_theta"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_bad_configs(change: dict[str, object], message: str, llama: Path) -> None:
    edit_config(llama, **change)
    with pytest.raises(SlimpiError, match=message):
        load(llama)


def test_missing_and_damaged_files(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match="neither a folder nor a file"):
        load(tmp_path / "none")
    weights = (llama / "model.safetensors").read_bytes()
    for length in (0, 7, 100, 3000, len(weights) // 2, len(weights) - 1):
        (llama / "model.safetensors").write_bytes(weights[:length])
        with pytest.raises(SlimpiError, match="damaged safetensors"):
            load(llama)
    (llama / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(SlimpiError, match="damaged"):
        load(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(SlimpiError, match=r"no \.safetensors"):
        load(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(SlimpiError, match="not valid JSON"):
        load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(SlimpiError, match=r"config\.json"):
        load(llama)


def test_missing_shard(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, shard="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert len(load(tmp_path).tensors) == 39
    shards[1].unlink()
    with pytest.raises(SlimpiError, match=f"lacks the shard {shards[1].name}"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(SlimpiError, match="lacks the shard"):
        load(tmp_path)


def test_damaged_gguf_never_gives_anything_but_our_error(folders: dict[str, Path], tmp_path: Path) -> None:
    """Cut at every kind of place, and with bytes of its header flipped at random."""
    export_gguf(load(folders["llama"]), tmp_path / "m.gguf", "F16")
    whole = (tmp_path / "m.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    random = np.random.default_rng(0)
    for length in [0, 3, 4, 8, 20, 23, 24, 40, *random.integers(25, len(whole) - 32, 60)]:
        broken.write_bytes(whole[:length])
        with pytest.raises(SlimpiError):
            read_gguf_types(broken)
        with pytest.raises(SlimpiError):
            load(broken)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for at in random.integers(4, 30_000, 3):
            damaged[at] ^= int(random.integers(1, 256))
        broken.write_bytes(damaged)
        try:
            load(broken)
        except SlimpiError:
            refused += 1
    assert refused > 20


def test_unsupported_and_split_gguf(tmp_path: Path) -> None:
    for name, keys, message in [
        ("mamba", {}, "'mamba' is not supported. Supported: llama, qwen2, gemma2, gemma3"),
        ("llama", {}, "lacks the tensor token_embd.weight"),
        ("llama", {"split.count": 3}, "Merge the parts"),
    ]:
        writer = gguf.GGUFWriter(None, name)
        for key, value in keys.items():
            writer.add_uint16(key, value)
        writer.write_header_to_file(path=tmp_path / "m.gguf")
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(SlimpiError, match=message):
            load(tmp_path / "m.gguf")


def test_disk_space_is_asked_before_saving(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1_000_000))
    with pytest.raises(SlimpiError, match="are free"):
        save(load(folders["llama"]), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_written_are_read_by_the_package(folders: dict[str, Path], tmp_path: Path) -> None:
    save(load(folders["qwen2"]), tmp_path / "saved")
    theirs = load_file(tmp_path / "saved" / "model.safetensors")
    ours = read_safetensors(tmp_path / "saved" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name].read_rows(0, ours[name].shape[0])) for name in ours)
    assert TINY["qwen2"]["vocab_size"] == len(theirs["lm_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_gguf_round_trip(name: str, tmp_path: Path) -> None:
    """Every tensor of a real file, K-quants included, as the gguf package dequantizes it."""
    path = real_gguf(name, tmp_path)
    export_gguf(load(path), tmp_path / "f.gguf", "F32")
    flat = {t.name: t for t in gguf.GGUFReader(tmp_path / "f.gguf").tensors}
    original = gguf.GGUFReader(path)
    assert {t.name for t in original.tensors} == set(flat)
    for tensor in original.tensors:
        assert np.array_equal(flat[tensor.name].data, gguf.quants.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.slow
def test_real_gguf_saves_as_a_folder_transformers_loads(tmp_path: Path) -> None:
    checkpoint = load(real_gguf("smollm2", tmp_path))
    save(checkpoint, tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        best = model(**ids).logits[0, -1].argmax().item()
    assert tokenizer.decode(best) == " Paris"
    assert load(tmp_path / "saved").vocab.sha256() == checkpoint.vocab.sha256()
