"""Known sizes in exported encoders: the same logits at every batch and length, and what is not known stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_onnx_one_token import LABELS, feeds, run
from tiny_encoders import MAX_TOKENS, TINY, save_encoder
from tiny_models import TINY as TINY_LANGUAGE
from tiny_models import save_tiny

from pipeline import checkpoint
from pipeline.encoders import load_encoder
from pipeline.export import onnx as export
from pipeline.export.onnx import exported
from pipeline.export.onnx_sizes import dims_of, drop_unread, expand_sizes, fix_sizes, reshape_sizes, symbolic_dims_of
from pipeline.torch_model import in_transformers


def as_written(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    """What the exporter writes."""
    save_encoder(family, folder)
    with monkeypatch.context() as patch:
        for name in ("fix_sizes", "keep_one_token"):
            patch.setattr(export, name, lambda *unused: 0)
        return exported(load_encoder(folder, LABELS, MAX_TOKENS).model)


@pytest.mark.parametrize("family", [*TINY, "xlnet"])
def test_logits_stay_and_sizes_go(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_written(family, tmp_path, monkeypatch)
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    gone = fix_sizes(fixed, dims_of(fixed))
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
    assert fix_sizes(model, dims_of(model)) == 0
    assert model.SerializeToString(deterministic=True) == before


NAMES = ({"b": 2, "t": 3, "b*t": 6}, {"b": 5, "t": 1, "b*t": 5})
"""Two ways in which sizes that depend on the inputs may turn out."""

SIZES = st.lists(st.one_of(st.sampled_from(["b", "t"]), st.integers(1, 6)), min_size=1, max_size=4)


def worth(sizes: list[int | str], names: dict[str, int]) -> list[int]:
    return [names.get(str(size), size) for size in sizes]


@given(SIZES, st.integers(1, 3), st.booleans())
def test_a_reshapes_sizes_hold_for_any_input(before: list[int | str], split: int, join: bool) -> None:
    """The last axis split in two, and the first two joined if they are batch and tokens."""
    after = [*before[:-1], before[-1], split] if isinstance(before[-1], str) else [*before[:-1], split, before[-1]]
    source = [*before[:-1], before[-1] * split] if isinstance(before[-1], int) else [*before, split]
    if join and after[:2] == ["b", "t"]:
        after = ["b*t", *after[2:]]
    sizes = reshape_sizes(source, after)
    assert sizes or sum(isinstance(size, str) for size in after) > 1
    for names in NAMES if sizes else ():
        x = np.zeros(worth(source, names))
        given_ = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
        assert list(x.reshape(given_).shape) == worth(after, names)


@given(SIZES, st.lists(st.integers(1, 4), max_size=2), st.data())
def test_an_expands_sizes_hold_for_any_input(before: list[int | str], ahead: list[int], data: st.DataObject) -> None:
    after = [*ahead, *(data.draw(st.integers(1, 5)) if size == 1 else size for size in before)]
    sizes = expand_sizes(before, after)
    for names in NAMES:
        x = np.zeros(worth(before, names))
        assert list(np.broadcast_shapes(x.shape, tuple(sizes))) == worth(after, names)


def test_sizes_that_depend_on_the_input_are_not_written() -> None:
    assert expand_sizes([1, 4], ["b", 4]) == []
    assert expand_sizes([None, 4], [None, 4]) == []
    assert reshape_sizes(["b*t", 6], ["b", "t", 6]) == []
    assert reshape_sizes([None, "t", 4], [None, "t", 2, 2]) == [0, 0, 2, 2]  # the first two stay, whatever they are
    assert reshape_sizes(["b", "t", 4], [None, 4]) == []


@pytest.mark.parametrize("arch", TINY_LANGUAGE)
def test_language_models_lose_most_of_what_computes_sizes(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the logits stay is test_onnx_language.py's, for every architecture."""
    save_tiny(arch, tmp_path / "hf", torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(export, "fix_sizes", lambda *unused: 0)
        model = exported(in_transformers(checkpoint.load(tmp_path / "hf")), "text-generation-with-past")
    before = Counter(node.op_type for node in model.graph.node)
    fix_sizes(model, symbolic_dims_of(model))
    after = Counter(node.op_type for node in model.graph.node)
    for kind in ("Shape", "ConstantOfShape", "Equal", "Where"):
        assert after[kind] < 0.35 * before[kind], (kind, before[kind], after[kind])
    assert after["MatMul"] == before["MatMul"]


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
