"""The last layer of an encoder for the one token that its head reads.

BERT's and its relatives' classifiers read the first token's last state. The other tokens' queries, attention outputs
and MLP in the last layer are computed for nobody: a seventh of MiniLM-L6's work. transformers computes them, and so
does what is exported from it; leaving them out changes no result.

A tensor is read at one token if all that read it want only that token, along one axis. From the head's Gather this is
followed towards the input through operations that keep tokens apart; a tensor that others want whole (the states that
keys and values come from, the mask, the positions' bias) is cut where it is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import onnx
from onnx import helper

from pipeline.export.onnx_sizes import (
    Dims,
    add_constant,
    constants_of,
    dims_of,
    drop_unread,
    reshape_sizes,
    same_behind,
)

ELEMENTWISE = frozenset(
    {"Add", "Cast", "Div", "Erf", "Identity", "Mul", "Pow", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh", "Where"}
)
TOKEN_AXIS = 1
"""Of states (batch, tokens, hidden)."""

Input = tuple[int, int]
"""(index of a node, index of its input)."""


def keep_one_token(model: onnx.ModelProto) -> int:
    """Compute only what the head's token needs, in place; how many matrix products do less than before.

    0 where the head reads all tokens or the graph has another form: then nothing is changed.
    """
    graph = model.graph
    found = _Reading(graph, dims_of(model))
    heads = found.heads()
    if len({token for _, token in heads}) != 1 or len({graph.node[node].input[0] for node, _ in heads}) != 1:
        return 0
    thin = found.follow([node for node, _ in heads])
    products = sum(node.op_type == "MatMul" and node.output[0] in thin for node in graph.node)
    if products:
        _cut(graph, found, thin, [node for node, _ in heads], heads[0][1])
        onnx.checker.check_model(model)
    return products


class _Reading:
    """Who reads what of a graph, and along which axis of a tensor its tokens lie."""

    def __init__(self, graph: onnx.GraphProto, dims: Dims) -> None:
        self.graph, self.dims = graph, dims
        self.readers: dict[str, list[Input]] = defaultdict(list)
        for index, node in enumerate(graph.node):
            for place, name in enumerate(node.input):
                self.readers[name].append((index, place))
        self.outputs = {value.name for value in graph.output}
        self.constants = constants_of(graph)
        self.wanted: dict[Input, int] = {}
        self.thin: dict[str, int] = {}

    def heads(self) -> list[tuple[int, int]]:
        """(node, token) of the Gathers that take one constant token of (batch, tokens, hidden) states."""
        found = []
        for index, node in enumerate(self.graph.node):
            if node.op_type != "Gather" or len(self.dims.get(node.input[0], [])) != 3:
                continue
            token = self.constants.get(node.input[1])
            if _attribute(node, "axis", 0) == TOKEN_AXIS and token is not None and token.size == 1:
                found.append((index, int(token.reshape(-1)[0])))
        return found

    def follow(self, heads: list[int]) -> dict[str, int]:
        """{tensor: the axis of its tokens} of what is read at one token only. `wanted`: the axis along which each
        such read cuts what it reads, where that is read whole elsewhere."""
        for node in heads:
            self.wanted[node, 0] = TOKEN_AXIS
        for index in range(len(self.graph.node) - 1, -1, -1):
            node = self.graph.node[index]
            if len(node.output) != 1 or (axis := self._only_axis(node.output[0])) is None:
                continue
            inputs = dict(self._inputs(node, axis))
            if inputs:
                self.thin[node.output[0]] = axis
                self.wanted |= {(index, place): at for place, at in inputs.items()}
        return self.thin

    def _only_axis(self, name: str) -> int | None:
        """The axis along which all that read the tensor want one token, None if any wants more."""
        if name in self.outputs or not self.readers[name]:
            return None
        axes = {self.wanted.get(reader) for reader in self.readers[name]}
        return axes.pop() if len(axes) == 1 else None

    def _inputs(self, node: onnx.NodeProto, axis: int) -> Iterator[tuple[int, int]]:
        """(input, the axis of its tokens) where one token of the output needs one token of the input; nothing for an
        operation that mixes tokens or is not known."""
        dims = [self.dims.get(name) for name in node.input]
        out = self.dims.get(node.output[0])
        if out is None or dims[0] is None:
            return
        if node.op_type in ELEMENTWISE:
            if all(d is not None for d in dims):
                for place, d in enumerate(d for d in dims if d is not None):
                    at = axis - (len(out) - len(d))
                    if at >= 0 and d[at] != 1:
                        yield place, at
        elif node.op_type in ("Softmax", "LayerNormalization"):
            if _attribute(node, "axis", -1) % len(out) > axis:
                yield 0, axis
        elif node.op_type == "MatMul":
            if axis == len(out) - 2 and len(dims[0]) >= 2:
                yield 0, len(dims[0]) - 2
        elif node.op_type == "Transpose":
            yield 0, list(next(a.ints for a in node.attribute if a.name == "perm"))[axis]
        elif node.op_type == "Reshape" and axis == TOKEN_AXIS and same_behind(dims[0], out):
            yield 0, axis


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _cut(graph: onnx.GraphProto, found: _Reading, thin: dict[str, int], heads: list[int], token: int) -> None:
    """Put a Gather of the token before each input that is read at it and is not thin itself."""
    index, zero = (add_constant(graph, f"one_token.{name}", value) for name, value in (("index", [token]), ("zero", 0)))
    nodes: list[onnx.NodeProto] = []
    made: dict[tuple[str, int], str] = {}
    for number, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            axis = found.wanted.get((number, place))
            if axis is None or name in thin or number in heads:
                continue
            if (name, axis) not in made:
                made[name, axis] = f"{name}.token.{axis}"
                nodes.append(helper.make_node("Gather", [name, index], [made[name, axis]], axis=axis))
            node.input[place] = made[name, axis]
        if number in heads and node.input[0] in thin:
            node.input[1] = zero
        if node.op_type == "Reshape" and node.output[0] in thin:
            # The sizes it is given name all tokens: (batch, 1, what was behind).
            before, after = (found.dims[name] for name in (node.input[0], node.output[0]))
            behind = reshape_sizes(before, after)[TOKEN_AXIS + 1 :]
            node.input[1] = add_constant(graph, f"sizes.0x1x{'x'.join(map(str, behind))}", [0, 1, *behind])
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    drop_unread(graph)
