"""Sizes that an exported encoder computes anew for every text, though they are known.

Exporters write a Reshape's sizes as operations on the input's shape, a dozen a layer, each a call of its own when the
graph runs. Of (batch, tokens, ...) a Reshape to (0, 0, ...) keeps the first two, whatever they are; what lies behind is
known when the graph is written, and so are sizes that a Slice takes of a Shape.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

N_FREE = 2
"""Leading axes (batch, tokens) of any size."""


def fix_sizes(model: onnx.ModelProto) -> int:
    """Write known sizes into the graph, in place, and drop what nothing reads any more; how many nodes went."""
    graph = model.graph
    before, dims, known = len(graph.node), dims_of(model), constants_of(graph)
    shapes = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Shape" and not node.attribute}
    for node in graph.node:
        if node.op_type == "Reshape" and same_behind(dims.get(node.input[0], []), dims.get(node.output[0], [])):
            behind = dims[node.output[0]][N_FREE:]
            node.input[1] = add_constant(graph, f"sizes.0x0x{'x'.join(map(str, behind))}", [0] * N_FREE + behind)
        elif node.op_type == "Slice" and node.input[0] in shapes:
            sizes = _sliced(node, dims.get(shapes[node.input[0]], []), known)
            if sizes:
                name = add_constant(graph, f"sizes.{'x'.join(map(str, sizes))}", sizes)
                _replace(graph, node.output[0], name)
    drop_unread(graph)
    return before - len(graph.node)


def dims_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Dimensions of what has a known rank; -1 where a dimension is not known."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    dims = {t.name: list(t.dims) for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            dims[value.name] = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
    return dims


def constants_of(graph: onnx.GraphProto) -> dict[str, npt.NDArray[np.generic]]:
    """Initializers and values of Constant nodes."""
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def same_behind(before: list[int], after: list[int]) -> bool:
    """Whether a Reshape splits or joins only what comes behind (batch, tokens)."""
    tails = [dims[N_FREE:] for dims in (before, after)]
    return all(tail and min(tail) > 0 for tail in tails) and bool(np.prod(tails[0]) == np.prod(tails[1]))


def add_constant(graph: onnx.GraphProto, name: str, value: int | list[int]) -> str:
    """An int64 initializer of that name, made once."""
    if not any(t.name == name for t in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    return name


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that lead to no output."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in read for name in node.output):
            read.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _sliced(node: onnx.NodeProto, dims: list[int], known: dict[str, npt.NDArray[np.generic]]) -> list[int]:
    """The sizes that a Slice takes of a tensor's shape, [] if one of them is not known."""
    bounds = [known.get(name) for name in node.input[1:]]
    if len(bounds) != 2 or any(bound is None or bound.size != 1 for bound in bounds):
        return []
    start, end = (int(bound.reshape(-1)[0]) for bound in bounds if bound is not None)
    sizes = dims[start:end]
    return sizes if sizes and min(sizes) > 0 else []


def _replace(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
