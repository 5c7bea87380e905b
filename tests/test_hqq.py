"""HQQ: equal to its float64 twin, better than rounding by its own norm, and indifferent to the weights' unit."""

from __future__ import annotations

import pytest
import torch

from pipeline.formats import FORMATS, Format
from pipeline.layers import Layer
from pipeline.methods import METHODS, blend, hqq, rtn
from tests import reference_hqq

CODED = [kind for kind in FORMATS.values() if kind.codes is not None]
by_name = pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails and a mean that is not zero: what HQQ is for."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return 0.02 * (normal + 0.3 * normal.sign() * normal.abs() ** 2.5 + 0.3)


@by_name
def test_equals_the_twin(kind: Format) -> None:
    codes = kind.codes
    assert codes is not None
    w = weights(2, 2 * codes.group_size, seed=3)
    w[1] = w[1].abs() + 0.02
    x = w.reshape(2, 2, codes.group_size)
    low, high = x.amin(2), x.amax(2)
    start = (high - low) / (codes.grid[-1] - codes.grid[0])
    offset = low.clamp(max=0) if codes.has_offset else None
    found_scale, found_offset = hqq.solve(x, start, offset, codes)
    for row in range(2):
        for group in range(2):
            expected_scale, expected_offset = reference_hqq.group(
                x[row, group].double().tolist(),
                start[row, group].item(),
                None if offset is None else offset[row, group].item(),
                codes.grid,
                float("inf") if codes.any_offset else 0.0,
                offset is None or codes.zero_point,
                hqq.NORM,
                hqq.BETA,
                hqq.GROWTH,
                hqq.ITERATIONS,
            )
            assert found_scale[row, group].item() == pytest.approx(expected_scale, rel=1e-5)
            if expected_offset is not None:
                assert found_offset is not None
                assert found_offset[row, group].item() == pytest.approx(expected_offset, rel=1e-4, abs=1e-6)


@by_name
def test_never_worse_than_rounding_in_its_norm(kind: Format) -> None:
    w = weights(8, 2 * kind.block_size)
    q = METHODS["hqq"].run(Layer(0, {"w": w}, {}), {}, {"w": kind}).tensors["w"]
    plain, _ = rtn.quantize(w, None, kind)
    found, limit = hqq.cell_error(w, q), hqq.cell_error(w, plain)
    assert (found <= limit).all()
    if kind.name != "IQ4_XS":  # the grid's steps differ: six bits of scale lose what little the solver finds
        assert found.sum() < 0.9999 * limit.sum()


@by_name
def test_the_unit_does_not_matter(kind: Format) -> None:
    codes = kind.codes
    x = weights(4, 4 * codes.group_size, seed=1).reshape(4, 4, -1)
    scale, offset = (x.amax(2) - x.amin(2)) / len(codes.grid), x.amin(2).clamp(max=0) if codes.has_offset else None
    large = hqq.solve(x * 64, scale * 64, None if offset is None else offset * 64, codes)
    for a, b in zip(hqq.solve(x, scale, offset, codes), large, strict=True):
        assert a is b or torch.equal(a * 64, b)


@by_name
def test_zeros_and_constants(kind: Format) -> None:
    w = torch.zeros(3, kind.block_size)
    w[1] = 0.5
    q, _ = hqq.quantize(w, None, kind)
    values = q.dequantize()
    assert torch.isfinite(values).all()
    assert (values[0] == 0).all()
    if kind.codes.pool == 1:  # where scales are pooled, a scale of 0 leaves no offset
        torch.testing.assert_close(values[1], w[1], rtol=0.13, atol=0)


def test_rows_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = FORMATS["Q4_K"]
    w = weights(5, 512)
    whole, _ = hqq.quantize(w, None, kind)
    monkeypatch.setattr(hqq, "_CHUNK", 1024)
    parts, _ = hqq.quantize(w, None, kind)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.dequantize(), parts.dequantize())


@by_name
def test_blending_cells(kind: Format) -> None:
    pool = kind.codes.pool
    w = weights(3 * pool + 1, 2 * kind.block_size)
    a, b = rtn.quantize(w, None, kind)[0], hqq.quantize(w + 0.01, None, kind)[0]
    first = torch.rand(a.scales.d.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for mask in (first, first[:, :1]):
        wide = mask.repeat_interleave(pool, 0)[: len(w)].repeat_interleave(w.shape[1] // mask.shape[1], 1)
        expected = torch.where(wide, a.dequantize(), b.dequantize())
        assert torch.equal(blend.where(mask, a, b).dequantize(), expected)
    sums = blend.per_cell(w.double(), a.scales)
    assert sums[-1, 1].item() == pytest.approx(w[3 * pool :, kind.block_size :].double().sum().item())
    assert sums[0, 0].item() == pytest.approx(w[:pool, : kind.block_size].double().sum().item())
    parts = [hqq.quantize(part, None, kind)[0] for part in w.split(2 * pool)]
    assert torch.equal(blend.stacked(parts).dequantize(), hqq.quantize(w, None, kind)[0].dequantize())
