"""Rewriting an ONNX graph's products and lookups into dynamic INT8 forms, node by node."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from device.records import SlimpiError

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

SCALE, ZERO_POINT = ".scale", ".zero_point"
LOW = ".low"
"""The low halves of codes of 8 bits that are multiplied as two of 4."""


def quantize_u8(weight: Float32, axis: int, bits: int = 8) -> tuple[UInt8, Float32, UInt8]:
    """Codes 0...2^bits - 1, scales and zero points, a pair a slice along `axis`: weight ~ (codes - zero_point) * scale.

    Affine rounding to nearest over [min(w, 0), max(w, 0)], so that zero is exact (Jacob et al. 2018, eq. 1).
    """
    low = np.minimum(weight.min(axis=1 - axis, keepdims=True), 0).astype(np.float64)
    high = np.maximum(weight.max(axis=1 - axis, keepdims=True), 0).astype(np.float64)
    top = 2**bits - 1
    scale = ((high - low) / top).astype(np.float32)
    scale[scale == 0] = 1.0
    zero_point = np.rint(-low / scale).clip(0, top)
    codes = (np.rint(weight / scale) + zero_point).clip(0, top)
    return codes.astype(np.uint8), scale, zero_point.astype(np.uint8)


_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def _axis(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 0)


class Rewriter:
    """Replaces a graph's products and lookups by their INT8 forms, each weight quantized once."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.weights = {t.name: t for t in graph.initializer if len(t.dims) == 2 and t.data_type == TensorProto.FLOAT}
        self.nodes: list[onnx.NodeProto] = []
        self.rewritten: dict[str, str] = {}
        self.activations: set[str] = set()

    def run(self) -> None:
        kept: list[onnx.NodeProto] = []
        for node in self.graph.node:
            if node.op_type in ("MatMul", "Gemm") and node.input[1] in self.weights:
                self.product(node)
            elif node.op_type == "Gather" and node.input[0] in self.weights and _axis(node) == 0:
                self.lookup(node)
            else:
                self.nodes.append(node)
                kept.append(node)
        for node in kept:
            if used := self.rewritten.keys() & set(node.input):
                raise SlimpiError(f"{node.op_type} `{node.name}` needs {sorted(used)} in fp32. Use another encoder.")
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def product(self, node: onnx.NodeProto) -> None:
        """y = (x_codes @ w_codes, zero points taken off, in int32) * (x_scale * w_scale) + bias."""
        transposed = self.check_gemm(node)
        x, weight, y = node.input[0], node.input[1], node.output[0]
        self.quantize(weight, "product", axis=1, transposed=transposed)
        if x not in self.activations:
            self.activations.add(x)
            self.add("DynamicQuantizeLinear", [x], f"{x}.codes", f"{x}{SCALE}", f"{x}{ZERO_POINT}")
        self.add("MatMulInteger", [f"{x}.codes", weight, f"{x}{ZERO_POINT}", f"{weight}{ZERO_POINT}"], f"{y}.int32")
        self.add("Cast", [f"{y}.int32"], f"{y}.float", to=TensorProto.FLOAT)
        self.add("Mul", [f"{x}{SCALE}", f"{weight}{SCALE}"], f"{y}{SCALE}")
        biased = len(node.input) > 2
        self.add("Mul", [f"{y}.float", f"{y}{SCALE}"], f"{y}.product" if biased else y)
        if biased:
            self.add("Add", [f"{y}.product", node.input[2]], y)

    def check_gemm(self, node: onnx.NodeProto) -> bool:
        """Whether the weight is transposed; SlimpiError if the product is more than x @ w + bias."""
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        transposed = bool(settings.pop("transB", 0))
        if any(value != _PLAIN_GEMM.get(name) for name, value in settings.items()):
            raise SlimpiError(f"Gemm `{node.name}` with {settings} has no INT8 form here. Use another encoder.")
        return transposed

    def lookup(self, node: onnx.NodeProto) -> None:
        """Rows of codes, zero points and scales, dequantized after the lookup: the table stays uint8 in memory."""
        weight, ids, y = node.input[0], node.input[1], node.output[0]
        self.quantize(weight, "lookup", axis=0, transposed=False)
        for suffix in ("", ZERO_POINT, SCALE):
            self.add("Gather", [f"{weight}{suffix}", ids], f"{y}.rows{suffix}", axis=0)
        for suffix in ("", ZERO_POINT):
            self.add("Cast", [f"{y}.rows{suffix}"], f"{y}.float{suffix}", to=TensorProto.FLOAT)
        self.add("Sub", [f"{y}.float", f"{y}.float{ZERO_POINT}"], f"{y}.centred")
        self.add("Mul", [f"{y}.centred", f"{y}.rows{SCALE}"], y)

    def quantize(self, name: str, role: str, axis: int, transposed: bool) -> None:
        """Replace the weight by its codes, scales and zero points; a second use must be the same."""
        use = f"{role} transposed={transposed}"
        if self.rewritten.setdefault(name, use) != use:
            raise SlimpiError(f"`{name}` is used both as {use} and {self.rewritten[name]}. Use another encoder.")
        tensor = self.weights[name]
        if tensor.data_type != TensorProto.FLOAT:
            return
        weight = numpy_helper.to_array(tensor)
        codes, scale, zero_point = self.codes(name, weight.T if transposed else weight, axis)
        if axis == 1:  # MatMulInteger wants one value a column, a lookup one row a row
            scale, zero_point = scale[0], zero_point[0]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(codes), name))
        self.graph.initializer.append(numpy_helper.from_array(scale, f"{name}{SCALE}"))
        self.graph.initializer.append(numpy_helper.from_array(zero_point, f"{name}{ZERO_POINT}"))

    def codes(self, name: str, weight: Float32, axis: int) -> tuple[UInt8, Float32, UInt8]:
        return quantize_u8(weight, axis)

    def add(self, kind: str, inputs: list[str], *outputs: str, **settings: int) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"{outputs[0]}/{kind}", **settings))
