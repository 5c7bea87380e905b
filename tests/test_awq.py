"""AWQ: equal to twins that run the samples, consistent across the layer, and never worse than what it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint import load
from pipeline.formats import FORMATS, Format
from pipeline.layers import Fold, Layer, Method, QuantizedLayer, Stats, each
from pipeline.methods import METHODS, awq, gptq, rtn, search
from tests import reference_awq
from tests.test_convert import TOKENS, agreement, hf_logits
from tests.test_folds import layers_of, logits_of
from tests.tiny_models import save_tiny
from tests.toy_layers import block, samples, stats_of, toy_layer, two_matrices

CODED = [kind for kind in FORMATS.values() if kind.codes is not None]
by_name = pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.name)
SOME = [FORMATS[name] for name in ("Q4_0", "Q4_1", "Q4_K", "Q3_K", "IQ4_XS", "INT4_G32_ZP", "MXQ_B3_G64")]


def loss(layer: Layer, stats: dict[str, Stats], tensors: dict) -> float:
    """Summed mean square error of the outputs of matrices that no fold has changed."""
    return sum(
        awq.row_losses(q.dequantize() - layer.matrices[name], stats[name].hessian()).sum().item()
        for name, q in tensors.items()
    )


def two_consumers(seed: int) -> tuple[Layer, dict[str, Stats], np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    x = samples(60, 64, seed)
    matrices = {name: torch.randn(rows, 64, generator=generator) for name, rows in (("a", 6), ("b", 9))}
    layer = Layer(0, matrices, {"n": torch.ones(64)}, (Fold("n", ("a", "b")),))
    return layer, dict.fromkeys(matrices, stats_of(x)), x.double().numpy()


@pytest.mark.parametrize("seed", range(4))
def test_scales_equal_the_twins(seed: int) -> None:
    layer, stats, x = two_consumers(seed)
    formats = dict.fromkeys(layer.matrices, FORMATS["Q4_1"])
    found = awq.scale(layer, stats, formats, each(rtn.quantize), rtn.quantize)
    alpha, losses = reference_awq.search(x, [w.double().numpy() for w in layer.matrices.values()], awq.ALPHAS)
    assert alpha > 0
    expected = reference_awq.scales(x, alpha)
    np.testing.assert_allclose(found.scales["n"].numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(found.layer.vectors["n"].numpy(), 1 / expected, rtol=1e-4)
    assert awq.finished_loss(found, ["a", "b"]) == pytest.approx(min(losses), rel=2e-3)
    assert found.notes == []


@pytest.mark.parametrize("seed", range(3))
def test_clipping_equals_the_twins(seed: int) -> None:
    x = samples(80, 64, seed)
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    w[:, ::7] *= 2.5
    found = awq.clipped(w, stats_of(x), FORMATS["Q4_1"])[0].dequantize()
    expected = reference_awq.clipped(x.double().numpy(), w.double().numpy(), awq.CLIPS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, rtn.quantize(w, None, FORMATS["Q4_1"])[0].dequantize())


@by_name
def test_never_worse_than_rounding(kind: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "ALPHAS", (0.2, 0.5, 0.8))
    layer, stats = two_matrices()
    formats = dict.fromkeys(layer.matrices, kind)
    found = awq.scale(layer, stats, formats, each(awq.clipped), rtn.quantize)
    plain = loss(layer, stats, METHODS["rtn"].run(layer, stats, formats).tensors)
    assert awq.finished_loss(found, list(formats)) < 0.9 * plain
    assert list(found.tensors) == list(formats)


@pytest.mark.parametrize("kind", SOME, ids=lambda kind: kind.name)
@pytest.mark.parametrize("inner", [each(search.quantize), gptq.run], ids=["search", "gptq"])
def test_never_worse_than_what_it_wraps(inner: Method, kind: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "ALPHAS", (0.15,))
    layer, stats = two_matrices(1)
    formats = dict.fromkeys(layer.matrices, kind)
    found = awq.scale(layer, stats, formats, inner, search.quantize)
    plain = inner(layer, stats, formats).tensors
    before, after = loss(layer, stats, plain), awq.finished_loss(found, list(formats))
    assert after < before if found.scales else after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("awq", "Q8_0"), ("awq", "MXQ_B8_G32"), ("awq+search", "Q8_0"), ("awq+gptq", "Q8_0")],
)
def test_the_block_computes_the_same(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scales are taken back by what the method returns: an 8-bit block is the float block, nearly."""
    monkeypatch.setattr(awq, "ALPHAS", (0.25,))
    layer, stats = toy_layer(2)
    made: QuantizedLayer = METHODS[name].run(layer, stats, dict.fromkeys(layer.matrices, FORMATS[kind]))
    assert made.vectors.keys() == {"attn_norm.weight", "ffn_norm.weight", "attn_v.bias"}
    x = samples(50, 256, 9)
    expected = block(dict(layer.matrices), dict(layer.vectors), x) - x
    values = {n: q.dequantize() for n, q in made.tensors.items()}
    error = block(values, {**layer.vectors, **made.vectors}, x) - x - expected
    assert error.norm() / expected.norm() < 0.02
    unscaled = block(values, dict(layer.vectors), x) - x - expected
    assert unscaled.norm() / expected.norm() > 0.1


def test_scales_and_weights_agree() -> None:
    layer, stats = toy_layer(3)
    found = awq.scale(layer, stats, dict.fromkeys(layer.matrices, FORMATS["Q4_0"]), each(awq.clipped), rtn.quantize)
    assert found.scales.keys() == {fold.producer for fold in layer.folds}
    undone = 0.0
    for name, w in layer.matrices.items():
        values = found.tensors[name].dequantize() / found.column_scales[name]
        values = values * found.row_scales[name][:, None] if name in found.row_scales else values
        undone += awq.row_losses(values - w, stats[name].hessian()).sum().item()
    assert awq.finished_loss(found, list(layer.matrices)) == pytest.approx(undone, rel=1e-3)
    for name, w in layer.matrices.items():
        expected = w * found.column_scales[name]
        if name in found.row_scales:
            expected = expected / found.row_scales[name][:, None]
        torch.testing.assert_close(found.layer.matrices[name], expected)
        stats_after = found.inputs[name]
        torch.testing.assert_close(stats_after.mean_abs_x * found.column_scales[name], stats[name].mean_abs_x)
        assert found.column_scales[name].log().mean().abs() < 1e-5


def test_folds_that_do_not_help_are_said() -> None:
    """Inputs of equal size: scaling them does nothing."""
    layer, stats = toy_layer(4)
    even = {name: replace(known, mean_abs_x=torch.ones_like(known.mean_abs_x)) for name, known in stats.items()}
    made = METHODS["awq"].run(layer, even, dict.fromkeys(layer.matrices, FORMATS["Q4_0"]))
    assert made.notes == [
        "blk.0: 4 of 4 folds not scaled, as it does not help: ffn_up.weight, ffn_norm.weight, attn_v.weight, "
        "attn_norm.weight"
    ]
    assert made.vectors == {}


def test_only_planned_matrices_change() -> None:
    layer, stats = toy_layer(5)
    formats = {name: FORMATS["Q4_0"] for name in layer.matrices if name != "ffn_up.weight"}
    made = METHODS["awq"].run(layer, stats, formats)
    assert made.tensors.keys() == formats.keys()
    assert "ffn_norm.weight" not in made.vectors
    assert made.notes == [
        "blk.0.ffn_norm.weight: not scaled, ffn_up.weight keeps its float weights",
        "blk.0.ffn_up.weight: not scaled, ffn_up.weight keeps its float weights",
    ]


def test_inputs_that_are_never_active() -> None:
    layer, stats = toy_layer(6)
    dead = torch.zeros(400, 256)
    half = dead.clone()
    half[:, ::2] = samples(400, 128, 7)
    stats = {**stats, **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight"), stats_of(dead))}
    stats["ffn_down.weight"] = stats_of(half)
    made = METHODS["awq"].run(layer, stats, dict.fromkeys(layer.matrices, FORMATS["Q4_K"]))
    assert all(torch.isfinite(q.dequantize()).all() for q in made.tensors.values())
    assert all(torch.isfinite(v).all() for v in made.vectors.values())
    assert "ffn_norm.weight" not in made.vectors


def test_rows_searched_are_whole_pools() -> None:
    w = torch.zeros(1000, 1)
    assert len(awq._some_rows(w, FORMATS["Q4_0"])) == 256
    pooled = awq._some_rows(w, FORMATS["MXQ_B4_G32"])
    assert pooled.tolist() == [*range(128), *range(896, 1000)]
    assert awq._some_rows(w[:5], FORMATS["Q4_0"]).tolist() == [0, 1, 2, 3, 4]


def test_a_model_computes_the_same(tmp_path: Path) -> None:
    """Through llama.cpp: biases, shared heads and norms of a whole model after scaling, its weights in 8 bits."""
    model = save_tiny("llama-biased", tmp_path)
    checkpoint = load(tmp_path)
    layers = []
    for layer in layers_of(checkpoint):
        stats = {n: stats_of(samples(100, w.shape[1], seed=w.shape[1])) for n, w in layer.matrices.items()}
        made = METHODS["awq"].run(layer, stats, dict.fromkeys(layer.matrices, FORMATS["Q8_0"]))
        assert made.vectors.keys() == {"attn_norm.weight", "ffn_norm.weight", "attn_v.bias", "ffn_up.bias"}
        values = {name: q.dequantize() for name, q in made.tensors.items()}
        layers.append(replace(layer, matrices=values, vectors={**layer.vectors, **made.vectors}))
    top1, kl = agreement(hf_logits(model, TOKENS), logits_of(checkpoint, layers, tmp_path))
    assert top1 > 0.9
    assert kl < 5e-3
