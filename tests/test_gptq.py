"""GPTQ against the paper's algorithm in float64, its losses against search's, and bad Hessians."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import reference_gptq as reference
import torch

from device.records import SlimpiError
from pipeline.formats import FORMATS, Format, QTensor
from pipeline.layers import Layer, Stats
from pipeline.methods import gptq, polish, rtn, search

CODED = [name for name, kind in FORMATS.items() if kind.codes]
SOME = ["Q4_0", "Q4_1", "IQ4_NL", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "INT4_G64_ZP", "MXQ_B3_G64"]
"""One of every kind: signed and not, with and without offsets, coded scales, another grid, zero points, pools."""


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with heavy tails, and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mix.T
    x = (x + torch.randn(x.shape, generator=generator)) * torch.exp(0.5 * torch.randn(columns, generator=generator))
    w = torch.randn(rows, columns, generator=generator) * torch.exp(0.4 * torch.randn(rows, 1, generator=generator))
    return w * 0.05 * torch.exp(0.3 * torch.randn(w.shape, generator=generator)), x.T @ x / len(x)


def stats_of(h: torch.Tensor) -> Stats:
    return Stats(h.diagonal().clone(), h.diagonal().sqrt(), 4 * len(h), lambda: h)


def loss(w: torch.Tensor, q: QTensor, h: torch.Tensor) -> float:
    return reference.proxy_loss((w - q.dequantize()).numpy(), h.double().numpy())


def wide(q: QTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """grid, and scale and offset of every weight, float64."""
    assert q.format.codes is not None
    size = q.format.codes.group_size
    scale = q.scales.values().double().repeat_interleave(size, 1).numpy()
    offsets = q.scales.offsets()
    offset = np.zeros_like(scale) if offsets is None else offsets.double().repeat_interleave(size, 1).numpy()
    return np.array(q.format.codes.grid, float), scale, offset


@pytest.fixture(params=SOME)
def kind(request: pytest.FixtureRequest) -> Iterator[Format]:
    yield FORMATS[request.param]


@pytest.mark.parametrize("order", ["columns", "activation"])
def test_codes_equal_the_papers(kind: Format, order: gptq.Order) -> None:
    w, h = correlated(12, 2 * max(kind.block_size, 48))
    q, _ = gptq.quantize(w, stats_of(h), kind, rounds=0, sweeps=0, order=order)
    grid, scale, offset = wide(q)
    columns = np.arange(len(h)) if order == "columns" else np.argsort(-h.diagonal().numpy(), kind="stable")
    damped = reference.damped(h.numpy(), gptq.DAMPING)
    codes, margins, _ = reference.gptq(w.numpy(), damped, grid, scale, offset, columns)
    # float32 may decide a near tie otherwise, after which a row goes its own way
    certain = (margins > 5e-4).all(1)
    assert certain.sum() >= 4
    np.testing.assert_array_equal(q.codes.numpy()[certain], codes[certain])


def test_scales_are_fitted_to_the_weights_that_errors_have_moved(kind: Format) -> None:
    w, h = correlated(12, 2 * max(kind.block_size, 48), seed=1)
    q, _ = gptq.quantize(w, stats_of(h), kind, rounds=0, sweeps=0)
    damped = reference.damped(h.numpy(), gptq.DAMPING)
    start = kind.block_size
    moved = reference.updated_at(w.numpy(), q.dequantize().numpy(), damped, start)[:, :start]
    weight = torch.from_numpy(reference.importance(damped)[start : 2 * start]).float()
    fitted = search.fit(torch.from_numpy(moved).float(), weight, kind).values()
    groups = fitted.shape[1]
    got = q.scales.values()[:, groups : 2 * groups]
    unmoved = search.fit(w[:, start : 2 * start].contiguous(), weight, kind).values()

    def share(scales: torch.Tensor) -> float:
        return ((got - scales).abs() <= 1e-3 * scales.abs()).float().mean().item()

    assert share(fitted) > 0.75
    assert share(unmoved) < 0.4


@pytest.mark.parametrize("name", CODED)
def test_loses_less_than_search_and_each_sweep_less_still(name: str) -> None:
    kind = FORMATS[name]
    w, h = correlated(16, 2 * max(kind.block_size, 64), seed=2)
    stats = stats_of(h)
    plain, searched = (loss(w, method.quantize(w, stats, kind)[0], h) for method in (rtn, search))
    paper, once, twice = (
        loss(w, gptq.quantize(w, stats, kind, rounds=rounds, sweeps=sweeps)[0], h)
        for rounds, sweeps in ((0, 0), (2, 1), (2, 2))
    )
    assert paper < 0.9 * min(plain, searched)
    assert twice < once < paper


def test_polish_ends_where_no_single_code_helps(kind: Format) -> None:
    w, h = correlated(4, max(kind.block_size, 64), seed=3)
    curvature = gptq.factorize(h)
    q = gptq.solve(w, curvature, kind, rounds=3, sweeps=12)
    grid, scale, offset = wide(q)
    gain = reference.best_single_change(w.numpy(), q.codes.numpy(), curvature.h.double().numpy(), grid, scale, offset)
    assert gain < 1e-4


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *((name, "scale_codes") for name in ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS", "MXQ_B3_G64")),
        *((name, "min_codes") for name in ("Q4_K", "INT4_G64_ZP", "MXQ_B3_G64")),
    ],
)
def test_polish_ends_where_no_single_scale_code_helps(name: str, which: str) -> None:
    kind = FORMATS[name]
    w, h = correlated(3, max(kind.block_size, 64), seed=4)
    curvature = gptq.factorize(h)
    q = gptq.solve(w, curvature, kind, rounds=3, sweeps=12)
    assert kind.codes is not None
    limits = kind.codes.scale_range if which == "scale_codes" else kind.codes.min_range
    damped = curvature.h.double().numpy()

    def row_losses(tensor: QTensor) -> np.ndarray:
        error = (w - tensor.dequantize()).double().numpy()
        return np.array([row @ damped @ row for row in error])

    before, old = row_losses(q), getattr(q.scales, which)
    for group in range(old.shape[1]):
        for step in (-2, -1, 1, 2):
            changed = old.clone()
            changed[:, group] = (changed[:, group] + step).clamp(*limits)
            other = row_losses(QTensor(kind, q.codes, replace(q.scales, **{which: changed})))
            assert (other >= before * (1 - 1e-4)).all(), (group, step)


def test_improve_keeps_error_and_gradient(kind: Format) -> None:
    w, h = correlated(8, kind.block_size, seed=5)
    scales = rtn.extremes(w, kind)
    part = polish.from_scales(kind, scales)
    error = w.T - part.weights()
    gradient = h @ error
    polish.improve(part, error, gradient, h, 3)
    q = part.to_qtensor(scales)
    torch.testing.assert_close(error, (w - q.dequantize()).T, rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient, h @ error, rtol=0, atol=1e-4 * float(h.abs().max()))


def test_the_same_on_every_run_and_whatever_the_other_rows() -> None:
    w, h = correlated(16, 256, seed=6)
    kind, curvature = FORMATS["Q4_K"], gptq.factorize(h)
    whole, again = (gptq.solve(w, curvature, kind) for _ in range(2))
    assert torch.equal(whole.codes, again.codes)
    alone = gptq.solve(w[:8], curvature, kind)
    assert (alone.codes == whole.codes[:8]).float().mean() > 0.98


def test_a_layer_shares_factors_and_keeps_names() -> None:
    w, h = correlated(24, 256, seed=7)
    other, other_h = correlated(8, 256, seed=8)
    shared, own = stats_of(h), stats_of(other_h)
    reads = []
    shared = replace(shared, hessian=lambda: (reads.append(1), h)[1])
    matrices = {"attn_q.weight": w[:16], "attn_output.weight": other, "attn_k.weight": w[16:], "attn_v.weight": w[:8]}
    stats = {name: own if name == "attn_output.weight" else shared for name in matrices}
    formats = {name: FORMATS["Q4_0" if name == "attn_v.weight" else "Q4_K"] for name in matrices}
    found = gptq.run(Layer(3, matrices, {}), stats, formats)
    assert list(found.tensors) == list(matrices)
    assert len(reads) == 1
    for name, matrix in matrices.items():
        q, alone = found.tensors[name], gptq.quantize(matrix, stats[name], formats[name])[0]
        assert q.format is formats[name]
        assert (q.codes == alone.codes).float().mean() > 0.95, name
        assert loss(matrix, q, stats[name].hessian()) == pytest.approx(loss(matrix, alone, stats[name].hessian()), 0.05)
    with pytest.raises(SlimpiError, match=r"blk\.3\.attn_k\.weight has no calibration"):
        gptq.run(Layer(3, matrices, {}), {"attn_q.weight": shared, "attn_output.weight": own}, formats)


def test_inputs_never_active_cost_nothing() -> None:
    w, h = correlated(8, 64, seed=9)
    dead = torch.arange(0, 64, 5)
    h[dead], h[:, dead] = 0, 0
    q, notes = gptq.quantize(w, stats_of(h), FORMATS["Q4_0"])
    assert not notes
    assert loss(w, q, h) < loss(w, search.quantize(w, stats_of(h), FORMATS["Q4_0"])[0], h)
    # they are rounded like any weight, not given up: other text may wake them
    error = (w - q.dequantize())[:, dead].abs()
    assert (error <= 0.51 * q.scales.values().abs().repeat_interleave(32, 1)[:, dead] + 1e-6).float().mean() > 0.9


def test_no_activation_at_all_is_said() -> None:
    w, h = correlated(8, 64, seed=10)
    q, notes = gptq.quantize(w, stats_of(h * 0), FORMATS["Q4_0"])
    assert "no calibration token reached it" in notes[0]
    plain = rtn.quantize(w, None, FORMATS["Q4_0"])[0]
    assert loss(w, q, torch.eye(64)) < loss(w, plain, torch.eye(64))


def test_fewer_tokens_than_columns() -> None:
    w, _ = correlated(8, 64, seed=11)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    h = x.T @ x / 7
    q, notes = gptq.quantize(w, stats_of(h), FORMATS["Q4_1"], damping=0.01)
    assert not notes
    assert loss(w, q, h) < 0.1 * loss(w, search.quantize(w, stats_of(h), FORMATS["Q4_1"])[0], h)


def test_a_failed_cholesky_raises_damping_and_says_so() -> None:
    w, h = correlated(8, 64, seed=12)
    values, vectors = torch.linalg.eigh(h)
    values[0] = -0.05 * float(h.diagonal().mean())
    broken = vectors @ torch.diag(values) @ vectors.T
    q, notes = gptq.quantize(w, stats_of(broken), FORMATS["Q4_0"], damping=0.01)
    assert notes == ["Cholesky failed with damping 0.01 of the mean diagonal; raised to 0.1"]
    again, _ = gptq.quantize(w, stats_of(broken), FORMATS["Q4_0"], damping=0.1)
    assert torch.equal(q.codes, again.codes)


@pytest.mark.parametrize("broken", ["indefinite", "nan", "columns", "none"])
def test_what_cannot_be_is_refused(broken: str) -> None:
    w, h = correlated(4, 64, seed=13)
    stats: Stats | None = stats_of(h)
    if broken == "indefinite":
        stats = stats_of(torch.eye(64) - 0.5 * torch.ones(64, 64))
    elif broken == "nan":
        h[3, 4] = torch.nan
    elif broken == "columns":
        w = w[:, :48]
    else:
        stats = None
    message = {"indefinite": "fails even with damping 10 of", "nan": "not finite", "columns": "48 columns"}
    with pytest.raises(SlimpiError, match=message.get(broken, "needs a Hessian")):
        gptq.quantize(w, stats, FORMATS["Q4_0"], damping=0.01)


def test_nothing_is_made_on_another_device(kind: Format) -> None:
    w, h = correlated(4, 2 * kind.block_size, seed=14)
    torch.set_default_device("meta")
    try:
        for order in ("columns", "activation"):
            gptq.quantize(w, stats_of(h), kind, order=order)
    finally:
        torch.set_default_device("cpu")
