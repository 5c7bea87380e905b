"""Hugging Face -> GGUF: llama.cpp computes from the file what transformers computes from the folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType

from benchmarks import stream_8b
from device.records import SlimpiError
from pipeline.checkpoint import Checkpoint, Tensor, held, load
from pipeline.export.gguf import EncodedTensor, export_gguf, gguf_tensors, read_gguf_types
from pipeline.formats import FORMATS, bits_per_weight
from tests.llama_cpp_side import llama_logits
from tests.real_models import real_gguf
from tests.tiny_models import TINY, save_tiny

N_TOKENS = 512
TOKENS = np.random.default_rng(0).integers(4, 400, N_TOKENS)


def hf_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float().numpy()


def agreement(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """(share of positions with the same top token, mean KL(reference || other) in nats), in float64."""
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, other))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return float((reference.argmax(-1) == other.argmax(-1)).mean()), kl


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, np.ndarray]]:
    """A tiny model as a checkpoint, and transformers' logits for TOKENS; each is made once."""
    made: dict[str, tuple[Checkpoint, np.ndarray]] = {}

    def make(name: str) -> tuple[Checkpoint, np.ndarray]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = save_tiny(name, folder)
            made[name] = (load(folder), hf_logits(model, TOKENS))
        return made[name]

    return make


def llama_cpp(checkpoint: Checkpoint, folder: Path, dtype: Any = "F32") -> np.ndarray:
    export_gguf(checkpoint, folder / "m.gguf", dtype)
    return llama_logits(folder / "m.gguf", TOKENS, folder)


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name: str, tiny: Callable, tmp_path: Path) -> None:
    checkpoint, expected = tiny(name)
    top1, kl = agreement(expected, llama_cpp(checkpoint, tmp_path))
    assert top1 >= 0.995
    assert kl < 1e-6


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_scaling": None}),
        ("llama", {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4}),
        ("llama-early-bend", {"rope_scaling": None}),
        ("llama-linear", {"rope_scaling": None}),
        ("qwen2", {"rope_theta": 10000.0}),
        ("qwen2-yarn", {"rope_scaling": None}),
        ("gemma2", {"sliding_window": 200}),
        ("gemma2", {"attn_logit_softcapping": 5.0}),
        ("gemma2", {"final_logit_softcapping": 10.0}),
        ("gemma3", {"rope_local_base_freq": 1e6}),
        ("gemma3-linear", {"rope_scaling": None}),
        ("gemma3-pruned", {"layer_types": ["sliding_attention"] * 3}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_the_comparison_notices_a_wrong_key(name: str, change: dict, tiny: Callable, tmp_path: Path) -> None:
    """The same comparison fails by far when one value is written wrongly: it has the power to see it."""
    checkpoint, expected = tiny(name)
    wrong = dataclasses.replace(checkpoint, config={**checkpoint.config, **change})
    assert agreement(expected, llama_cpp(wrong, tmp_path))[1] > 1e-3


def test_auto_is_lossless_and_written_as_stored(tmp_path: Path) -> None:
    save_tiny("gemma3", tmp_path / "hf", torch.bfloat16)
    checkpoint = load(tmp_path / "hf")
    types = export_gguf(checkpoint, tmp_path / "m.gguf", "auto")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(types.values()) == {"BF16", "F32"}
    for name, tensor in gguf_tensors(checkpoint).items():
        assert types[name] == stored[name].tensor_type.name == ("F32" if len(tensor.shape) == 1 else "BF16")
        values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        assert np.array_equal(values.reshape(tensor.shape), tensor.read().float().numpy())
    assert np.array_equal(
        gguf.quants.dequantize(stored["token_embd.weight"].data, GgmlType.BF16),
        checkpoint.tensors["model.embed_tokens.weight"].read().float().numpy(),
    )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_types_and_keys_as_the_gguf_package_reads_them(dtype: Any, tiny: Callable, tmp_path: Path) -> None:
    checkpoint, _ = tiny("llama")
    steps: list[tuple[str, int, int]] = []
    types = export_gguf(checkpoint, tmp_path / "m.gguf", dtype, progress=lambda *step: steps.append(step))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = [(t.name, t.tensor_type.name, int(t.n_elements), int(t.n_bytes)) for t in reader.tensors]
    assert read_gguf_types(tmp_path / "m.gguf") == expected
    assert {name: kind for name, kind, _, _ in expected} == types
    assert types["blk.0.attn_q.weight"] == dtype
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert [s[0] for s in steps] == list(types)
    assert steps[-1][1] == steps[-1][2] == sum(n_bytes for _, _, _, n_bytes in expected)
    value = {key: field.contents() for key, field in reader.fields.items()}
    file_type = {"F32": gguf.LlamaFileType.ALL_F32, "F16": 1, "BF16": 32}[dtype]
    assert value["general.file_type"] == file_type
    assert value["llama.attention.head_count_kv"] == 2
    assert value["llama.rope.freq_base"] == 500000.0
    assert value["llama.vocab_size"] == len(value["tokenizer.ggml.tokens"]) == 512


def test_rope_factors_equal_transformers(tiny: Callable) -> None:
    """gguf's divisors are transformers' unscaled over its scaled frequencies."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    checkpoint, _ = tiny("llama-early-bend")
    config = AutoConfig.for_model(**TINY["llama-early-bend"])
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain, _ = ROPE_INIT_FUNCTIONS["default"](config, torch.device("cpu"))
    factors = gguf_tensors(checkpoint)["rope_freqs.weight"].read()
    assert len(factors.unique()) > 2
    torch.testing.assert_close(factors, plain / scaled, rtol=1e-6, atol=0)


def test_a_tensor_in_its_own_codes(tiny: Callable, tmp_path: Path) -> None:
    """Any tensor may be written from blocks of our own; they come back bit for bit and llama.cpp runs them."""
    checkpoint, expected = tiny("llama")
    target = "blk.1.ffn_down.weight"
    made: dict[str, np.ndarray] = {}

    def encode(name: str, tensor: Tensor) -> EncodedTensor | None:
        if name != target:
            return None

        def read() -> np.ndarray:
            made[name] = gguf.quants.quantize(tensor.read().numpy(), GgmlType.Q8_0)
            return made[name]

        return EncodedTensor(GgmlType.Q8_0, read)

    types = export_gguf(checkpoint, tmp_path / "m.gguf", "F32", encode)
    assert [name for name, kind in types.items() if kind == "Q8_0"] == [target]
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}[target]
    assert np.array_equal(stored.data, made[target])
    top1, kl = agreement(expected, llama_logits(tmp_path / "m.gguf", TOKENS, tmp_path))
    assert top1 > 0.95
    assert 1e-9 < kl < 1e-3


def test_codes_that_do_not_fit_are_refused(tiny: Callable, tmp_path: Path) -> None:
    checkpoint, _ = tiny("llama")
    cases = [
        (GgmlType.Q4_K, np.zeros(1, np.uint8), "64 columns, which Q4_K's blocks of 256"),
        (GgmlType.Q8_0, np.zeros(7, np.uint8), "needs .* bytes, got 7"),
        (GgmlType.Q8_0, np.zeros(64 * 68, np.int8), "of int8"),
    ]
    for kind, data, message in cases:

        def encode(name: str, tensor: Tensor, kind: Any = kind, data: Any = data) -> EncodedTensor | None:
            return EncodedTensor(kind, lambda: data) if name == "blk.0.attn_q.weight" else None

        with pytest.raises(SlimpiError, match=message):
            export_gguf(checkpoint, tmp_path / "m.gguf", "F32", encode)
        assert list(tmp_path.iterdir()) == []


def test_f16_overflow_is_refused(tiny: Callable, tmp_path: Path) -> None:
    checkpoint, _ = tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    big = checkpoint.tensors[name].read().clone()
    big[0, 0] = 70000.0
    changed = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: held(name, big)})
    with pytest.raises(SlimpiError, match=r"blk\.0\.ffn_up\.weight has values up to 70000.*65504"):
        export_gguf(changed, tmp_path / "m.gguf", "F16")
    assert list(tmp_path.iterdir()) == []
    export_gguf(changed, tmp_path / "m.gguf", "BF16")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_broken_export(error: Any, tiny: Callable, tmp_path: Path) -> None:
    checkpoint, _ = tiny("llama")
    (tmp_path / "m.gguf").write_bytes(b"the one before")

    def stop(name: str, done: int, total: int) -> None:
        if name == "blk.1.attn_q.weight":
            raise error

    expected = SlimpiError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_gguf(checkpoint, tmp_path / "m.gguf", "F32", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"the one before"


def test_disk_space_is_asked_first(tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1_000_000))
    with pytest.raises(SlimpiError, match=r"needs 0\.07 GB, 0\.00 GB are free"):
        export_gguf(tiny("llama")[0], tmp_path / "m.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "lacks"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2-yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "unsupported"),
        ("qwen2", {"head_dim": 32}, "needs hidden_size 128"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144 would be scaled by 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "no usable attn_logit_softcapping"),
        ("gemma2", {"tie_word_embeddings": False}, "does not load in llama.cpp"),
        ("gemma3", {"num_hidden_layers": 62}, "does not name all 62 layers"),
        (
            "gemma3",
            {"num_hidden_layers": 62, "layer_types": ["full_attention"] * 62},
            "query_pre_attn_scalar 32 would be scaled by 16",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_what_llama_cpp_would_run_differently_is_refused(
    name: str, change: dict, message: str, tiny: Callable, tmp_path: Path
) -> None:
    checkpoint, _ = tiny(name)
    changed = dataclasses.replace(checkpoint, config={**checkpoint.config, **change})
    with pytest.raises(SlimpiError, match=message):
        export_gguf(changed, tmp_path / "m.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


def test_formats_count_all_overheads(tiny: Callable, tmp_path: Path) -> None:
    assert FORMATS["Q4_K"].bits_per_weight == 4.5
    assert FORMATS["Q8_0"].bits_per_weight == 8.5
    assert (FORMATS["Q4_0"].bits_per_weight, FORMATS["Q4_0"].block_size) == (4.5, 32)
    assert FORMATS["Q2_K"].bits_per_weight == 2.625
    export_gguf(tiny("llama")[0], tmp_path / "m.gguf", "F16")
    listed = read_gguf_types(tmp_path / "m.gguf")
    n_small = sum(n for _, kind, n, _ in listed if kind == "F32")
    n_all = sum(n for _, _, n, _ in listed)
    assert bits_per_weight(listed) == pytest.approx(16 + 16 * n_small / n_all)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name: str, tmp_path: Path, data_dir: Path) -> None:
    """Against transformers' own reading of the GGUF, which dequantizes independently: weights equal, logits agree."""
    from transformers import AutoModelForCausalLM

    path = real_gguf(name, tmp_path)
    checkpoint = load(path)
    export_gguf(checkpoint, tmp_path / "m.gguf", "F32")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs = model.state_dict()
    for tensor_name, tensor in checkpoint.tensors.items():
        assert torch.equal(theirs[tensor_name], tensor.read()), tensor_name
    text = (data_dir / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")[:8000]
    tokens = np.array(checkpoint.vocab.to_tokenizers().encode(text).ids[:N_TOKENS])
    assert len(tokens) == N_TOKENS
    top1, kl = agreement(hf_logits(model, tokens), llama_logits(tmp_path / "m.gguf", tokens, tmp_path))
    assert top1 >= 0.995
    assert kl < 1e-4


@pytest.mark.slow
def test_memory_stays_below_the_largest_tensor(tmp_path: Path) -> None:
    """Two layers at Llama-3.1-8B's widths: 3 GB of weights convert in less memory than the embeddings alone take."""
    record = stream_8b.run(2, tmp_path)
    assert record["rows_compared"] == 48
    assert record["checkpoint_bytes"] > 2.9e9
    assert record["peak_rss_bytes"] < 128256 * 4096 * 2
    assert list(tmp_path.iterdir()) == []
