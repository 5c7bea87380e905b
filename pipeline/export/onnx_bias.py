"""Biases corrected for what quantization does to the mean of a product's outputs.

Rounding errors do not average out over a text's tokens: with them each output of a product has another mean than in
fp32, and in the logits this is a preference for one label. What the mean is off by, on the calibration text, is taken
off the product's bias (Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction,
section 4.2; on text here instead of by batch norms). One product after another: what is corrected before changes what
is behind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from pipeline.export.onnx_lossless import divergence
from pipeline.export.onnx_observe import Calibration, batches, logits_of, open_session, tapped
from pipeline.export.onnx_static import products
from pipeline.progress import Tick, quiet

N_PASSAGES = 128

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Biased:
    """`output` of a product with its bias; `bias`: the constant's name; sign: -1 if it is taken off."""

    output: str
    bias: str
    sign: int


def correct_biases(
    model: onnx.ModelProto, quantized: onnx.ModelProto, calibration: Calibration, tick: Tick = quiet
) -> tuple[float, float]:
    """Correct `quantized`, made from the fp32 `model`, in place, by the first N_PASSAGES passages; the mean KL
    divergence of the logits there before and after, nats. All stays as it was if it does not fall."""
    part = calibration.first(N_PASSAGES)
    reference = logits_of(model, part)
    before = divergence(reference, logits_of(quantized, part))
    found = biased(model.graph, quantized.graph)
    wanted = means(model, [b.output for b in found], part)
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    old = {b.bias: numpy_helper.to_array(constants[b.bias]).copy() for b in found}
    for done, b in enumerate(found, 1):
        off = wanted[b.output] - means(quantized, [b.output], part)[b.output]
        new = (old[b.bias] + b.sign * off).astype(np.float32)
        constants[b.bias].CopyFrom(numpy_helper.from_array(new, b.bias))
        tick(done, len(found), "biases")
    after = divergence(reference, logits_of(quantized, part))
    if after < before:
        return before, after
    for name, value in old.items():
        constants[name].CopyFrom(numpy_helper.from_array(value, name))
    return before, before


def biased(graph: onnx.GraphProto, quantized: onnx.GraphProto) -> list[Biased]:
    """The products of the fp32 graph that have a bias of their own, in the graph's order, as it is in the quantized."""
    uses = Counter(name for node in quantized.node for name in node.input)
    constants = {tensor.name for tensor in quantized.initializer}
    makers = {name: node for node in quantized.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gemms = {node.output[0] for node in graph.node if node.op_type == "Gemm"}
    found = []
    for product in products(graph):
        behind = readers.get(product.y, [])
        if product.y in gemms:
            output = product.y
        elif len(behind) == 1 and behind[0].op_type == "Add":
            output = behind[0].output[0]
        else:
            continue
        node = makers[output]
        place = {"Add": (0, 1), "Sub": (1,), "Gemm": (2,)}.get(node.op_type, ())
        names = [node.input[i] for i in place if i < len(node.input) and node.input[i] in constants]
        if len(names) == 1 and uses[names[0]] == 1:
            found.append(Biased(output, names[0], -1 if node.op_type == "Sub" else 1))
    return found


def means(model: onnx.ModelProto, tensors: list[str], calibration: Calibration) -> dict[str, Float64]:
    """{name: (d,)} means of tensors (..., d) over all tokens of all passages."""
    import onnxruntime

    session = open_session(tapped(model, tensors))
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    sums, counts = dict.fromkeys(tensors, np.zeros(())), dict.fromkeys(tensors, 0)
    for feed in batches(calibration, [entry.name for entry in session.get_inputs()]):
        for name, value in zip(tensors, session.run(tensors, feed, options), strict=True):
            flat = value.reshape(-1, value.shape[-1])
            sums[name] = sums[name] + flat.sum(0, dtype=np.float64)
            counts[name] += len(flat)
    return {name: np.asarray(sums[name] / counts[name]) for name in tensors}
