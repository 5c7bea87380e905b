"""Calibrated INT8 encoders: every product recomputed in exact integers, shares counted, choices against naive twins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from fakes import TWEETS
from onnx import TensorProto, helper, numpy_helper
from test_onnx import LABELS, TEXTS, feed, run, session
from tiny_encoders import MAX_TOKENS, PROSE, TINY, save_encoder
from tokenizers import Tokenizer

from device.schema import SlimpiError
from pipeline.export import onnx_int8
from pipeline.export.onnx import check_variant, describe_onnx, export_encoder, make_variant
from pipeline.export.onnx_observe import Calibration, Observed, observe, read_calibration
from pipeline.export.onnx_ranges import RANGES
from pipeline.export.onnx_smooth import (
    ALPHAS,
    GELU_MINIMUM,
    Choices,
    emulate,
    fold_divisions,
    gelu_outputs,
    relative_error,
    treat,
)
from pipeline.export.onnx_static import ARITHMETICS, Treatment, products, quantize_static, quantize_weight, shares

VARIANTS = [
    *(f"INT8-{plan}" for plan in onnx_int8.PLANS),
    *(f"INT8-static-{name}" for name in ARITHMETICS if name != "U8U8"),
    *(f"INT8-static-{name}" for name in RANGES if name != "minmax"),
    "INT8-static-tensor",
    "INT8-smooth-S8S8-tensor-mse",
]
WORST = {"INT8-static-tensor": 0.3}  # of the logits' norm; what is quantized more coarsely may be further off


@pytest.fixture(scope="module", params=TINY)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_encoder(request.param, folder / "hf", len(LABELS))
    export_encoder(folder / "hf", folder, LABELS, MAX_TOKENS)
    return folder


@pytest.fixture(scope="module")
def calibration(exported: Path) -> Calibration:
    return read_calibration(PROSE, "demo", exported / "tokenizer.json", MAX_TOKENS, 24)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_and_stay_close(exported: Path, calibration: Calibration, tmp_path: Path, variant: str) -> None:
    summary = make_variant(exported / "model.onnx", tmp_path, variant, calibration)
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    fp32 = run(exported / "model.onnx", tokenizer, TEXTS, 1)
    int8 = run_exact(tmp_path / "model.onnx", tokenizer, TEXTS)
    assert np.abs(int8 - fp32).max() > 0
    assert np.linalg.norm(int8 - fp32) < WORST.get(variant, 0.25) * np.linalg.norm(fp32)
    base = describe_onnx(exported / "model.onnx")
    assert (summary.n_weights, summary.n_linear_weights) == (base.n_weights, base.n_linear_weights)
    small = {name for name, kind in summary.types.items() if kind != "FP32"}
    stayed = set(summary.facts.get("fp32", []))
    matrices = {t.name for t in onnx.load(exported / "model.onnx").graph.initializer if len(t.dims) == 2}
    assert small == matrices - stayed
    assert summary.facts["int8_weights"] >= 0.95
    assert summary.facts["int8_activations"] >= 0.95
    assert summary.notes[0].startswith("INT8: ")


def run_exact(model: Path, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One text at a time, with integer products that do not saturate."""
    from pipeline.export.onnx_observe import open_session

    running = open_session(model.read_bytes(), 1)
    names = [entry.name for entry in running.get_inputs()]
    return np.concatenate([running.run(["logits"], feed(tokenizer, [text], names))[0] for text in texts])
