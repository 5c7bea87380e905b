"""The last layer for one token: the same logits as the whole layer, less work, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from tiny_encoders import MAX_TOKENS, TINY, save_encoder

from pipeline.encoders import load_encoder
from pipeline.export import onnx as export
from pipeline.export.onnx import exported
from pipeline.export.onnx_one_token import keep_one_token
from pipeline.pooling import pool_mean

LABELS = ["no", "yes"]


def whole(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, mean: bool = False) -> onnx.ModelProto:
    """The export with every token in its last layer."""
    save_encoder(family, folder)
    encoder = load_encoder(folder, LABELS, MAX_TOKENS)
    if mean:
        pool_mean(encoder.model)
    with monkeypatch.context() as patch:
        patch.setattr(export, "keep_one_token", lambda model: 0)
        return exported(encoder.model)


def feeds(model: onnx.ModelProto, batch: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(length).integers(3, 300, (batch, length))
    mask = (np.arange(length) < np.linspace(length, 2, batch)[:, None]).astype(np.int64)
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {value.name: known[value.name] for value in model.graph.input}


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], *outputs: str) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), export.one_thread())
    return session.run(list(outputs) or ["logits"], feed)


def products(model: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in model.graph.node if node.op_type == "MatMul"]


def with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    copy.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return copy


@pytest.mark.parametrize("family", TINY)
def test_the_logits_stay_and_the_last_layer_has_one_token(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = whole(family, tmp_path, monkeypatch)
    thin = onnx.ModelProto.FromString(model.SerializeToString())
    # The query, its product with the keys, that with the values, the attention's output, the MLP's two.
    assert keep_one_token(thin) == 6
    for batch, length in ((1, 3), (1, MAX_TOKENS), (4, 17)):
        feed = feeds(model, batch, length)
        np.testing.assert_allclose(run(thin, feed)[0], run(model, feed)[0], atol=2e-5)
    shown = with_outputs(thin, products(thin))
    shapes = [found.shape for found in run(shown, feeds(model, 2, 9), *products(thin))]
    layer = shapes[-8:]  # keys and values are still those of all tokens
    assert sorted(s[-2] for s in layer) == [1] * 6 + [9] * 2
    assert all(1 not in s[1:] for s in shapes[:-8])


@pytest.mark.parametrize("family", TINY)
def test_a_head_that_reads_all_tokens_is_left_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = whole(family, tmp_path, monkeypatch, mean=True)
    before = model.SerializeToString(deterministic=True)
    assert keep_one_token(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_states_that_others_read_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last states are an output of the graph, too: all of the last layer is needed."""
    model = whole("bert", tmp_path, monkeypatch)
    states = next(n.input[0] for n in model.graph.node if n.op_type == "Gather" and "pooler" in n.output[0])
    model.graph.output.append(helper.make_tensor_value_info(states, onnx.TensorProto.FLOAT, ["b", "t", 32]))
    before = model.SerializeToString(deterministic=True)
    assert keep_one_token(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_an_mlp_that_is_seen_from_outside_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read whole is computed whole, and only what lies behind it is cut."""
    model = whole("bert", tmp_path, monkeypatch)
    seen = onnx.ModelProto.FromString(model.SerializeToString())
    first = products(model)[-2]  # the MLP's
    seen.graph.output.append(helper.make_tensor_value_info(first, onnx.TensorProto.FLOAT, ["b", "t", 64]))
    assert keep_one_token(seen) == 1
    feed = feeds(model, 3, 11)
    logits, inner = run(seen, feed, "logits", first)
    assert inner.shape[1] == 11
    np.testing.assert_allclose(logits, run(model, feed)[0], atol=2e-5)


def test_xlnet_keeps_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head reads the last token of states that have another order of axes."""
    model = whole("xlnet", tmp_path, monkeypatch)
    thin = onnx.ModelProto.FromString(model.SerializeToString())
    keep_one_token(thin)
    feed = feeds(model, 3, 9)
    np.testing.assert_allclose(run(thin, feed)[0], run(model, feed)[0], atol=2e-5)
