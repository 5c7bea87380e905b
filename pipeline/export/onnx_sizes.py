"""Sizes that an exported graph computes anew for every text or token, though they are known.

Exporters write the sizes of a Reshape or an Expand as operations on the shapes of inputs, dozens a layer, each a call
of its own when the graph runs. A Reshape to (0, 0, ...) keeps the first two axes whatever they are, one size may be
left to it (-1), and an Expand by 1 keeps an axis: what then remains is known when the graph is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

N_FREE = 2
"""Leading axes (batch, tokens) of any size."""

Size = int | str | None
"""Of an axis: a number, a name of one that depends on the inputs (two of a name are equal), or not known."""

Dims = Mapping[str, Sequence[Size]]


def fix_sizes(model: onnx.ModelProto, dims: Dims) -> int:
    """Write known sizes into the graph, in place, and drop what nothing reads any more; how many nodes went.

    dims: of its tensors, by `dims_of` or `symbolic_dims_of`.
    """
    graph = model.graph
    before, known = len(graph.node), constants_of(graph)
    shapes = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Shape" and not node.attribute}
    renamed: dict[str, str] = {}
    for node in graph.node:
        out = dims.get(node.output[0], [])
        first = dims.get(node.input[0], []) if node.input else []
        if node.op_type in ("Reshape", "Expand") and node.input[1] not in known:
            sizes = (reshape_sizes if node.op_type == "Reshape" else expand_sizes)(first, out)
            if sizes:
                node.input[1] = add_constant(graph, f"sizes.{'x'.join(map(str, sizes))}", sizes)
        elif node.op_type in ("Slice", "Gather") and node.input[0] in shapes:
            found = _taken(node, dims.get(shapes[node.input[0]], []), known)
            if found is not None:
                name = f"size.{found}" if isinstance(found, int) else f"sizes.{'x'.join(map(str, found))}"
                renamed[node.output[0]] = add_constant(graph, name, found)
        elif node.op_type == "Slice" and _takes_all(node, first, out, known):
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
    rename_inputs(graph, renamed)
    drop_unread(graph)
    return before - len(graph.node)


def reshape_sizes(before: Sequence[Size], after: Sequence[Size]) -> list[int]:
    """What a Reshape between these is given, [] if that depends on the inputs."""
    if same_behind(before, after):
        return [0] * N_FREE + [size for size in after[N_FREE:] if isinstance(size, int)]
    sizes = []
    for place, size in enumerate(after):
        if size is None:
            return []
        kept = place < len(before) and before[place] == size
        sizes.append(size if isinstance(size, int) else 0 if kept else -1)
    return sizes if sizes.count(-1) <= 1 else []


def expand_sizes(before: Sequence[Size], after: Sequence[Size]) -> list[int]:
    """What an Expand between these is given, [] if that depends on the inputs."""
    same = [1] * (len(after) - len(before)) + list(before)
    sizes = [1 if old == size and size is not None else size for old, size in zip(same, after, strict=True)]
    return [size for size in sizes if isinstance(size, int)] if all(isinstance(size, int) for size in sizes) else []


def dims_of(model: onnx.ModelProto) -> Dims:
    """Dimensions of what has a known rank, as onnx infers them. Without names: exporters give one size several."""
    dims = _read_dims(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    return {name: [size if isinstance(size, int) else None for size in sizes] for name, sizes in dims.items()}


def symbolic_dims_of(model: onnx.ModelProto) -> Dims:
    """As `dims_of`, by ONNX Runtime's inference, which follows sizes through what computes them. For graphs that it is
    tested on: it asserts what it expects of others."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    inference = SymbolicShapeInference(int_max=2**31 - 1, auto_merge=False, guess_output_rank=False, verbose=0)
    # Its infer_shapes leaves a file behind where it ends with a shape that is not known.
    inference._preprocess(model)
    while inference.run_:
        inference._infer_impl()
    return _read_dims(inference.out_mp_.graph)


def _read_dims(graph: onnx.GraphProto) -> Dims:
    dims: dict[str, Sequence[Size]] = {t.name: list(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            dims[value.name] = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
    return dims


Constant = npt.NDArray[Any]


def constants_of(graph: onnx.GraphProto) -> dict[str, Constant]:
    """Initializers and values of Constant nodes."""
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def same_behind(before: Sequence[Size], after: Sequence[Size]) -> bool:
    """Whether a Reshape splits or joins only what comes behind (batch, tokens), as far as sizes are known."""
    ahead = zip(before[:N_FREE], after[:N_FREE], strict=False)
    if any(a != b and a is not None and b is not None for a, b in ahead):
        return False
    tails = [[size for size in dims[N_FREE:] if isinstance(size, int)] for dims in (before, after)]
    whole = all(len(tail) == len(dims) - N_FREE > 0 for tail, dims in zip(tails, (before, after), strict=True))
    return whole and bool(np.prod(tails[0]) == np.prod(tails[1]))


def add_constant(graph: onnx.GraphProto, name: str, value: int | list[int]) -> str:
    """An int64 initializer of that name, made once."""
    if not any(t.name == name for t in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    return name


def rename_inputs(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Let all nodes read new names for the old ones."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)


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


def _taken(node: onnx.NodeProto, dims: Sequence[Size], known: Mapping[str, Constant]) -> int | list[int] | None:
    """The sizes that a Slice, or the one that a Gather, takes of a tensor's shape; None if one of them is not known."""
    places = [known.get(name) for name in node.input[1:]]
    if not dims or any(place is None or place.size != 1 for place in places):
        return None
    numbers = [int(place.reshape(-1)[0]) for place in places if place is not None]
    if node.op_type == "Gather":
        scalar = places[0] is not None and places[0].ndim == 0
        size = dims[numbers[0]] if numbers and -len(dims) <= numbers[0] < len(dims) and scalar else None
        return size if isinstance(size, int) else None
    start, end, *rest = numbers
    taken = dims[start:end]
    whole = rest in ([], [0], [0, 1]) and len(taken) > 0
    sizes = [size for size in taken if isinstance(size, int)]
    return sizes if whole and len(sizes) == len(taken) else None


def _takes_all(
    node: onnx.NodeProto, before: Sequence[Size], after: Sequence[Size], known: Mapping[str, Constant]
) -> bool:
    """Whether a Slice gives what it is given: step by step, as much as there is."""
    steps = known.get(node.input[4]) if len(node.input) > 4 else np.ones(1)
    forward = steps is not None and bool((steps == 1).all())
    return forward and len(before) > 0 and list(before) == list(after) and None not in before
