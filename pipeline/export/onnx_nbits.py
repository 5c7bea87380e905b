"""Encoders with 4 or 8 bits a weight in blocks: ONNX Runtime's MatMulNBits, codes by one of METHODS.

Products whose inner size the block does not divide stay fp32; lookups are uint8 as in `INT8-dynamic`. Activations stay
fp32 (accuracy_level 1), so that host and device compute the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from device.schema import SlimpiError, write_atomic
from pipeline.export.onnx_rewrite import SCALE, ZERO_POINT, Rewriter
from pipeline.formats import FORMATS, Format, QTensor

DOMAIN = "com.microsoft"
_TYPES = tuple(n for n, f in FORMATS.items() if f.ggml_type is None and f.codes is not None and f.codes.pool == 1)


def parse(variant: str) -> tuple[str, Format] | None:
    """METHOD-INT4_G32 taken apart, or None for another kind of name; SlimpiError for a method that is unknown, or that
    needs to know an encoder's activations."""
    from pipeline.methods import METHODS

    method, _, kind = variant.partition("-")
    if kind not in _TYPES:
        return None
    free = [name.upper() for name, entry in METHODS.items() if entry.needs == "nothing"]
    if method not in free:
        raise SlimpiError(
            f"{method!r} in {variant!r} is none of the methods that need no calibration: {', '.join(free)}."
        )
    return method.lower(), FORMATS[kind]


def help_text() -> str:
    return f"METHOD-TYPE with a type among {', '.join(_TYPES)}"


def quantize_blockwise(model: onnx.ModelProto, out: Path, method: str, kind: Format) -> Path:
    """Write the fp32 `model` with its products in blocks to `out`. SlimpiError if no product has whole blocks."""
    rewriter = _Blockwise(model.graph, method, kind)
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


class _Blockwise(Rewriter):
    def __init__(self, graph: onnx.GraphProto, method: str, kind: Format) -> None:
        super().__init__(graph)
        self.method, self.kind, self.n_products = method, kind, 0

    def product(self, node: onnx.NodeProto) -> None:
        """y = x @ W + bias. Weights that stay are used as they are."""
        transposed = self.check_gemm(node)
        x, weight, y = node.input[0], node.input[1], node.output[0]
        columns = self.weights[weight].dims[1 if transposed else 0]
        if weight not in self.rewritten and columns % self.kind.block_size:
            self.nodes.append(node)
            return
        n_rows, columns = self.blocks(weight, transposed)
        inputs = [weight, f"{weight}{SCALE}"]
        assert self.kind.codes is not None
        inputs += [f"{weight}{ZERO_POINT}"] if self.kind.codes.zero_point else []
        biased = len(node.input) > 2
        settings = {
            "K": columns,
            "N": n_rows,
            "bits": self.bits,
            "block_size": self.kind.block_size,
            "accuracy_level": 1,
        }
        product = f"{y}.product" if biased else y
        self.nodes.append(
            helper.make_node("MatMulNBits", [x, *inputs], [product], name=f"{y}/MatMulNBits", domain=DOMAIN, **settings)
        )
        self.n_products += 1
        if biased:
            self.add("Add", [product, node.input[2]], y)

    @property
    def bits(self) -> int:
        assert self.kind.codes is not None
        return (len(self.kind.codes.grid) - 1).bit_length()

    def blocks(self, name: str, transposed: bool) -> tuple[int, int]:
        """Replace the weight by blocks; (outputs, inputs)."""
        import torch

        from pipeline.layers import Layer
        from pipeline.methods import METHODS
        from pipeline.packing import pack_matmul_nbits

        use = f"blocks transposed={transposed}"
        if self.rewritten.setdefault(name, use) != use:
            raise SlimpiError(f"`{name}` is used both as {use} and {self.rewritten[name]}. Use another encoder.")
        if name in self.shapes:
            return self.shapes[name]
        weight = numpy_helper.to_array(self.weights[name])
        w = torch.from_numpy(np.array(weight if transposed else weight.T, order="C"))
        q = METHODS[self.method].run(Layer(0, {name: w}, {}), {}, {name: self.kind}).tensors[name]
        assert isinstance(q, QTensor)
        codes, scales, zeros = pack_matmul_nbits(q)
        self.weights[name].CopyFrom(numpy_helper.from_array(codes, name))
        self.graph.initializer.append(numpy_helper.from_array(scales, f"{name}{SCALE}"))
        if zeros is not None:
            self.graph.initializer.append(numpy_helper.from_array(zeros, f"{name}{ZERO_POINT}"))
        self.shapes[name] = (w.shape[0], w.shape[1])
        return self.shapes[name]
