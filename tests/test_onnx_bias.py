"""Bias correction: every product's mean is fp32's again, by hand and in whatever form the bias has."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_encoders import MAX_TOKENS, PROSE, TINY, save_encoder

from pipeline.export import onnx_bias
from pipeline.export.onnx import export_encoder
from pipeline.export.onnx_bias import biased, correct_biases, means
from pipeline.export.onnx_observe import Calibration, batches, observe, open_session, read_calibration, tapped
from pipeline.export.onnx_static import ARITHMETICS, Treatment, products, quantize_static

LABELS = ["a", "b", "c"]
NARROW = 0.3
"""Of its range: activations are cut, so that means move."""


@pytest.fixture(scope="module", params=[*TINY, "xlnet"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnx.ModelProto, onnx.ModelProto, Calibration]:
    """fp32, quantized badly but for its last product, and text."""
    folder = tmp_path_factory.mktemp(request.param)
    save_encoder(request.param, folder / "hf", len(LABELS))
    export_encoder(folder / "hf", folder, LABELS, MAX_TOKENS)
    text = read_calibration(PROSE, "demo", folder / "tokenizer.json", MAX_TOKENS, 24)
    model = onnx.load(folder / "model.onnx")
    found = products(model.graph)
    seen = observe(model, list(dict.fromkeys(p.x for p in found)), text)
    treatments = {
        p.y: Treatment((NARROW * float(seen[p.x].low.min()), NARROW * float(seen[p.x].high.max()))) for p in found[:-1]
    }
    return model, quantize_static(model, treatments, ARITHMETICS["U8U8"]), text


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def test_means_are_those_of_all_tokens(made: tuple[onnx.ModelProto, onnx.ModelProto, Calibration]) -> None:
    model, _, text = made
    name = biased(model.graph, model.graph)[0].output
    session = open_session(tapped(model, [name]))
    rows: list[np.ndarray] = []
    for feed in batches(text, [entry.name for entry in session.get_inputs()]):
        value = session.run([name], feed)[0].astype(np.float64)
        rows += list(value.reshape(-1, value.shape[-1]))
    np.testing.assert_allclose(means(model, [name], text)[name], np.mean(rows, axis=0), atol=1e-6)


def test_every_mean_is_that_of_fp32_afterwards(made: tuple[onnx.ModelProto, onnx.ModelProto, Calibration]) -> None:
    model, quantized, text = made
    quantized = copied(quantized)
    found = biased(model.graph, quantized.graph)
    outputs = [b.output for b in found]
    wanted, off = means(model, outputs, text), means(quantized, outputs, text)
    before, after = correct_biases(model, quantized, text)
    assert after < before
    right = means(quantized, outputs, text)
    for name in outputs:
        scale = np.abs(wanted[name]).max()
        assert np.abs(off[name] - wanted[name]).max() > 1e-3 * scale
        assert np.abs(right[name] - wanted[name]).max() < 1e-4 * scale
    onnx.checker.check_model(quantized)


def test_every_form_of_a_bias_is_found(made: tuple[onnx.ModelProto, onnx.ModelProto, Calibration]) -> None:
    model, quantized, _ = made
    found = biased(model.graph, quantized.graph)
    assert len({b.bias for b in found}) == len(found)
    gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
    last = {node.output[0]: node.op_type for node in quantized.graph.node}
    assert {b.output for b in found} >= {node.output[0] for node in gemms}
    assert {b.sign for b in found if last[b.output] == "Sub"} <= {-1}
    assert {b.sign for b in found if last[b.output] != "Sub"} == {1}


def test_what_does_not_help_is_undone(
    made: tuple[onnx.ModelProto, onnx.ModelProto, Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, quantized, text = made
    changed = copied(quantized)
    real = means

    def wrong(which: onnx.ModelProto, tensors: list[str], calibration: Calibration) -> dict[str, np.ndarray]:
        far = 9.0 if which is model else 0.0
        return {n: far * np.arange(len(v)) for n, v in real(which, tensors, calibration).items()}

    monkeypatch.setattr(onnx_bias, "means", wrong)
    before, after = correct_biases(model, changed, text)
    assert after == before
    for one, other in zip(quantized.graph.initializer, changed.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
