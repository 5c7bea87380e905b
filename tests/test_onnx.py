"""Exported encoders are run: fp32 against transformers, INT8 against exact integer arithmetic in numpy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import real_exports
import torch
from fakes import TWEETS
from onnx import TensorProto, helper, numpy_helper
from tiny_encoders import MAX_TOKENS, TINY, save_encoder
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from device.records import SlimpiError
from pipeline.export.onnx import (
    ONNX_VARIANTS,
    describe_onnx,
    export_encoder,
    make_variant,
    quantize_dynamic,
)
from pipeline.export.onnx_rewrite import quantize_u8
from pipeline.tweets.head import read_rows, train_head

LABELS = ["quiet", "alarm", "noise"]
TEXTS = [text for text, _ in TWEETS]


@pytest.fixture(scope="module", params=TINY)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder in hf/, its export, and its INT8 form in INT8-dynamic/."""
    folder = tmp_path_factory.mktemp(request.param)
    save_encoder(request.param, folder / "hf", len(LABELS))
    export_encoder(folder / "hf", folder, LABELS, MAX_TOKENS)
    make_variant(folder / "model.onnx", folder / "INT8-dynamic", "INT8-dynamic")
    return folder


def session(model: Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feed(tokenizer: Tokenizer, texts: list[str], names: list[str], pad_id: int = 1) -> dict[str, np.ndarray]:
    """A batch padded to its longest, as the device does it."""
    tokenizer.enable_truncation(MAX_TOKENS)
    rows = [tokenizer.encode(text).ids for text in texts]
    length = max(map(len, rows))
    turn = -1 if (tokenizer.padding or {}).get("direction") == "left" else 1
    ids = np.array([(row[::turn] + [pad_id] * (length - len(row)))[::turn] for row in rows])
    mask = np.array([([1] * len(row) + [0] * (length - len(row)))[::turn] for row in rows])
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: known[name] for name in names}


def run(model: Path, tokenizer: Tokenizer, texts: list[str], batch_size: int) -> np.ndarray:
    running = session(model)
    names = [entry.name for entry in running.get_inputs()]
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return np.concatenate([running.run(["logits"], feed(tokenizer, batch, names))[0] for batch in batches])


def hf_logits(folder: Path, texts: list[str]) -> np.ndarray:
    """One text at a time through transformers: nothing padded."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
            rows.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy())
    return np.array(rows)


def test_fp32_equals_transformers_at_every_batch_and_length(exported: Path) -> None:
    texts = [*TEXTS, "a", "rain " * 100]
    expected = hf_logits(exported / "hf", texts)
    assert expected.std(axis=0).min() > 0.05  # the texts are told apart
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    for batch_size in (1, 2, 5, len(texts)):
        found = run(exported / "model.onnx", tokenizer, texts, batch_size)
        assert np.abs(found - expected).max() < 1e-4, batch_size


def test_xlnet_equals_transformers_at_every_batch_and_length(tmp_path: Path) -> None:
    """Its Einsums became products with plain matrices; it pads on the left, and the tokenizer says so."""
    model = save_encoder("xlnet", tmp_path / "hf", len(LABELS))
    export_encoder(tmp_path / "hf", tmp_path, LABELS, MAX_TOKENS)
    texts = [*TEXTS, "a", "rain " * 100]
    expected = hf_logits(tmp_path / "hf", texts)
    assert expected.std(axis=0).min() > 0.05
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.padding["direction"] == "left"
    for batch_size in (1, 5, len(texts)):
        assert np.abs(run(tmp_path / "model.onnx", tokenizer, texts, batch_size) - expected).max() < 1e-4, batch_size
    attention = sum(p.numel() for name, p in model.named_parameters() if re.search(r"rel_attn\.[qkvor]$", name))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert describe_onnx(tmp_path / "model.onnx").n_linear_weights == attention + linear


def test_axes_are_dynamic_and_tokenizer_is_bare(exported: Path) -> None:
    graph = onnx.load(exported / "model.onnx").graph
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param, value.name
        assert value.name == "logits" or dims[1].dim_param, value.name
    saved = json.loads((exported / "tokenizer.json").read_text())
    source = json.loads((exported / "hf" / "tokenizer.json").read_text())
    assert source["truncation"] is not None
    assert source["padding"] is not None
    assert (saved["truncation"], saved["padding"]) == (None, None)
    assert {k: v for k, v in saved.items() if k not in ("truncation", "padding")} == {
        k: v for k, v in source.items() if k not in ("truncation", "padding")
    }


def test_summary_counts_every_parameter_under_its_name(exported: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(exported / "hf")
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    columns = sum(m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    rows = sum(m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding))
    total = sum(parameters.values())
    fp32 = describe_onnx(exported / "model.onnx")
    assert fp32.types == dict.fromkeys(parameters, "FP32")
    assert (fp32.n_weights, fp32.n_linear_weights) == (total, linear)
    assert (fp32.bits_per_weight, fp32.bits_per_linear_weight) == (32.0, 32.0)
    int8 = describe_onnx(exported / "INT8-dynamic" / "model.onnx")
    assert (int8.n_weights, int8.n_linear_weights) == (total, linear)
    small = {name for name, kind in int8.types.items() if kind == "U8"}
    assert small == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert {int8.types[name] for name in parameters if name not in small} == {"FP32"}
    overhead = (columns + rows) * (32 + 8)
    assert int8.bits_per_linear_weight == pytest.approx((linear * 8 + columns * 40) / linear)
    bits = (linear + tables) * 8 + overhead + (total - linear - tables) * 32
    assert int8.bits_per_weight == pytest.approx(bits / total)


def test_int8_products_are_exact_integers(exported: Path) -> None:
    """Every MatMulInteger and its dequantization, recomputed in int64 from the fp32 input of its quantizer."""
    model = onnx.load(exported / "INT8-dynamic" / "model.onnx")
    nodes = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    wanted: dict[str, int] = {}
    for node in products:
        quantizer = nodes[node.input[0]]
        assert quantizer.op_type == "DynamicQuantizeLinear"
        codes, scale, zero = quantizer.output
        wanted |= {codes: TensorProto.UINT8, scale: TensorProto.FLOAT, zero: TensorProto.UINT8}
        wanted |= {quantizer.input[0]: TensorProto.FLOAT, node.output[0]: TensorProto.INT32}
    extra = [helper.make_tensor_value_info(name, kind, None) for name, kind in wanted.items()]
    model.graph.output.extend(extra)
    running = session(model)
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    values = running.run(list(wanted), feed(tokenizer, TEXTS, [entry.name for entry in running.get_inputs()]))
    got = dict(zip(wanted, values, strict=True))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in products:
        codes, scale, zero = nodes[node.input[0]].output
        expected_codes, expected_scale, expected_zero = dynamic_quantize(got[nodes[node.input[0]].input[0]])
        assert got[scale] == pytest.approx(expected_scale, rel=1e-6)
        assert int(got[zero]) == expected_zero
        assert np.abs(got[codes].astype(int) - expected_codes).max() <= 1  # the scale's last bit may tip a rounding
        assert (got[codes] != expected_codes).mean() < 1e-3
        weight = weights[node.input[1]]
        assert weight.dtype == np.uint8
        x = got[codes].astype(np.int64) - int(got[zero])
        w = weight.astype(np.int64) - weights[node.input[3]].astype(np.int64)
        assert np.array_equal(got[node.output[0]], x @ w), node.name
    assert len(products) == sum(
        1
        for n in onnx.load(exported / "model.onnx").graph.node
        if n.op_type in ("MatMul", "Gemm") and n.input[1] in describe_onnx(exported / "model.onnx").types
    )


def dynamic_quantize(x: np.ndarray) -> tuple[np.ndarray, float, int]:
    """DynamicQuantizeLinear as the ONNX standard defines it."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(int), scale, zero


def test_int8_weights_are_the_nearest_codes(exported: Path) -> None:
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(exported / "model.onnx").graph.initializer}
    graph = onnx.load(exported / "INT8-dynamic" / "model.onnx").graph
    after = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    gemms = [n for n in onnx.load(exported / "model.onnx").graph.node if n.op_type == "Gemm"]
    turned = {n.input[1] for n in gemms if any(a.name == "transB" and a.i for a in n.attribute)}
    checked = 0
    for name, codes in after.items():
        if codes.dtype != np.uint8 or codes.ndim != 2 or name.endswith(".zero_point"):
            continue
        scale, zero = after[f"{name}.scale"], after[f"{name}.zero_point"].astype(float)
        restored = (codes.astype(float) - zero) * scale
        original = before[name].T if name in turned else before[name]
        assert (np.abs(restored - original) <= 0.5001 * np.broadcast_to(scale, codes.shape) + 1e-7).all(), name
        checked += 1
    summary = describe_onnx(exported / "INT8-dynamic" / "model.onnx")
    assert checked == list(summary.types.values()).count("U8")


def test_int8_stays_close_to_fp32(exported: Path) -> None:
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    fp32 = run(exported / "model.onnx", tokenizer, TEXTS, 1)
    int8 = run(exported / "INT8-dynamic" / "model.onnx", tokenizer, TEXTS, 1)
    assert np.abs(int8 - fp32).max() > 0
    assert np.linalg.norm(int8 - fp32) < 0.1 * np.linalg.norm(fp32)
    assert (int8.argmax(1) == fp32.argmax(1)).mean() >= 0.85


@pytest.mark.parametrize("axis", [0, 1])
def test_quantize_u8_keeps_zero_and_handles_one_sided_slices(axis: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 7)).astype(np.float32)
    slices = weight if axis == 0 else weight.T
    slices[0] = np.abs(slices[0]) + 3  # all positive: zero must still be in range
    slices[1] = 0.0
    slices[2] = -np.abs(slices[2])
    codes, scale, zero = quantize_u8(weight, axis)
    restored = (codes.astype(float) - zero) * scale
    assert scale.shape == zero.shape == ((5, 1) if axis == 0 else (1, 7))
    assert (np.abs(restored - weight) <= 0.5001 * scale + 1e-7).all()
    assert (restored[weight == 0] == 0).all()


@pytest.mark.parametrize("how", ["head", "labels", "tokens", "weights", "config", "tokenizer", "causal"])
def test_bad_encoders_are_refused(tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder, labels, max_tokens = tmp_path / "hf", LABELS, MAX_TOKENS
    model = save_encoder("roberta", folder, len(LABELS))
    message = "does not load as a sequence classifier"
    if how == "head":
        model.roberta.save_pretrained(folder)
        message = r"no trained head for 3 labels: classifier\.dense\.bias"
    elif how == "labels":
        labels, message = ["no", "yes"], r"no trained head for 2 labels: classifier\.out_proj\.bias"
    elif how == "tokens":
        max_tokens, message = MAX_TOKENS + 1, f"max_tokens is {MAX_TOKENS + 1}; hf takes from 3 to {MAX_TOKENS}"
    elif how == "weights":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    elif how == "config":
        (folder / "config.json").unlink()
        message = "has no config.json"
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
        message = "is not a fast tokenizer"
    elif how == "causal":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": []}))
        message = "lacks \\d+ encoder weights"
    with pytest.raises(SlimpiError, match=message) as caught:
        export_encoder(folder, tmp_path / "out", labels, max_tokens)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().out == ""


def test_bad_files_are_refused(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(SlimpiError, match="unknown ONNX variant 'INT2'"):
        make_variant(exported / "model.onnx", tmp_path / "a", "INT2")
    (tmp_path / "broken.onnx").write_bytes(b"not protobuf at all")
    for variant in ONNX_VARIANTS:
        (tmp_path / "tokenizer.json").write_bytes(b"{}")
        with pytest.raises(SlimpiError, match=r"broken\.onnx is not an ONNX file"):
            make_variant(tmp_path / "broken.onnx", tmp_path / "b", variant)
        assert not (tmp_path / "b" / "model.onnx").exists()
    with pytest.raises(SlimpiError, match="is quantized already"):
        quantize_dynamic(exported / "INT8-dynamic" / "model.onnx", tmp_path / "c.onnx")


def test_one_weight_used_in_two_ways_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    value = helper.make_tensor_value_info
    for second in (helper.make_node("Gather", ["w", "i"], ["z"]), helper.make_node("Identity", ["w"], ["z"])):
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"]), second],
            "two",
            [value("x", TensorProto.FLOAT, [1, 4]), value("i", TensorProto.INT64, [1])],
            [value("y", TensorProto.FLOAT, [1, 4]), value("z", TensorProto.FLOAT, None)],
            [weight],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "two.onnx")
        with pytest.raises(SlimpiError, match="Use another encoder"):
            quantize_dynamic(tmp_path / "two.onnx", tmp_path / "out.onnx")
        assert not (tmp_path / "out.onnx").exists()


@pytest.mark.slow
def test_minilm_int8_on_tweets(tmp_path: Path, data_dir: Path) -> None:
    """Head trained on 600 tweets; FP32 against transformers and INT8 against FP32 on 200 others."""
    lines = (data_dir / "tweets" / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join(lines[:700]), encoding="utf-8")
    texts: list[str]
    texts, targets = read_rows(data_dir / "tweets" / "train.csv", "text", "target", 2)
    texts, targets = texts[-200:], targets[-200:]
    arguments: dict[str, Any] = {"text_column": "text", "label_column": "target", "labels": ["no", "yes"]}
    source = real_exports.source("minilm-l6-tweets")
    train_head(source, tmp_path / "train.csv", tmp_path / "hf", **arguments, max_tokens=MAX_TOKENS, seed=0)
    export_encoder(tmp_path / "hf", tmp_path, ["no", "yes"], MAX_TOKENS)
    summary = make_variant(tmp_path / "model.onnx", tmp_path / "int8", "INT8-dynamic")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fp32 = run(tmp_path / "model.onnx", tokenizer, texts, 8)
    int8 = run(tmp_path / "int8" / "model.onnx", tokenizer, texts, 1)
    assert np.abs(fp32 - hf_logits(tmp_path / "hf", texts)).max() < 1e-4
    assert (fp32.argmax(1) == targets).mean() > 0.7
    assert (fp32.argmax(1) == int8.argmax(1)).mean() >= 0.95
    assert summary.n_weights == 22_713_986
    assert summary.bits_per_weight < 8.2
    assert (tmp_path / "int8" / "model.onnx").stat().st_size < 24e6
