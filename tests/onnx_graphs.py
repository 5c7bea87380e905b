"""Small ONNX models, one a kernel family of ONNX Runtime's CPU provider, to run where a wrong kernel would show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_RNG = np.random.default_rng(7)
ROWS, INNER, COLUMNS = 6, 64, 48


def _values(*shape: int) -> np.ndarray:
    return _RNG.normal(size=shape).astype(np.float32)


def _nodes() -> dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]]:
    """Name -> (nodes from `x` (ROWS, INNER) float32 to `y`, constants)."""
    w, image = _values(INNER, COLUMNS), _values(4, 1, 3, 3)
    w8 = np.clip(np.round(w * 30), -127, 127).astype(np.int8)
    packed = _RNG.integers(0, 256, (COLUMNS, INNER // 32, 16), dtype=np.uint8)
    make, scale, zero = helper.make_node, np.float32(0.03), np.int8(0)
    quantize = make("QuantizeLinear", ["x", "s", "z"], ["q"])
    to16, to32 = (lambda a, b: make("Cast", [a], [b], to=TensorProto.FLOAT16)), make("Cast", ["h"], ["y"], to=1)
    return {
        "matmul": ([make("MatMul", ["x", "w"], ["y"])], {"w": w}),
        "gelu": ([make("Gelu", ["x"], ["y"])], {}),
        "softmax": ([make("Softmax", ["x"], ["y"])], {}),
        "layer_norm": (
            [make("LayerNormalization", ["x", "g"], ["y"])], {"g": _values(INNER)}
        ),
        "conv": (
            [make("Reshape", ["x", "shape"], ["i"]), make("Conv", ["i", "k"], ["y"])],
            {"shape": np.array([ROWS, 1, 8, 8]), "k": image},
        ),
        "dynamic_int8": (
            [
                make("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
                make("MatMulInteger", ["q", "w", "qz"], ["i"]),
                make("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
            ],
            {"w": w8},
        ),
        "qlinear_s8s8": (
            [quantize, make("QLinearMatMul", ["q", "s", "z", "w", "s", "z", "o", "z"], ["r"]),
             make("DequantizeLinear", ["r", "o", "z"], ["y"])],
            {"s": scale, "z": zero, "w": w8, "o": np.float32(0.3)},
        ),
        "nbits4": (
            [make("MatMulNBits", ["x", "w", "ws"], ["y"], domain="com.microsoft", K=INNER, N=COLUMNS, bits=4,
                  block_size=32, accuracy_level=1)],
            {"w": packed, "ws": np.abs(_values(COLUMNS * INNER // 32))},
        ),
        "float16": (
            [to16("x", "x16"), make("MatMul", ["x16", "w"], ["m"]), make("Softmax", ["m"], ["h"]), to32],
            {"w": w.astype(np.float16)},
        ),
    }  # fmt: skip


def write_graphs(folder: Path) -> list[Path]:
    """One model a family, each with input `x` (ROWS, INNER) float32."""
    paths = []
    for name, (nodes, constants) in _nodes().items():
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, INNER])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
        )
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        paths.append(folder / f"{name}.onnx")
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), paths[-1])
    return paths


def sample_input() -> np.ndarray:
    return np.random.default_rng(11).normal(size=(ROWS, INNER)).astype(np.float32)
