"""Models with 4 or 8 bits a weight in blocks: ONNX Runtime's MatMulNBits, codes by one of METHODS.

Products of 8 bits are written as two of 4 (`pack_in_nibbles`).

Products whose inner size the block does not divide stay fp32; lookups are uint8 as in `INT8-dynamic`. Activations stay
fp32 (accuracy_level 1), so that host and device compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper

from device.records import SlimpiError, write_atomic
from pipeline.export.onnx_rewrite import LOW, SCALE, ZERO_POINT, Rewriter
from pipeline.formats import FORMATS, Format, QTensor
from pipeline.layers import Layer
from pipeline.packing import Nibbles, pack_in_nibbles, pack_matmul_nbits

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
        self.parts: dict[str, list[tuple[str, int, bool]]] = {}
        self.left: set[str] = set()
        self.multiplied: set[str] = set()

    def product(self, node: onnx.NodeProto) -> None:
        """y = x @ W + bias. Weights that stay are used as they are."""
        transposed = self.check_gemm(node)
        x, weight, y = node.input[0], node.input[1], node.output[0]
        if not self.blocks(weight, transposed):
            self.nodes.append(node)
            return
        biased = len(node.input) > 2
        terms = [self.part(x, weight, y, *part) for part in self.parts[weight]]
        if biased:
            terms.append(node.input[2])
        if len(terms) == 1:
            self.nodes[-1].output[0] = y
        while len(terms) > 1:
            first, second, *rest = terms
            terms = [f"{y}.sum" if rest else y, *rest]
            self.add("Add", [first, second], terms[0])
        self.n_products += 1

    def part(self, x: str, weight: str, y: str, suffix: str, factor: int, zeros: bool) -> str:
        """The product with one of the weight's parts."""
        if factor != 1:
            x = self.multiple(x, factor)
        inputs = [x, f"{weight}{suffix}", f"{weight}{SCALE}"]
        inputs += [f"{weight}{suffix}{ZERO_POINT}"] if zeros else []
        out = f"{y}.product{suffix}"
        name = f"{y}{suffix}/MatMulNBits"
        self.nodes.append(
            helper.make_node("MatMulNBits", inputs, [out], name=name, domain=DOMAIN, **self.settings[weight])
        )
        return out

    def multiple(self, x: str, factor: int) -> str:
        """x times a number, once for all products that read it."""
        name, number = f"{x}.times{factor}", f"times{factor}"
        if name not in self.multiplied:
            if number not in self.multiplied:
                self.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), number))
            self.multiplied |= {name, number}
            self.add("Mul", [x, number], name)
        return name

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
        kind = q.format
        assert kind.codes is not None
        bits = (len(kind.codes.grid) - 1).bit_length()
        parts: list[tuple[str, Nibbles]]
        if bits == 8:
            (high, low), scales = pack_in_nibbles(q)
            parts = [("", high), (LOW, low)]
        else:
            codes, scales, zeros = pack_matmul_nbits(q)
            parts = [("", Nibbles(1, codes, zeros))]
        self.weights[name].CopyFrom(numpy_helper.from_array(parts[0][1].data, name))
        self.keep(f"{name}{SCALE}", scales)
        for suffix, part in parts:
            if suffix:
                self.keep(f"{name}{suffix}", part.data)
            if part.zeros is not None:
                self.keep(f"{name}{suffix}{ZERO_POINT}", part.zeros)
        self.parts[name] = [(suffix, part.factor, part.zeros is not None) for suffix, part in parts]
        self.settings[name] = {
            "K": q.shape[1],
            "N": q.shape[0],
            "bits": 4,
            "block_size": kind.block_size,
            "accuracy_level": 1,
        }
        return True

    def keep(self, name: str, value: npt.NDArray[Any]) -> None:
        self.graph.initializer.append(numpy_helper.from_array(value, name))
