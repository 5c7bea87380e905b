"""Packing is exact: against the gguf package, llama.cpp's C code and ONNX Runtime's MatMulNBits."""

from __future__ import annotations

import ggml_side
import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formats import FORMATS, Format, QTensor, Scales
from pipeline.packing import pack, pack_in_nibbles, pack_matmul_nbits, unpack

GGUF_CODES = [name for name, kind in FORMATS.items() if kind.codes and kind.ggml_type]
ONNX_CODES = [name for name in FORMATS if name.startswith("INT")]


def random_qtensor(kind: Format, rows: int, columns: int, seed: int) -> QTensor:
    """Every field over its whole range, ends included."""
    codes = kind.codes
    assert codes is not None
    rng = np.random.default_rng(seed)

    def integers(limits: tuple[int, int], *shape: int) -> torch.Tensor:
        found = rng.integers(limits[0], limits[1] + 1, shape, dtype=np.int16)
        found[0, 0], found[-1, -1] = limits
        return torch.from_numpy(found)

    def floats() -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, 1, (rows, columns // kind.block_size))).to(codes.float_type)

    groups = columns // codes.group_size
    d = floats()
    scales = Scales(d, integers(codes.scale_range, rows, groups))
    if codes.has_offset:
        dmin = d if codes.zero_point else floats()
        scales = Scales(d, scales.scale_codes, dmin, integers(codes.min_range, rows, groups))
    return QTensor(kind, integers((0, len(codes.grid) - 1), rows, columns).to(torch.uint8), scales)


def same(a: QTensor, b: QTensor) -> bool:
    def parts(q: QTensor) -> list[torch.Tensor | None]:
        return [q.codes, q.scales.d, q.scales.scale_codes, q.scales.dmin, q.scales.min_codes]

    return a.format == b.format and all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(parts(a), parts(b), strict=True)
    )


@pytest.mark.parametrize("name", GGUF_CODES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), blocks=st.integers(1, 3))
def test_gguf_reads_what_we_pack(name: str, seed: int, rows: int, blocks: int) -> None:
    kind = FORMATS[name]
    q = random_qtensor(kind, rows, blocks * kind.block_size, seed)
    data = pack(q)
    assert data.dtype == np.uint8
    assert data.shape == (rows, ggml_side.row_bytes(kind.ggml_type, q.codes.shape[1]))
    np.testing.assert_array_equal(gguf.quants.dequantize(data, kind.ggml_type), q.dequantize().numpy())
    assert same(unpack(data, kind, q.codes.shape[1]), q)


@pytest.mark.parametrize("name", GGUF_CODES)
def test_bytes_of_llama_cpp_come_back(name: str) -> None:
    """Blocks by llama.cpp's C quantizer, and blocks of random bits, unpack and pack to the very same bytes."""
    kind = FORMATS[name]
    rng = np.random.default_rng(1)
    w = rng.standard_t(4, (6, 2 * kind.block_size)).astype(np.float32)
    for data in (
        ggml_side.quantize(w, kind.ggml_type),
        ggml_side.quantize(w, kind.ggml_type, rng.random(w.shape[1:])),
        pack(random_qtensor(kind, 6, w.shape[1], 2)),
    ):
        q = unpack(data, kind, w.shape[1])
        np.testing.assert_array_equal(pack(q), data)
        theirs = ggml_side.dequantize(data, kind.ggml_type, w.shape[1])
        # The C code may fuse a multiplication and an addition: one rounding of float32 apart.
        np.testing.assert_allclose(theirs, q.dequantize().numpy(), rtol=0, atol=2e-7 * np.abs(theirs).max())


def test_formats_without_codes_do_not_pack() -> None:
    q = random_qtensor(FORMATS["INT4_G32"], 1, 32, 0)
    with pytest.raises(ValueError, match="INT4_G32"):
        pack(q)
    with pytest.raises(ValueError, match="Q4_0"):
        pack_matmul_nbits(random_qtensor(FORMATS["Q4_0"], 1, 32, 0))


@pytest.mark.parametrize("name", ONNX_CODES)
def test_onnxruntime_multiplies_by_what_we_pack(name: str) -> None:
    kind = FORMATS[name]
    rows, columns = 5, 3 * kind.block_size
    q = random_qtensor(kind, rows, columns, 3)
    # With x the unit matrix a product is one weight, so that no summation order blurs the comparison.
    x = np.concatenate([np.eye(columns), np.random.default_rng(4).normal(0, 1, (4, columns))]).astype(np.float32)
    got = matmul_nbits(x, q)
    w = q.dequantize().numpy()
    np.testing.assert_allclose(got[:columns], w.T, rtol=1e-6, atol=1e-6 * np.abs(w).max())
    exact = x[columns:].astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(got[columns:], exact, rtol=0, atol=2e-5 * np.abs(exact).max())


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", [name for name in ONNX_CODES if name.startswith("INT8")])
def test_two_products_of_four_bits_are_one_of_eight(name: str, groups: int) -> None:
    """An odd number of groups leaves half a byte of a row's zero points."""
    kind = FORMATS[name]
    q = random_qtensor(kind, 5, groups * kind.block_size, 7)
    x = np.random.default_rng(4).normal(0, 1, (4, q.codes.shape[1])).astype(np.float32)
    halves, scales = pack_in_nibbles(q)
    assert [half.factor for half in halves] == [16, 1]
    got = sum(
        run_matmul_nbits(half.factor * x, q, 4, {"B": half.data, "scales": scales} | _zeros(half.zeros))
        for half in halves
    )
    exact = x.astype(np.float64) @ q.dequantize().numpy().T.astype(np.float64)
    np.testing.assert_allclose(got, exact, rtol=0, atol=2e-5 * np.abs(exact).max())


def _zeros(zeros: np.ndarray | None) -> dict[str, np.ndarray]:
    return {} if zeros is None else {"zero_points": zeros}


def matmul_nbits(x: np.ndarray, q: QTensor) -> np.ndarray:
    assert q.format.codes is not None
    data, scales, zeros = pack_matmul_nbits(q)
    bits = (len(q.format.codes.grid) - 1).bit_length()
    return run_matmul_nbits(x, q, bits, {"B": data, "scales": scales} | _zeros(zeros))


def run_matmul_nbits(x: np.ndarray, q: QTensor, bits: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    assert q.format.codes is not None
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        N=q.codes.shape[0],
        K=q.codes.shape[1],
        bits=bits,
        block_size=q.format.codes.group_size,
    )
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", floats, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", floats, [x.shape[0], q.codes.shape[0]])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
