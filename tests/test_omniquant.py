"""OmniQuant-style learning: its loss is the file's, its gradient is right, and it never ends worse than it began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.formats import FORMATS, Format, QTensor
from pipeline.layers import each
from pipeline.methods import METHODS, awq, omniquant, rtn
from tests.toy_layers import block, samples, toy_layer, two_matrices

CODED = [kind for kind in FORMATS.values() if kind.codes is not None]
by_name = pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
some = pytest.mark.parametrize(
    "kind",
    [FORMATS[name] for name in ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "IQ4_NL", "INT4_G32_ZP", "MXQ_B3_G64")],
    ids=lambda kind: kind.name,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@by_name
def test_what_is_learned_on_is_what_is_stored(kind: Format) -> None:
    codes = kind.codes
    assert codes is not None
    w = 0.1 * normal(5, 2 * kind.block_size)
    clips = 1 + normal(2 if codes.has_offset else 1, 5, w.shape[1] // codes.group_size)
    signs = normal(5, w.shape[1] // codes.group_size, seed=1).sign() if not codes.has_offset else torch.ones(1)
    values = omniquant.fake_quantized(w, clips, signs, kind)
    stored = rtn.store(*omniquant.ranges(w, clips, signs, codes), kind)
    expected = QTensor(kind, rtn.nearest(w, stored, kind), stored).dequantize()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@by_name
def test_begins_with_the_codes_it_is_given(kind: Format) -> None:
    """Round to nearest's, but for the rounding of scales that are stored again."""
    codes = kind.codes
    assert codes is not None
    w = 0.1 * normal(4, 2 * kind.block_size)
    scales = rtn.extremes(w, kind)
    signs = torch.where(scales.values() < 0, -1.0, 1.0)
    clips = omniquant.clips_of(w, scales, codes)
    values = omniquant.fake_quantized(w, clips, signs, kind)
    plain = rtn.quantize(w, None, kind)[0].dequantize()
    if codes.pool == 1:  # pools store their scales less exactly each time
        assert (values - plain).norm() < 0.15 * (w - plain).norm()
    assert (w - values).norm() < 1.3 * (w - plain).norm()


def test_clips_of_stored_scales() -> None:
    kind = FORMATS["Q4_1"]
    w, clips = normal(3, 64), normal(2, 3, 2, seed=1).clamp(-3, 3)
    scales = rtn.store(*omniquant.ranges(w, clips, torch.ones(1), kind.codes), kind)
    torch.testing.assert_close(omniquant.clips_of(w, scales, kind.codes), clips, rtol=0.02, atol=0.02)


@some
def test_the_gradient_is_the_losses(kind: Format) -> None:
    """Against autograd through the whole expression, and the value against the finished layer's loss."""
    layer, stats = toy_layer()
    formats = dict.fromkeys(layer.matrices, kind)
    fold = layer.folds[2]
    base = replace(awq.unscaled(layer, stats), row_scales={"ffn_up.weight": torch.exp(0.3 * normal(256))})
    names = list(fold.consumers)
    scaled = awq.applied(base, fold, torch.exp(0.3 * normal(256, seed=1)))
    learned = omniquant._beginning(awq._finished(scaled, names, formats, each(awq.clipped)), fold, names, formats)
    total = sum(omniquant._backward(base, learned, fold, name, kind) for name in names)
    made = omniquant._in_codes(base, omniquant._copied(learned), fold, names, formats)
    assert total == pytest.approx(awq.finished_loss(made, names), rel=1e-4)
    copy = omniquant._copied(learned)
    assert copy.log_scales is not None
    leaves = [copy.log_scales.requires_grad_(), *(clips.requires_grad_() for clips in copy.clips.values())]
    scales = copy.scales()
    assert scales is not None
    loss = torch.zeros(())
    for name in names:
        w = layer.matrices[name] * scales
        error = (omniquant.fake_quantized(w, copy.clips[name], copy.signs[name], kind) - w) / scales
        rows = (error @ stats[name].hessian() * error).sum(1)
        loss = loss + (rows * base.row_scales[name] ** 2 if name in base.row_scales else rows).sum()
    expected = torch.autograd.grad(loss, leaves)
    assert learned.log_scales is not None
    for ours, theirs in zip([learned.log_scales, *learned.clips.values()], expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@some
def test_never_worse_than_its_beginning(kind: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "ALPHAS", (0.3, 0.6))
    monkeypatch.setattr(omniquant, "STEPS", 15)
    layer, stats = two_matrices(1)
    formats = dict.fromkeys(layer.matrices, kind)
    start = awq.scale(layer, stats, formats, each(awq.clipped), rtn.quantize)

    found = awq.scale(layer, stats, formats, each(awq.clipped), rtn.quantize, omniquant.learn)
    before, after = (awq.finished_loss(state, list(formats)) for state in (start, found))
    assert after < 0.995 * before or (kind.codes.pool > 1 and after <= before)


def test_learning_that_loses_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun with nearly everything clipped away, a few steps cannot catch up: AWQ's codes stay."""
    monkeypatch.setattr(omniquant, "STEPS", 3)
    monkeypatch.setattr(omniquant, "clips_of", lambda w, scales, codes: torch.full_like(scales.values()[None], -3.0))
    layer, stats = toy_layer(2)
    formats = dict.fromkeys(layer.matrices, FORMATS["Q4_0"])
    made, expected = (METHODS[name].run(layer, stats, formats) for name in ("omniquant", "awq"))
    for name in formats:
        assert torch.equal(made.tensors[name].dequantize(), expected.tensors[name].dequantize())
    assert made.notes[-1].endswith("s, output error 0.0% below where they began")


@pytest.mark.parametrize("kind", [FORMATS["Q8_0"], FORMATS["MXQ_B8_G32"]], ids=lambda kind: kind.name)
def test_the_block_computes_the_same(kind: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omniquant, "STEPS", 5)
    layer, stats = toy_layer(3)
    made = METHODS["omniquant"].run(layer, stats, dict.fromkeys(layer.matrices, kind))
    x = samples(50, 256, 9)
    expected = block(dict(layer.matrices), dict(layer.vectors), x) - x
    values = {n: q.dequantize() for n, q in made.tensors.items()}
    error = block(values, {**layer.vectors, **made.vectors}, x) - x - expected
    assert error.norm() / expected.norm() < 0.02
    assert "steps took" in made.notes[-1]


def test_groups_of_zeros_do_not_spoil_the_rest() -> None:
    layer, stats = toy_layer(4)
    matrices = {name: w.clone() for name, w in layer.matrices.items()}
    matrices["ffn_down.weight"][:, :64] = 0
    matrices["ffn_gate.weight"][3] = 0
    empty = awq.unscaled(replace(layer, matrices=matrices), stats)
    formats = dict.fromkeys(matrices, FORMATS["Q4_1"])
    for fold in layer.folds[2:]:
        names = list(fold.consumers)
        found = awq._finished(empty, names, formats, each(rtn.quantize))
        made = omniquant.learn(empty, found, fold, names, formats)
        assert torch.isfinite(made.scales[fold.producer]).all()
        assert awq.finished_loss(made, names) < awq.finished_loss(found, names)
