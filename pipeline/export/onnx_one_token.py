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

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ELEMENTWISE = frozenset(
    {"Add", "Cast", "Div", "Erf", "Identity", "Mul", "Pow", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh", "Where"}
)
SIZES = frozenset({"Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze"})
"""Operations that put sizes together."""

TOKEN_AXIS = 1
"""Of states (batch, tokens, hidden)."""

Input = tuple[int, int]
"""(index of a node, index of its input)."""


def keep_one_token(model: onnx.ModelProto) -> int:
    """Compute only what the head's token needs, in place; how many matrix products do less than before.

    0 where the head reads all tokens or the graph has another form: then nothing is changed.
    """
    graph = model.graph
    found = _Reading(graph, _dims(model))
    heads = found.heads()
    if len({token for _, token in heads}) != 1 or len({graph.node[node].input[0] for node, _ in heads}) != 1:
        return 0
    thin = found.follow([node for node, _ in heads])
    products = sum(node.op_type == "MatMul" and node.output[0] in thin for node in graph.node)
    if products:
        _cut(graph, found, thin, [node for node, _ in heads], heads[0][1])
        onnx.checker.check_model(model)
    return products


def _dims(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Dimensions of what has a known rank; -1 where a dimension is not known."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    dims = {t.name: list(t.dims) for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            dims[value.name] = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
    return dims


class _Reading:
    """Who reads what of a graph, and along which axis of a tensor its tokens lie."""

    def __init__(self, graph: onnx.GraphProto, dims: dict[str, list[int]]) -> None:
        self.graph, self.dims = graph, dims
        self.readers: dict[str, list[Input]] = defaultdict(list)
        for index, node in enumerate(graph.node):
            for place, name in enumerate(node.input):
                self.readers[name].append((index, place))
        self.outputs = {value.name for value in graph.output}
        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
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
        axes = {self.wanted.get(reader) for reader in self.readers[name] if not self._asks_size(reader)}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is None or any(not self._spares(reader, name, axis) for reader in self.readers[name]):
            return None
        return axis

    def _asks_size(self, reader: Input) -> bool:
        return self.graph.node[reader[0]].op_type == "Shape"

    def _spares(self, reader: Input, name: str, axis: int) -> bool:
        """Whether a Shape, if it is one that reads, tells the number of tokens to nobody but Reshapes that are cut."""
        if not self._asks_size(reader):
            return True
        rank = len(self.dims.get(name, []))
        sizes = self.graph.node[reader[0]].output[0]
        return rank > 0 and all(
            self._other_sizes(index, axis, rank) or self._for_a_reshape(index, place)
            for index, place in self.readers[sizes]
        )

    def _other_sizes(self, index: int, axis: int, rank: int) -> bool:
        """Whether a node takes sizes without that of the tokens from a Shape's output."""
        node = self.graph.node[index]
        bounds = [self.constants.get(name) for name in node.input[1:3]]
        if node.op_type != "Slice" or len(node.input) != 3 or any(b is None or b.size != 1 for b in bounds):
            return False
        start, end = (int(b.reshape(-1)[0]) for b in bounds if b is not None)
        return axis not in range(rank)[start:end]

    def _for_a_reshape(self, index: int, place: int) -> bool:
        """Whether a size, or what is put together from it, ends as what a Reshape of one token is given."""
        node = self.graph.node[index]
        if node.op_type == "Reshape":
            return place == 1 and node.output[0] in self.thin
        if node.op_type not in SIZES or not self.readers[node.output[0]]:
            return False
        return all(self._for_a_reshape(*reader) for reader in self.readers[node.output[0]])

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
        elif node.op_type == "Reshape" and axis == TOKEN_AXIS and _same_behind(dims[0], out):
            yield 0, axis


def _same_behind(before: list[int], after: list[int]) -> bool:
    """Whether a Reshape splits or joins only what comes behind (batch, tokens)."""
    tails = [dims[TOKEN_AXIS + 1 :] for dims in (before, after)]
    return all(tail and min(tail) > 0 for tail in tails) and np.prod(tails[0]) == np.prod(tails[1])


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _cut(graph: onnx.GraphProto, found: _Reading, thin: dict[str, int], heads: list[int], token: int) -> None:
    """Put a Gather of the token before each input that is read at it and is not thin itself."""
    index = _Names(graph, token)
    nodes: list[onnx.NodeProto] = []
    made: dict[tuple[str, int], str] = {}
    for number, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            axis = found.wanted.get((number, place))
            if axis is None or name in thin or number in heads:
                continue
            if (name, axis) not in made:
                made[name, axis] = f"{name}.token.{axis}"
                nodes.append(helper.make_node("Gather", [name, index.token], [made[name, axis]], axis=axis))
            node.input[place] = made[name, axis]
        if number in heads and node.input[0] in thin:
            node.input[1] = index.zero
        if node.op_type == "Reshape" and node.output[0] in thin:
            # The sizes it is given name all tokens: (batch, 1, what was behind).
            behind = found.dims[node.output[0]][TOKEN_AXIS + 1 :]
            node.input[1] = index.sizes((0, 1, *behind))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    read = {name for node in graph.node for name in node.input}
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)


class _Names:
    """Initializers that cuts need: each made once."""

    def __init__(self, graph: onnx.GraphProto, token: int) -> None:
        self.graph = graph
        self.token = self._make("one_token.index", [token])
        self.zero = self._make("one_token.zero", 0)

    def sizes(self, sizes: tuple[int, ...]) -> str:
        name = f"one_token.sizes.{'x'.join(map(str, sizes))}"
        return name if any(t.name == name for t in self.graph.initializer) else self._make(name, list(sizes))

    def _make(self, name: str, value: int | list[int]) -> str:
        tensor = numpy_helper.from_array(np.array(value, np.int64), name)
        assert tensor.data_type == TensorProto.INT64
        self.graph.initializer.append(tensor)
        return name
