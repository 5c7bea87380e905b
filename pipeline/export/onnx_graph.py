"""Writing ONNX graphs of classifiers node by node, from arrays: inputs as device/words.py makes them.

A part of an ensemble keeps its own vocabulary, keywords and numbers; the graph's inputs have those of all parts, and a
part's are found in them by a lookup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.compose
from onnx import TensorProto, helper, numpy_helper

from device.words import UNKNOWN, WordSpec, plain_keyword

OPSET = 18
IR_VERSION = 10

_INPUTS: dict[str, tuple[int, list[str]]] = {
    "word_ids": (TensorProto.INT64, ["texts", "words"]),
    "keyword_ids": (TensorProto.INT64, ["texts"]),
    "term_ids": (TensorProto.INT64, ["texts", "terms"]),
    "term_counts": (TensorProto.FLOAT, ["texts", "terms"]),
    "input_ids": (TensorProto.INT64, ["texts", "tokens"]),
    "attention_mask": (TensorProto.INT64, ["texts", "tokens"]),
    "token_type_ids": (TensorProto.INT64, ["texts", "tokens"]),
}
_OWN_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Output:
    """A float32 tensor of a graph that becomes an output, and names or sizes of its axes."""

    tensor: str
    dims: tuple[str | int, ...]


class Graph:
    """Nodes, constants and inputs of a model under construction. `spec`: what words.json beside it will say."""

    def __init__(self, spec: WordSpec | None = None) -> None:
        self.spec = spec
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.prefix = ""

    def add(self, op: str, inputs: Sequence[str], n_outputs: int = 1, **attributes: Any) -> str:
        """Append a node; the name of its first output (the others are that name and .1, .2 ...)."""
        name = f"{self.prefix}{op}.{len(self.nodes)}"
        outputs = [name, *(f"{name}.{i}" for i in range(1, n_outputs))]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return name

    def weight(self, value: npt.ArrayLike, name: str) -> str:
        """A parameter, an initializer of that name. float64 becomes float32."""
        key = f"{self.prefix}{name}"
        self.weights[key] = numpy_helper.from_array(_plain(value), key)
        return key

    def constant(self, value: npt.ArrayLike) -> str:
        """A number or an array of the computation itself, no parameter."""
        return self.add("Constant", [], value=numpy_helper.from_array(_plain(value)))

    def linear(self, x: str, layer: Any, name: str) -> str:
        """x W^T + b of a torch.nn.Linear."""
        product = self.add("MatMul", [x, self.weight(_array(layer.weight).T, f"{name}.weight")])
        return self.add("Add", [product, self.weight(_array(layer.bias), f"{name}.bias")])

    def input(self, name: str) -> str:
        if name not in self.inputs:
            kind, dims = _INPUTS[name]
            self.inputs[name] = helper.make_tensor_value_info(name, kind, dims)
        return name

    # Inputs in a part's own terms.

    def ids(self, name: str, vocabulary: Sequence[str], unknown: int = UNKNOWN) -> str:
        """word_ids or term_ids (n, length) as rows of `vocabulary`; what it lacks becomes `unknown`, padding stays."""
        assert self.spec is not None
        if list(vocabulary) == self.spec.vocabulary:
            return self.input(name)
        own = {word: i for i, word in enumerate(vocabulary) if i > UNKNOWN}
        rows = [0, unknown] + [own.get(word, unknown) for word in self.spec.vocabulary[2:]]
        return self.add("Gather", [self.constant(np.array(rows, np.int64)), self.input(name)], axis=0)

    def keyword_ids(self, keywords: Sequence[str]) -> str:
        assert self.spec is not None
        if tuple(keywords) == self.spec.keywords:
            return self.input("keyword_ids")
        own = {plain_keyword(word): i for i, word in enumerate(keywords, start=1)}
        rows = [0] + [own.get(plain_keyword(word), 0) for word in self.spec.keywords]
        return self.add("Gather", [self.constant(np.array(rows, np.int64)), self.input("keyword_ids")], axis=0)

    def numbers(self, names: Sequence[str]) -> str:
        """(n, len(names)) float32."""
        assert self.spec is not None
        known = self.spec.numbers
        self.inputs["numbers"] = helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["texts", len(known)])
        if tuple(names) == known:
            return "numbers"
        columns = np.array([known.index(name) for name in names], np.int64)
        return self.add("Gather", ["numbers", self.constant(columns)], axis=1)

    def token_mean(self, states: str) -> str:
        """The mean (n, d) of states (n, tokens, d) over each text's own tokens."""
        axis = self.constant(np.array([1], np.int64))
        mask = self.add("Cast", [self.input("attention_mask")], to=TensorProto.FLOAT)
        column = self.add("Unsqueeze", [mask, self.constant(np.array([2], np.int64))])
        total = self.add("ReduceSum", [self.add("Mul", [states, column]), axis], keepdims=0)
        return self.add("Div", [total, self.add("ReduceSum", [mask, axis], keepdims=1)])

    # Whole models.

    def embed(self, model: onnx.ModelProto, output: str, prefix: str) -> str:
        """Append another model's nodes and constants under a prefix; the new name of its output."""
        rename = {"rename_inputs": False, "rename_outputs": True}
        inner = onnx.compose.add_prefix(model, prefix, **rename)
        for value in inner.graph.input:
            self.input(value.name)
        self.nodes.extend(inner.graph.node)
        self.weights |= {tensor.name: tensor for tensor in inner.graph.initializer}
        return f"{prefix}{output}"

    def finish(self, logits: str, others: Mapping[str, Output] = MappingProxyType({})) -> onnx.ModelProto:
        """The checked model: `logits` (texts, labels) float32 under that name, and other outputs beside it."""
        outputs = {"logits": Output(logits, ("texts", 2)), **others}
        nodes = [helper.make_node("Identity", [output.tensor], [name], name=name) for name, output in outputs.items()]
        graph = helper.make_graph(
            [*self.nodes, *nodes],
            "classifier",
            list(self.inputs.values()),
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, o.dims) for name, o in outputs.items()],
            list(self.weights.values()),
        )
        domains = [helper.make_opsetid("", OPSET)]
        if any(node.domain == _OWN_DOMAIN for node in nodes):
            domains.append(helper.make_opsetid(_OWN_DOMAIN, 1))
        model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="slimpi")
        onnx.checker.check_model(model)
        return model


def _plain(value: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(value)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array) if array.ndim else array


def _array(parameter: Any) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = parameter.detach().cpu().numpy()
    return array


# ONNX keeps an LSTM's gates as input, output, forget, cell; torch as input, forget, cell, output.
_GATES = (0, 3, 1, 2)


def _gates(parameter: Any) -> npt.NDArray[np.float32]:
    parts = np.split(_array(parameter), 4, axis=0)
    return np.concatenate([parts[i] for i in _GATES], axis=0)


def lstm(graph: Graph, x: str, lengths: str, layer: Any, name: str) -> tuple[str, str]:
    """A one-layer torch.nn.LSTM over x (words, n, features), each sequence to its own length (n,) int32.

    Returns the names of (all states (words, n, directions * hidden), last states (n, directions * hidden)). The
    backward direction's last state is the one at the first word.
    """
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    w, r, b = (
        np.stack([f(suffix) for suffix in suffixes])
        for f in (
            lambda s: _gates(getattr(layer, f"weight_ih_l0{s}")),
            lambda s: _gates(getattr(layer, f"weight_hh_l0{s}")),
            lambda s: np.concatenate([_gates(getattr(layer, f"bias_{part}_l0{s}")) for part in ("ih", "hh")]),
        )
    )
    inputs = [
        x,
        graph.weight(w, f"{name}.weight_ih"),
        graph.weight(r, f"{name}.weight_hh"),
        graph.weight(b, f"{name}.bias"),
        lengths,
    ]
    direction = "bidirectional" if layer.bidirectional else "forward"
    states = graph.add("LSTM", inputs, n_outputs=2, hidden_size=layer.hidden_size, direction=direction)
    size = len(suffixes) * layer.hidden_size
    flat = graph.add("Transpose", [states], perm=[0, 2, 1, 3])
    everything = graph.add("Reshape", [flat, graph.constant(np.array([0, 0, size], np.int64))])
    last = graph.add("Transpose", [f"{states}.1"], perm=[1, 0, 2])
    return everything, graph.add("Reshape", [last, graph.constant(np.array([0, size], np.int64))])
