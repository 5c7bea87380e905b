"""Encoders in blocks of 4 and 8 bits: each file is run, and computes what its dequantized weights compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_onnx import TEXTS, exported, run
from tokenizers import Tokenizer

from device.records import SlimpiError
from pipeline.export.onnx import check_variant, describe_onnx, make_variant
from pipeline.export.onnx_rewrite import quantize_u8
from pipeline.formats import FORMATS
from pipeline.layers import Layer
from pipeline.methods import METHODS

__all__ = ["exported"]
FREE = [name for name, entry in METHODS.items() if entry.needs == "nothing"]
KINDS = ["INT4_G16", "INT4_G32_ZP", "INT8_G16", "INT8_G32_ZP"]


def dequantized(base: Path, method: str, kind: str) -> onnx.ModelProto:
    """The fp32 graph with each product's weight replaced by what its codes mean, lookups by their uint8 rows."""
    model = onnx.load(base)
    nodes = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]
    products = {n.input[1]: any(a.name == "transB" and a.i for a in n.attribute) for n in nodes}
    lookups = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    for tensor in model.graph.initializer:
        if len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        weight = numpy_helper.to_array(tensor)
        if tensor.name in products:
            w = torch.from_numpy((weight if products[tensor.name] else weight.T).copy())
            if w.shape[1] % FORMATS[kind].block_size:
                continue
            coded = METHODS[method].run(Layer(0, {"w": w}, {}), {}, {"w": FORMATS[kind]}).tensors["w"]
            made = coded.dequantize().numpy()
            weight = made if products[tensor.name] else made.T
        elif tensor.name in lookups:
            codes, scale, zero = quantize_u8(weight, 0)
            weight = (codes.astype(np.float32) - zero) * scale
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight), tensor.name))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FREE)
def test_logits_are_those_of_the_dequantized_weights(exported: Path, tmp_path: Path, method: str, kind: str) -> None:
    summary = make_variant(exported / "model.onnx", tmp_path, f"{method.upper()}-{kind}")
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    found = run(tmp_path / "model.onnx", tokenizer, TEXTS, 4)
    onnx.save(dequantized(exported / "model.onnx", method, kind), tmp_path / "twin.onnx")
    expected = run(tmp_path / "twin.onnx", tokenizer, TEXTS, 4)
    p, log_q = torch.from_numpy(expected).log_softmax(1), torch.from_numpy(found).log_softmax(1)
    assert float((p.exp() * (p - log_q)).sum(1).max()) < 1e-6
    assert np.abs(found - run(exported / "model.onnx", tokenizer, TEXTS, 4)).max() > 1e-5, "something was quantized"
    short = kind.removesuffix("_ZP")
    assert short in summary.types.values()
    assert summary.n_weights == describe_onnx(exported / "model.onnx").n_weights


def test_bits_count_codes_scales_and_zero_points(exported: Path, tmp_path: Path) -> None:
    bits = {}
    for kind in KINDS:
        bits[kind] = make_variant(exported / "model.onnx", tmp_path / kind, f"RTN-{kind}").bits_per_linear_weight
    # Some products of a tiny encoder have no whole blocks and stay fp32, so that the mean is above the format's own.
    for kind in KINDS:
        assert FORMATS[kind].bits_per_weight - 1e-9 <= bits[kind] < 33
    assert bits["INT4_G16"] < bits["INT8_G16"]


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("GPTQ-INT4_G32", "'GPTQ' in 'GPTQ-INT4_G32' is none of the methods that need no calibration: RTN, HQQ"),
        ("rtn-INT4_G32", "'rtn' in"),
        ("RTN-INT4_G33", "unknown ONNX variant 'RTN-INT4_G33'"),
        ("RTN-Q4_0", "unknown ONNX variant"),
        ("RTN-MXQ_B4_G32", "unknown ONNX variant"),
    ],
)
def test_wrong_names_are_refused(variant: str, said: str) -> None:
    with pytest.raises(SlimpiError, match=said):
        check_variant(variant)


def test_blocks_that_fit_nowhere_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match="Take smaller blocks"):
        make_variant(exported / "model.onnx", tmp_path, "RTN-INT4_G256")
    assert not (tmp_path / "model.onnx").exists()
