"""Encoders with static INT8: QuantizeLinear/DequantizeLinear around products with constant weights, ranges calibrated.

ONNX Runtime fuses each pair of dequantizers and its MatMul into one integer product with fp32 output
(MatMulIntegerToFloat). Lookups are uint8 as in `INT8-dynamic`. LayerNorm, softmax, GELU, residual Adds, biases and the
products of two activations stay fp32. Where ranges come from: onnx_ranges.py; what else is done: onnx_smooth.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from device.records import SlimpiError
from pipeline.export.onnx_ranges import Range
from pipeline.export.onnx_rewrite import SCALE, ZERO_POINT, Float32, Rewriter

DIVISOR, KEPT_ROWS, KEPT_INDEX = ".divisor", ".kept_rows", ".kept_index"


@dataclass(frozen=True)
class Arithmetic:
    """Types of activations and weights. `bound`: weights are symmetric in -bound...bound; 0 = affine, all codes."""

    activations: type
    weights: type
    bound: int


ARITHMETICS = {
    "U8U8": Arithmetic(np.uint8, np.uint8, 0),
    "S8S8": Arithmetic(np.int8, np.int8, 127),
    # Pairs of products stay below 2^15, so that kernels which add them in int16 (x86 without VNNI) are exact.
    "U8S7": Arithmetic(np.uint8, np.int8, 63),
}


@dataclass(frozen=True)
class Product:
    """y = x @ weight (+ bias), the weight constant; `name` is the weight's. shape: (inputs, outputs)."""

    name: str
    x: str
    y: str
    shape: tuple[int, int]
    transposed: bool

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Treatment:
    """How one product is quantized: the interval its activations' codes cover, after each channel was divided by
    `divisor` (inputs,) and without the channels `kept`, which are multiplied in fp32."""

    interval: Range
    divisor: Float32 | None = None
    kept: tuple[int, ...] = ()


def products(graph: onnx.GraphProto) -> list[Product]:
    """The products with a constant matrix, in the graph's order."""
    shapes = {t.name: tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    found = []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and len(shapes.get(node.input[1], ())) == 2:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            rows, columns = shapes[node.input[1]]
            shape = (columns, rows) if transposed else (rows, columns)
            found.append(Product(node.input[1], node.input[0], node.output[0], shape, transposed))
    return found


def weight_of(graph: onnx.GraphProto, product: Product) -> Float32:
    """(inputs, outputs)."""
    (tensor,) = (t for t in graph.initializer if t.name == product.name)
    weight: Float32 = numpy_helper.to_array(tensor)
    return weight.T if product.transposed else weight


def quantize_weight(
    weight: Float32, arithmetic: Arithmetic, per_channel: bool
) -> tuple[npt.NDArray[np.integer], Float32, npt.NDArray[np.integer]]:
    """Codes like `weight` (inputs, outputs), and scales and zero points, (outputs,) or (): weight ~ (codes - zero) *
    scale. Rounding to nearest (Jacob et al. 2018, eq. 1)."""
    axis = 0 if per_channel else None
    low, high = np.minimum(weight.min(axis=axis), 0.0), np.maximum(weight.max(axis=axis), 0.0)
    if arithmetic.bound:
        scale = np.asarray(np.maximum(-low, high) / arithmetic.bound, np.float32)
        scale = np.where(scale == 0, np.float32(1), scale)
        zero = np.zeros_like(scale)
        limits = -arithmetic.bound, arithmetic.bound
    else:
        scale = np.asarray((high - low) / 255, np.float32)
        scale = np.where(scale == 0, np.float32(1), scale)
        zero = np.rint(-low / scale).clip(0, 255)
        limits = 0, 255
    codes = (np.rint(weight / scale) + zero).clip(*limits)
    return codes.astype(arithmetic.weights), scale, zero.astype(arithmetic.weights)


def activation_codes(interval: Range, kind: type) -> tuple[Float32, npt.NDArray[np.integer]]:
    """Scale and zero point () that cover the interval and zero with 256 codes."""
    least = np.iinfo(kind).min
    low, high = min(interval[0], 0.0), max(interval[1], 0.0)
    scale = np.float32((high - low) / 255 or 1.0)
    zero = int(np.clip(np.rint(-low / scale), 0, 255)) + least
    return np.array(scale, np.float32), np.array(zero, kind)


def quantize_static(
    model: onnx.ModelProto,
    treatments: Mapping[str, Treatment],
    arithmetic: Arithmetic,
    per_channel: bool = True,
    lookups: bool = True,
) -> onnx.ModelProto:
    """A copy of the fp32 `model` with the products {y: Treatment} quantized; the others stay as they are.

    SlimpiError if a weight is used in two ways that exclude each other.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    _Static(quantized.graph, treatments, arithmetic, per_channel, lookups).run()
    onnx.checker.check_model(quantized)
    return quantized


class _Static(Rewriter):
    def __init__(
        self,
        graph: onnx.GraphProto,
        treatments: Mapping[str, Treatment],
        arithmetic: Arithmetic,
        per_channel: bool,
        lookups: bool,
    ) -> None:
        super().__init__(graph)
        self.treatments, self.arithmetic, self.per_channel, self.lookups = treatments, arithmetic, per_channel, lookups
        self.inputs: dict[tuple[object, ...], str] = {}
        self.names: set[str] = {t.name for t in graph.initializer}
        self.replaced: list[onnx.TensorProto] = []

    def run(self) -> None:
        super().run()
        used = {name for node in self.graph.node for name in node.input}
        for tensor in self.replaced:
            if tensor.name not in used:
                self.graph.initializer.remove(tensor)

    def lookup(self, node: onnx.NodeProto) -> None:
        if self.lookups:
            super().lookup(node)
        else:
            self.nodes.append(node)

    def product(self, node: onnx.NodeProto) -> None:
        """y = dequantized(x) @ dequantized(W) [+ kept channels of x @ their rows of W] + bias."""
        y = node.output[0]
        if y not in self.treatments:
            if node.input[1] in self.rewritten:
                raise SlimpiError(f"`{node.input[1]}` is shared and not all its uses are INT8. Use another encoder.")
            self.nodes.append(node)
            return
        treatment = self.treatments[y]
        transposed = self.check_gemm(node)
        x, weight = node.input[0], node.input[1]
        factors = self.activation(x, weight, treatment), self.weight(weight, transposed, treatment)
        biased = len(node.input) > 2
        product = f"{y}.product" if biased or treatment.kept else y
        self.add("MatMul", list(factors), product)
        if treatment.kept:
            self.add("Gather", [x, f"{weight}{KEPT_INDEX}"], f"{y}.kept", axis=-1)
            self.add("MatMul", [f"{y}.kept", f"{weight}{KEPT_ROWS}"], f"{y}.kept_product")
            self.add("Add", [product, f"{y}.kept_product"], f"{y}.sum" if biased else y)
            product = f"{y}.sum"
        if biased:
            self.add("Sub", [product, self.negated(node.input[2])], y)

    def negated(self, bias: str) -> str:
        """Taken off instead of added: MatMul and Add would be fused to a Gemm, for which there is no integer form."""
        name = f"{bias}.negated"
        if name not in self.names:
            (tensor,) = (t for t in self.graph.initializer if t.name == bias)
            self.constant(name, -numpy_helper.to_array(tensor))
            self.replaced.append(tensor)
        return name

    def weight(self, name: str, transposed: bool, treatment: Treatment) -> str:
        """The dequantized weight's name; the weight becomes codes."""
        use = f"product transposed={transposed} {treatment.kept} {_key(treatment.divisor)!r}"
        if self.rewritten.setdefault(name, use) != use:
            raise SlimpiError(f"`{name}` is used both as {use} and {self.rewritten[name]}. Use another encoder.")
        if f"{name}{SCALE}" in self.names:
            return f"{name}.float"
        tensor = self.weights[name]
        w = numpy_helper.to_array(tensor)
        w = np.array(w.T if transposed else w)
        if treatment.kept:
            kept = np.array(treatment.kept, np.int64)
            self.constant(f"{name}{KEPT_INDEX}", kept)
            self.constant(f"{name}{KEPT_ROWS}", w[kept])
            w[kept] = 0
        if treatment.divisor is not None:
            w *= treatment.divisor[:, None]
        codes, scale, zero = quantize_weight(w, self.arithmetic, self.per_channel)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(codes), name))
        self.constant(f"{name}{SCALE}", scale)
        self.constant(f"{name}{ZERO_POINT}", zero)
        axis = {"axis": 1} if self.per_channel else {}
        self.add("DequantizeLinear", [name, f"{name}{SCALE}", f"{name}{ZERO_POINT}"], f"{name}.float", **axis)
        return f"{name}.float"

    def activation(self, x: str, weight: str, treatment: Treatment) -> str:
        """The dequantized activation's name; products that treat it alike share it."""
        key = (x, treatment.interval, _key(treatment.divisor))
        if key in self.inputs:
            return self.inputs[key]
        stem = f"{x}.{len(self.inputs)}"
        source = x
        if treatment.divisor is not None:
            self.constant(f"{weight}{DIVISOR}", 1 / treatment.divisor)
            source = f"{stem}.divided"
            self.add("Mul", [x, f"{weight}{DIVISOR}"], source)
        scale, zero = activation_codes(treatment.interval, self.arithmetic.activations)
        self.constant(f"{stem}{SCALE}", scale)
        self.constant(f"{stem}{ZERO_POINT}", zero)
        settings = [f"{stem}{SCALE}", f"{stem}{ZERO_POINT}"]
        self.add("QuantizeLinear", [source, *settings], f"{stem}.codes")
        self.add("DequantizeLinear", [f"{stem}.codes", *settings], f"{stem}.float")
        self.inputs[key] = f"{stem}.float"
        return self.inputs[key]

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> None:
        self.names.add(name)
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name))


def _key(divisor: Float32 | None) -> bytes:
    return b"" if divisor is None else divisor.tobytes()


def shares(products: Collection[Product], treatments: Mapping[str, Treatment], tables: int) -> tuple[float, float]:
    """Of the weights (tables: those of the lookups, all INT8) and of the activations a token (the inputs of the
    products) the share in INT8; the channels kept count as fp32."""
    n_weights = n_activations = int8_weights = int8_activations = 0
    for product in products:
        inputs, outputs = product.shape
        n_weights, n_activations = n_weights + product.n_weights, n_activations + inputs
        if (treatment := treatments.get(product.y)) is not None:
            whole = inputs - len(treatment.kept)
            int8_weights, int8_activations = int8_weights + whole * outputs, int8_activations + whole
    return (int8_weights + tables) / (n_weights + tables), int8_activations / n_activations
