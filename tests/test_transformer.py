"""Fine-tuning by component: what learns and what does not, stopping, batches, and what the tokenizer tidies."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_encoders import MAX_TOKENS, TINY, save_encoder
from tokenizers import Tokenizer
from toy_tweets import save_toy_encoder, toy_tweets
from transformers import AutoModelForSequenceClassification

from device.records import SlimpiError
from pipeline import encoders
from pipeline.encoders import load_encoder
from pipeline.export.onnx import bare_tokenizer, export_encoder
from pipeline.tweets import transformer
from pipeline.tweets.batches import length_batches
from pipeline.tweets.classifiers import on_this_machine
from pipeline.tweets.transformer import (
    FineTuned,
    FineTuning,
    calibrated_loss,
    components,
    cross_entropy,
    encoder_logits,
    fine_tune,
    tidy_tokenizer,
)

LABELS = ["no", "yes"]
QUICK = FineTuning(epochs=1, learning_rate=1e-3, batch_size=16)


def rows(n: int, seed: int = 0) -> tuple[list[str], list[int]]:
    tweets = toy_tweets(n, seed)
    return [t.text for t in tweets], [int(t.target or 0) for t in tweets]


def tune(folder: Path, settings: FineTuning, seed: int = 0) -> FineTuned:
    return fine_tune(folder, rows(60), rows(30, 1), LABELS, MAX_TOKENS, settings, seed)


@pytest.mark.parametrize("family", TINY)
def test_components_are_all_parameters_once(family: str, tmp_path: Path) -> None:
    save_encoder(family, tmp_path)
    model = load_encoder(tmp_path, LABELS, MAX_TOKENS).model
    found = components(model)
    assert list(found) == ["embeddings", "layer.0", "layer.1", "head"]
    listed = [id(p) for part in found.values() for p in part]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("embeddings" in names[id(p)] for p in found["embeddings"])
    assert all(".1." in names[id(p)] for p in found["layer.1"])
    assert any("classifier" in names[id(p)] for p in found["head"])


@pytest.mark.parametrize("trained", ["all", "head", "layer.1, head"])
def test_only_the_named_components_learn(trained: str, tmp_path: Path) -> None:
    save_encoder("bert", tmp_path)
    before = components(load_encoder(tmp_path, LABELS, MAX_TOKENS).model)
    fit = tune(tmp_path, FineTuning(**{**QUICK_TABLE, "trained": trained}))
    wanted = list(before) if trained == "all" else trained.split(", ")
    assert list(fit.trained) == wanted
    for name, after in components(fit.encoder.model).items():
        moved = [not torch.equal(a, b) for a, b in zip(before[name], after, strict=True)]
        assert any(moved) == (name in wanted), name


QUICK_TABLE = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 16}


@pytest.mark.parametrize("family", TINY)
def test_it_learns_and_exports_as_any_encoder(family: str, tmp_path: Path) -> None:
    save_toy_encoder(family, tmp_path / "hf")
    settings = FineTuning(epochs=8, learning_rate=2e-3, batch_size=16, patience=20)
    fit = fine_tune(tmp_path / "hf", rows(160), rows(40, 1), LABELS, MAX_TOKENS, settings, 0)
    texts, targets = rows(60, 2)
    logits = encoder_logits(fit.encoder, texts, MAX_TOKENS)
    assert (logits.argmax(1) == targets).mean() > 0.7
    assert fit.validation_losses[fit.best_evaluation] == min(fit.validation_losses)
    best = calibrated_loss(encoder_logits(fit.encoder, rows(40, 1)[0], MAX_TOKENS), rows(40, 1)[1])
    assert best == pytest.approx(min(fit.validation_losses), abs=1e-6)
    encoders.save_encoder(fit.encoder, tmp_path / "tuned")
    export_encoder(tmp_path / "tuned", tmp_path / "onnx", LABELS, MAX_TOKENS)  # compares with torch itself
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), fit.encoder.model.parameters(), strict=True))


def test_bf16_products_give_fp32_weights_near_those_of_fp32(tmp_path: Path) -> None:
    save_toy_encoder("bert", tmp_path)
    settings = {"epochs": 8, "learning_rate": 2e-3, "batch_size": 16, "patience": 20}
    texts, targets = rows(60, 2)
    fits = [
        fine_tune(tmp_path, rows(160), rows(40, 1), LABELS, MAX_TOKENS, FineTuning(**settings, precision=precision), 0)
        for precision in ("fp32", "bf16")
    ]
    losses = [fit.validation_losses[0] for fit in fits]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert {p.dtype for p in fits[1].encoder.model.parameters()} == {torch.float32}
    logits = encoder_logits(fits[1].encoder, texts, MAX_TOKENS)
    assert (logits.argmax(1) == targets).mean() > 0.7


@pytest.mark.parametrize(
    ("flags", "products"), [("fpu amx_bf16 avx2", "bf16"), ("fpu avx512_bf16", "bf16"), ("fpu avx2", "fp32")]
)
def test_auto_goes_by_what_the_processor_multiplies(
    flags: str, products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(transformer, "Path", lambda unused: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    transformer._multiplies_bf16.cache_clear()
    assert FineTuning().products == products
    assert (FineTuning(precision="fp32").products, FineTuning(precision="bf16").products) == ("fp32", "bf16")
    table = {"epochs": 2}
    known_by = {"epochs": 2, "precision": products}
    assert on_this_machine("transformer", table) == known_by
    members = [{"classifier": "transformer", "settings": table}, {"classifier": "mlp", "settings": {"vectors": ["x"]}}]
    found = on_this_machine("ensemble", {"members": members})["members"]
    assert found[0]["settings"] == known_by
    assert "precision" not in found[1]["settings"]
    transformer._multiplies_bf16.cache_clear()


def test_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    """A rate far too high: the loss never falls again after its first evaluations."""
    save_encoder("bert", tmp_path)
    settings = FineTuning(epochs=30, learning_rate=0.5, batch_size=16, patience=2, warmup_share=0.0)
    fit = tune(tmp_path, settings)
    assert len(fit.validation_losses) == fit.best_evaluation + 1 + 2
    logits = encoder_logits(fit.encoder, rows(30, 1)[0], MAX_TOKENS)
    assert calibrated_loss(logits, rows(30, 1)[1]) == pytest.approx(min(fit.validation_losses), rel=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_the_calibrated_loss_is_that_of_the_best_temperature(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, 80)
    logits = rng.normal(0, 1, (80, 2)) + np.eye(2)[targets]
    found = calibrated_loss(logits * scale, targets)
    tried = min(cross_entropy(logits / t, targets) for t in np.geomspace(0.2, 5, 400))
    assert found == pytest.approx(tried, abs=1e-4)
    assert found <= cross_entropy(logits * scale, targets) + 1e-6


def test_bad_input_is_told(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path)
    with pytest.raises(SlimpiError, match="0 training and 30 validation rows"):
        fine_tune(tmp_path, ([], []), rows(30), LABELS, MAX_TOKENS, QUICK, 0)
    with pytest.raises(SlimpiError, match=r"no component 'layer\.9'"):
        tune(tmp_path, FineTuning(trained="layer.9, head"))
    with pytest.raises(SlimpiError, match=r"the loss became .*Take a smaller learning_rate than 1e\+30"):
        tune(tmp_path, FineTuning(learning_rate=1e30, epochs=3, warmup_share=0.0))


def test_tidying_is_part_of_the_saved_tokenizer(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path)
    encoder = load_encoder(tmp_path, LABELS, MAX_TOKENS)
    plain = encoder.tokenizer("fire http & here").input_ids
    long = "fire https://t.co/aB3dE5 &amp; here"
    assert len(encoder.tokenizer(long).input_ids) > len(plain)
    tidy_tokenizer(encoder)
    assert encoder.tokenizer(long).input_ids == plain
    assert encoder.tokenizer("fire\x89ÛÒhere").input_ids == encoder.tokenizer("fire here").input_ids
    saved = Tokenizer.from_str(bare_tokenizer(encoder.tokenizer).decode())
    assert saved.encode(long).ids == plain
    assert saved.encode("").ids == encoder.tokenizer("").input_ids


@given(st.lists(st.integers(0, 80), min_size=1, max_size=200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_batches_are_a_partition_of_like_lengths(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = length_batches(lengths, batch_size, np.random.default_rng(seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches if len(batch) != len(lengths) % batch_size)
    spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
    for (_, high), (low, _) in pairwise(spans):
        assert high - low <= 4  # the noise of two neighbours
