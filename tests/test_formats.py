"""Formats: sizes, and what scales and codes mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference_search
import torch

from device.records import SlimpiError
from pipeline.formats import FORMATS, QTensor, Scales, check_columns, side_by_side

CODED = [name for name, kind in FORMATS.items() if kind.codes]


def random_qtensor(name: str, rows: int = 3, blocks: int = 2, seed: int = 0) -> QTensor:
    """Random fields, not only such as a quantizer would choose."""
    kind = FORMATS[name]
    codes = kind.codes
    assert codes is not None
    rng = np.random.default_rng(seed)
    columns = blocks * kind.block_size

    def floats() -> torch.Tensor:
        pools = -(-rows // codes.pool)
        return torch.from_numpy(rng.normal(0, 1, (pools, blocks))).to(codes.float_type)

    def integers(limits: tuple[int, int]) -> torch.Tensor:
        shape = (rows, columns // codes.group_size)
        return torch.from_numpy(rng.integers(limits[0], limits[1] + 1, shape, dtype=np.int16))

    scales = Scales(floats(), integers(codes.scale_range), pool=codes.pool)
    if codes.has_offset:
        dmin = scales.d if codes.zero_point else floats()
        scales = replace(scales, dmin=dmin, min_codes=integers(codes.min_range))
    if codes.pool > 1:
        scales = replace(scales, scale_base=floats(), zero_base=floats())
    q = rng.integers(0, len(codes.grid), (rows, columns), dtype=np.uint8)
    return QTensor(kind, torch.from_numpy(q), scales)


@pytest.mark.parametrize("name", CODED)
def test_dequantize_equals_its_twin(name: str) -> None:
    rows = 130 if name in ("MXQ_B4_G32", "MXQ_B2_G32") else 3
    q = random_qtensor(name, rows, 1 if rows > 3 else 2)
    expected = reference_search.dequantize(q)
    np.testing.assert_allclose(q.dequantize().numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("Q4_0", 4.5),
        ("Q4_K", 4.5),
        ("Q6_K", 6.5625),
        ("IQ4_XS", 4.25),
        ("INT4_G32", 4 + 32 / 32),
        ("INT4_G32_ZP", 4 + 36 / 32),
        ("INT8_G128_ZP", 8 + 40 / 128),
        ("MXQ_B4_G64", 4 + 2 * 8 / 64 + 2 * 2 * 16 / (64 * 128)),
        ("MXQ_B3_G128", 3 + 2 * 8 / 128 + 2 * 2 * 16 / (128 * 128)),
    ],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert FORMATS[name].bits_per_weight == bits


@pytest.mark.parametrize("name", [name for name in CODED if FORMATS[name].ggml_type is None])
def test_bits_count_every_stored_field(name: str) -> None:
    """Bits of all tensors of a whole pool, each field at its width."""
    kind = FORMATS[name]
    codes = kind.codes
    assert codes is not None
    rows = codes.pool if codes.pool > 1 else 2
    q = random_qtensor(name, rows, blocks=1)

    def width(limits: tuple[int, int]) -> int:
        return (limits[1] - limits[0]).bit_length()

    bits = q.codes.numel() * width((0, len(codes.grid) - 1))
    bits += q.scales.scale_codes.numel() * width(codes.scale_range)
    if q.scales.min_codes is not None:
        bits += q.scales.min_codes.numel() * width(codes.min_range)
    own_floats = [q.scales.d, q.scales.scale_base, q.scales.zero_base]
    own_floats += [] if codes.zero_point else [q.scales.dmin]
    bits += sum(8 * tensor.element_size() * tensor.numel() for tensor in own_floats if tensor is not None)
    assert bits / q.codes.numel() == kind.bits_per_weight


@pytest.mark.parametrize("name", CODED)
def test_slices_join(name: str) -> None:
    q = random_qtensor(name, 3, 4)
    size = FORMATS[name].block_size
    groups = q.scales.scale_codes.shape[1] // 4

    def part(start: int, stop: int) -> Scales:
        def cut(tensor: torch.Tensor | None, each: int) -> torch.Tensor | None:
            return None if tensor is None else tensor[:, start * each : stop * each]

        s = q.scales
        d, scale_codes = cut(s.d, 1), cut(s.scale_codes, groups)
        assert d is not None
        assert scale_codes is not None
        bases = (cut(s.scale_base, 1), cut(s.zero_base, 1))
        return Scales(d, scale_codes, cut(s.dmin, 1), cut(s.min_codes, groups), *bases, pool=s.pool)

    joined = QTensor(q.format, q.codes, side_by_side([part(0, 1), part(1, 4)]))
    assert torch.equal(joined.dequantize(), q.dequantize())
    alone = QTensor(q.format, q.codes[:, size:], part(1, 4))
    assert torch.equal(alone.dequantize(), q.dequantize()[:, size:])


def test_columns_that_blocks_do_not_divide() -> None:
    with pytest.raises(SlimpiError, match=r"blk\.0\.x has 576 columns.*Q4_K's blocks of 256"):
        check_columns("blk.0.x", 576, FORMATS["Q4_K"])
    check_columns("blk.0.x", 576, FORMATS["Q4_0"])
