"""XLNet for ONNX: what optimum lacks to export it, and its attention's three-axis weights as plain matrices.

XLNet writes its projections as Einsums with weights (hidden, heads, head size); as MatMuls with matrices they are what
every other encoder has, for quantizers and runtimes alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_SPLITS, _JOINS = "ibh,hnd->ibnd", "ibnd,hnd->ibh"


def export_configs(config: Any, task: str) -> dict[str, Any]:
    """optimum's custom_onnx_configs for an XLNet classifier; its memory of earlier segments is switched off."""
    from optimum.exporters.onnx.model_configs import BertOnnxConfig
    from optimum.utils.normalized_config import NormalizedTextConfig

    class XLNetOnnxConfig(BertOnnxConfig):
        NORMALIZED_CONFIG_CLASS = NormalizedTextConfig.with_args(
            num_layers="n_layer", num_attention_heads="n_head", hidden_size="d_model"
        )

    config.use_mems_eval = False
    return {"model": XLNetOnnxConfig(config, task=task)}


def plain_products(graph: onnx.GraphProto) -> int:
    """Rewrite Einsums of activations with a constant (hidden, heads, head size) to MatMuls; how many there were."""
    weights = {t.name: t for t in graph.initializer if len(t.dims) == 3}
    shapes = {name: tuple(tensor.dims) for name, tensor in weights.items()}
    nodes: list[onnx.NodeProto] = []
    n_rewritten = 0
    for node in graph.node:
        equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
        if node.op_type != "Einsum" or node.input[-1] not in weights or equation not in (_SPLITS, _JOINS):
            nodes.append(node)
            continue
        x, weight, y = node.input[0], node.input[1], node.output[0]
        hidden, n_heads, size = shapes[weight]
        splits = equation == _SPLITS
        matrix = numpy_helper.to_array(weights[weight]).reshape(hidden, n_heads * size)
        weights[weight].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(matrix if splits else matrix.T), weight))
        # A 0 keeps that axis as it is.
        shape = np.array([0, 0, n_heads, size] if splits else [0, 0, n_heads * size], np.int64)
        graph.initializer.append(numpy_helper.from_array(shape, f"{y}.shape"))
        steps = [("MatMul", weight), ("Reshape", f"{y}.shape")]
        (first, second), flat = steps if splits else steps[::-1], f"{y}.flat"
        nodes.append(helper.make_node(first[0], [x, first[1]], [flat], name=f"{y}/{first[0]}"))
        nodes.append(helper.make_node(second[0], [flat, second[1]], [y], name=f"{y}/{second[0]}"))
        n_rewritten += 1
    del graph.node[:]
    graph.node.extend(nodes)
    return n_rewritten
