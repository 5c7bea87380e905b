"""Models with 4 or 8 bits a weight in blocks: ONNX Runtime's MatMulNBits, codes by one of METHODS.

Products whose inner size the block does not divide stay fp32; lookups are uint8 as in `INT8-dynamic`. Activations stay
fp32 (accuracy_level 1), so that host and device compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from device.schema import SlimpiError, write_atomic
from pipeline.export.onnx_rewrite import SCALE, ZERO_POINT, Rewriter
from pipeline.formats import FORMATS, Format, QTensor
from pipeline.layers import Layer
from pipeline.packing import pack_matmul_nbits

DOMAIN = "com.microsoft"
TYPES = tuple(n for n, f in FORMATS.items() if f.ggml_type is None and f.codes is not None and f.codes.pool == 1)


def parse(variant: str) -> tuple[str, Format] | None:
    """METHOD-INT4_G32 taken apart, or None for another kind of name; SlimpiError for a method that is unknown, or that
    needs to know an encoder's activations."""
    from pipeline.methods import METHODS

    method, _, kind = variant.partition("-")
    if kind not in TYPES:
        return None
    free = [name.upper() for name, entry in METHODS.items() if entry.needs == "nothing"]
    if method not in free:
        raise SlimpiError(
            f"{method!r} in {variant!r} is none of the methods that need no calibration: {', '.join(free)}."
        )
    return method.lower(), FORMATS[kind]


def help_text() -> str:
    return f"METHOD-TYPE with a type among {', '.join(TYPES)}"


def quantize_blockwise(model: onnx.ModelProto, out: Path, method: str, kind: Format) -> Path:
    """Write the fp32 `model` with its products in blocks to `out`. SlimpiError if no product has whole blocks."""
    rewriter = Blockwise(model.graph, _by_method(method, kind))
    rewriter.run()
    if not rewriter.n_products:
        raise SlimpiError(
            f"no matrix of this encoder has rows of whole blocks of {kind.block_size}. Take smaller blocks."
        )
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(model)
    write_atomic(out, model.SerializeToString())
    return out


Choose = Callable[[str, torch.Tensor], QTensor | None]
"""(name, weights (outputs, inputs)) -> their codes, or None to leave them in fp32."""


def _by_method(method: str, kind: Format) -> Choose:
    from pipeline.methods import METHODS

    def choose(name: str, w: torch.Tensor) -> QTensor | None:
        if w.shape[1] % kind.block_size:
            return None
        q = METHODS[method].run(Layer(0, {name: w}, {}), {}, {name: kind}).tensors[name]
        assert isinstance(q, QTensor)
        return q

    return choose


class Blockwise(Rewriter):
    """Products as MatMulNBits, lookups in 8 bits."""

    def __init__(self, graph: onnx.GraphProto, choose: Choose) -> None:
        super().__init__(graph)
        self.choose, self.n_products = choose, 0
        self.settings: dict[str, dict[str, int]] = {}
        self.has_zeros: dict[str, bool] = {}
        self.left: set[str] = set()

    def product(self, node: onnx.NodeProto) -> None:
        """y = x @ W + bias. Weights that stay are used as they are."""
        transposed = self.check_gemm(node)
        x, weight, y = node.input[0], node.input[1], node.output[0]
        if not self.blocks(weight, transposed):
            self.nodes.append(node)
            return
        inputs = [weight, f"{weight}{SCALE}"]
        inputs += [f"{weight}{ZERO_POINT}"] if self.has_zeros[weight] else []
        biased = len(node.input) > 2
        product = f"{y}.product" if biased else y
        settings = self.settings[weight]
        self.nodes.append(
            helper.make_node("MatMulNBits", [x, *inputs], [product], name=f"{y}/MatMulNBits", domain=DOMAIN, **settings)
        )
        self.n_products += 1
        if biased:
            self.add("Add", [product, node.input[2]], y)

    def blocks(self, name: str, transposed: bool) -> bool:
        """Replace the weight by blocks, once; False if it stays."""
        use = f"blocks transposed={transposed}"
        if name in self.left:
            return False
        if self.rewritten.get(name, use) != use:
            raise SlimpiError(f"`{name}` is used both as {use} and {self.rewritten[name]}. Use another model.")
        if name in self.settings:
            return True
        weight = numpy_helper.to_array(self.weights[name])
        q = self.choose(name, torch.from_numpy(np.array(weight if transposed else weight.T, order="C")))
        if q is None:
            self.left.add(name)
            return False
        self.rewritten[name] = use
        codes, scales, zeros = pack_matmul_nbits(q)
        self.weights[name].CopyFrom(numpy_helper.from_array(codes, name))
        self.graph.initializer.append(numpy_helper.from_array(scales, f"{name}{SCALE}"))
        if zeros is not None:
            self.graph.initializer.append(numpy_helper.from_array(zeros, f"{name}{ZERO_POINT}"))
        self.has_zeros[name] = zeros is not None
        kind = q.format
        assert kind.codes is not None
        self.settings[name] = {
            "K": q.shape[1],
            "N": q.shape[0],
            "bits": (len(kind.codes.grid) - 1).bit_length(),
            "block_size": kind.block_size,
            "accuracy_level": 1,
        }
        return True
