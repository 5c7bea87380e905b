"""Every method into every format with codes of ours: what holds whatever the method.

A method added to METHODS is covered by this file as it is; the last tests add one to show that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from pipeline.formats import ABSENT, FORMATS, Format, QTensor
from pipeline.layers import Fold, Layer, MethodEntry, QuantizedLayer, Stats, each
from pipeline.methods import METHODS, rtn
from pipeline.packing import pack, pack_matmul_nbits, unpack

CODED = {name: kind for name, kind in FORMATS.items() if kind.codes}
COLUMNS, N_TOKENS = 256, 384
ROWS = {"attn_q.weight": 12, "attn_k.weight": 4, "attn_v.weight": 4, "attn_output.weight": 12}
INPUTS = {"attn_q.weight": "a", "attn_k.weight": "a", "attn_v.weight": "a", "attn_output.weight": "b"}
FOLDS = (Fold("attn_norm.weight", ("attn_q.weight", "attn_k.weight", "attn_v.weight")),)
"""A norm's fold only: its scales can be read off the result, so that each matrix's loss is known exactly."""


@cache
def inputs() -> dict[str, torch.Tensor]:
    """float64 (tokens, columns): correlated, of unlike magnitudes, a few columns outlying: as in language models."""
    generator = torch.Generator().manual_seed(4)
    found = {}
    for name in "ab":
        factors = torch.randn(N_TOKENS, 24, generator=generator, dtype=torch.float64)
        loadings = torch.randn(24, COLUMNS, generator=generator, dtype=torch.float64)
        noise = torch.randn(N_TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
        spread = torch.exp(0.7 * torch.randn(COLUMNS, generator=generator, dtype=torch.float64))
        spread[::67] *= 8
        found[name] = (factors @ loadings / 5 + noise / 2) * spread
    return found


@cache
def layer() -> Layer:
    generator = torch.Generator().manual_seed(5)
    matrices = {name: torch.randn(rows, COLUMNS, generator=generator) ** 3 * 0.02 + 0.01 for name, rows in ROWS.items()}
    matrices["attn_q.weight"][3] = 0.0  # a pruned row
    matrices["attn_output.weight"][:, 32:64] = 0.0
    gain = torch.rand(COLUMNS, generator=generator) + 0.5
    return Layer(7, matrices, {"attn_norm.weight": gain, "attn_q.bias": torch.ones(12)}, FOLDS)


@cache
def stats() -> dict[str, Stats]:
    by_input = {}
    for name, x in inputs().items():
        hessian = (x.T @ x / len(x)).float()
        by_input[name] = Stats(x.square().mean(0).float(), x.abs().mean(0).float(), len(x), hessian.clone)
    return {name: by_input[of] for name, of in INPUTS.items()}


@cache
def made(method: str, kind: str) -> QuantizedLayer:
    return run(METHODS[method], CODED[kind])


def run(entry: MethodEntry, kind: Format) -> QuantizedLayer:
    known = {} if entry.needs == "nothing" else stats()
    return entry.run(layer(), known, dict.fromkeys(ROWS, kind))


def loss(result: QuantizedLayer, name: str, needs: str) -> float:
    """E |(W - W^) x|^2 in float64 over the method's own data: the tokens, or, where it sees means, their squares."""
    gains = layer().vectors["attn_norm.weight"], result.vectors.get("attn_norm.weight")
    w = result.tensors[name].dequantize().double()
    if INPUTS[name] == "a" and gains[1] is not None:
        w = w * (gains[1] / gains[0]).double()
    difference = w - layer().matrices[name].double()
    x = inputs()[INPUTS[name]]
    if needs == "hessian":
        return float((x @ difference.T).square().sum() / len(x))
    return float((difference.square() * x.square().mean(0)).sum())


SOME = {name for name, kind in CODED.items() if kind.ggml_type} | {
    "INT4_G32",
    "INT4_G64_ZP",
    "INT8_G128_ZP",
    "MXQ_B3_G64",
}
FEW = {"Q4_0", "Q4_1", "Q2_K", "INT4_G64_ZP"}
COSTLY = {"awq+search", "awq+gptq", "omniquant"}


def cell(method: str, kind: str) -> Any:
    fast = kind in (FEW if method in COSTLY else SOME)
    return pytest.param(method, kind, marks=() if fast else pytest.mark.slow)


CALIBRATED = [method for method, entry in METHODS.items() if entry.needs != "nothing"]

every_cell = pytest.mark.parametrize(("method", "kind"), [cell(method, kind) for method in METHODS for kind in CODED])
every_method = pytest.mark.parametrize("method", METHODS)


@every_cell
def test_a_result_is_whole_within_its_format_and_comes_back_as_packed(method: str, kind: str) -> None:
    """Packing and unpacking give the same codes, and who reads the file sees what `dequantize` says."""
    result = made(method, kind)
    check_whole(result, CODED[kind])
    for q in result.tensors.values():
        check_packing(q)


def check_whole(result: QuantizedLayer, kind: Format) -> None:
    assert result.tensors.keys() == ROWS.keys()
    for name, q in result.tensors.items():
        check_valid(q, kind, layer().matrices[name].shape)
    for name, vector in result.vectors.items():
        assert vector.shape == layer().vectors[name].shape
        assert vector.dtype == torch.float32
        assert vector.isfinite().all()
    assert all(isinstance(note, str) for note in result.notes)


def check_valid(q: QTensor, kind: Format, shape: torch.Size) -> None:
    codes = kind.codes
    assert codes is not None
    rows, columns = shape
    assert q.format == kind
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == shape
    assert int(q.codes.max()) < len(codes.grid)
    pools, groups = -(-rows // codes.pool), columns // codes.group_size
    floats = (pools, groups if codes.pool > 1 else columns // kind.block_size)
    assert q.scales.d.shape == floats
    assert q.scales.d.dtype == codes.float_type
    assert q.scales.d.isfinite().all()
    assert q.scales.scale_codes.shape == (rows, groups)
    low, high = codes.scale_range
    assert low <= int(q.scales.scale_codes.min()) <= int(q.scales.scale_codes.max()) <= high
    assert (q.scales.dmin is None) == (q.scales.min_codes is None) == (codes.min_range == ABSENT)
    if q.scales.dmin is not None and q.scales.min_codes is not None:
        assert q.scales.dmin.shape == floats
        assert q.scales.dmin.isfinite().all()
        assert q.scales.min_codes.shape == (rows, groups)
        low, high = codes.min_range
        assert low <= int(q.scales.min_codes.min()) <= int(q.scales.min_codes.max()) <= high


def check_packing(q: QTensor) -> None:
    if q.format.ggml_type is None:
        if q.format.name.startswith("INT"):
            blocks, scales, zeros = pack_matmul_nbits(q)
            theirs = from_matmul_nbits(q, blocks, scales, zeros)
            if zeros is None:
                assert np.array_equal(theirs, q.dequantize().numpy())
            else:  # (value - zero) * scale there, value * scale - zero * scale here
                atol = 2.0**-22 * len(q.format.codes.grid) * float(np.abs(scales).max())  # type: ignore[union-attr]
                np.testing.assert_allclose(theirs, q.dequantize().numpy(), rtol=0, atol=atol)
        return  # MXQ's formats are in no file
    data = pack(q)
    assert data.shape == (q.codes.shape[0], q.codes.shape[1] * q.format.bits_per_weight / 8)
    again = unpack(data, q.format, q.codes.shape[1])
    assert torch.equal(again.codes, q.codes)
    for field in ("d", "dmin", "scale_codes", "min_codes"):
        ours, theirs = getattr(q.scales, field), getattr(again.scales, field)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert np.array_equal(gguf.quants.dequantize(data, q.format.ggml_type), q.dequantize().numpy())


def from_matmul_nbits(q: QTensor, blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """ContribOperators.md, MatMulNBits: (value - zero) * scale, values and zeros packed from the low bits up."""
    rows, columns = q.codes.shape
    bits = int(np.log2(len(q.format.codes.grid)))  # type: ignore[union-attr]

    def split(data: np.ndarray) -> np.ndarray:
        return data if bits == 8 else np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)

    values = split(blocks).astype(np.float32)
    middle = np.full(scales.shape, 2 ** (bits - 1), np.float32)
    zero = middle if zeros is None else split(zeros)[:, : scales.shape[1]].astype(np.float32)
    return ((values - zero[:, :, None]) * scales[:, :, None]).reshape(rows, columns)


@pytest.mark.parametrize(("method", "kind"), [cell(method, kind) for method in CALIBRATED for kind in CODED])
def test_never_worse_than_rounding_on_its_own_data(method: str, kind: str) -> None:
    needs = METHODS[method].needs
    ours = {name: loss(made(method, kind), name, needs) for name in ROWS}
    rounded = {name: loss(made("rtn", kind), name, needs) for name in ROWS}
    # Matrices behind one norm share its scales, so that one of them may lose what the others win.
    assert sum(ours.values()) <= sum(rounded.values())
    assert ours["attn_output.weight"] <= rounded["attn_output.weight"]


@every_method
def test_the_same_input_gives_the_same_codes(method: str) -> None:
    for kind in ("Q4_0", "Q2_K"):
        check_same(made(method, kind), run(METHODS[method], CODED[kind]))


def check_same(first: QuantizedLayer, second: QuantizedLayer) -> None:
    for name, q in first.tensors.items():
        assert np.array_equal(pack(q), pack(second.tensors[name]))
    assert first.vectors.keys() == second.vectors.keys()
    for name, vector in first.vectors.items():
        assert torch.equal(vector, second.vectors[name])


@every_method
def test_the_input_is_left_alone_and_only_the_plan_is_done(method: str) -> None:
    """Matrices without a format are not made, mixed formats are kept apart, and nothing that was passed changes."""
    before = {name: w.clone() for name, w in {**layer().matrices, **layer().vectors}.items()}
    formats = {"attn_q.weight": CODED["Q3_K"], "attn_output.weight": CODED["Q5_1"]}
    entry = METHODS[method]
    result = entry.run(layer(), {} if entry.needs == "nothing" else stats(), formats)
    assert {name: q.format for name, q in result.tensors.items()} == formats
    for name, w in {**layer().matrices, **layer().vectors}.items():
        assert torch.equal(w, before[name])
    assert "attn_norm.weight" not in result.vectors, "attn_k and attn_v keep their weights: the norm cannot change"


def toy(w: torch.Tensor, stats: Stats | None, kind: Format) -> tuple[QTensor, list[str]]:
    """A method as short as they come: RTN with scales a tenth smaller."""
    scales = rtn.extremes(w * 0.9, kind)
    return QTensor(kind, rtn.nearest(w, scales, kind), scales), ["made by a toy"]


@pytest.mark.parametrize("kind", CODED)
def test_a_new_method_is_one_function_and_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", MethodEntry(each(toy), "nothing"))
    result = run(METHODS["toy"], CODED[kind])
    check_whole(result, CODED[kind])
    for q in result.tensors.values():
        check_packing(q)
    assert result.notes == [f"blk.7.{name}: made by a toy" for name in ROWS]


def test_every_method_says_what_it_reads() -> None:
    def refuse() -> torch.Tensor:
        raise AssertionError("reads the Hessian")

    blind: Mapping[str, Stats] = {
        name: Stats(s.mean_x2, torch.full_like(s.mean_abs_x, torch.nan), s.n_tokens, refuse)
        for name, s in stats().items()
    }
    for entry in METHODS.values():
        assert entry.needs in ("nothing", "means", "hessian")
        if entry.needs != "hessian":
            entry.run(layer(), {} if entry.needs == "nothing" else blind, {"attn_output.weight": CODED["Q4_0"]})
