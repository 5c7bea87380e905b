"""Known sizes in exported encoders: the same logits at every batch and length, and what is not known stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_onnx_one_token import LABELS, feeds, run
from tiny_encoders import MAX_TOKENS, TINY, save_encoder

from pipeline.encoders import load_encoder
from pipeline.export import onnx as export
from pipeline.export.onnx import exported
from pipeline.export.onnx_sizes import drop_unread, fix_sizes


def as_written(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    """What the exporter writes."""
    save_encoder(family, folder)
    with monkeypatch.context() as patch:
        for name in ("fix_sizes", "keep_one_token"):
            patch.setattr(export, name, lambda model: 0)
        return exported(load_encoder(folder, LABELS, MAX_TOKENS).model)


@pytest.mark.parametrize("family", [*TINY, "xlnet"])
def test_logits_stay_and_sizes_go(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_written(family, tmp_path, monkeypatch)
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    gone = fix_sizes(fixed)
    assert gone == len(model.graph.node) - len(fixed.graph.node)
    onnx.checker.check_model(fixed)
    for batch, length in ((1, 3), (1, MAX_TOKENS), (4, 17)):
        feed = feeds(model, batch, length)
        np.testing.assert_allclose(run(fixed, feed)[0], run(model, feed)[0], atol=2e-5)
    if family != "xlnet":  # whose axes stand in another order
        assert gone > 40
        constant = {tensor.name for tensor in fixed.graph.initializer}
        reshapes = [node for node in fixed.graph.node if node.op_type == "Reshape"]
        assert sum(node.input[1] in constant for node in reshapes) == 8  # of two layers: queries, keys, values, heads


def graph_of(nodes: list[onnx.NodeProto], sizes: list[int], dims: list[int | str], out: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, dims)],
        [value("y", TensorProto.FLOAT, ["?"] * out)],
        [numpy_helper.from_array(np.array(sizes, np.int64), "sizes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [
        (["batch", "tokens", 6], [-1, 6]),  # two axes: (batch * tokens, 6)
        (["batch", "tokens", 6], [-1, 2, 3]),  # batch and tokens joined
        (["batch", 2, "tokens", 3], [0, 0, -1]),  # the tokens lie behind
    ],
)
def test_other_reshapes_are_left_alone(dims: list[int | str], sizes: list[int]) -> None:
    model = graph_of([helper.make_node("Reshape", ["x", "sizes"], ["y"])], sizes, dims, len(sizes))
    before = model.SerializeToString(deterministic=True)
    assert fix_sizes(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_only_what_leads_to_an_output_stays() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["unread"]),
        helper.make_node("Neg", ["a"], ["y"]),
    ]
    model = graph_of(nodes, [1], ["n", 2], 2)
    drop_unread(model.graph)
    assert [node.output[0] for node in model.graph.node] == ["a", "y"]
    assert not model.graph.initializer
