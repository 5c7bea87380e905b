"""Heads that read the mean over tokens: against a mean taken by hand, saved and loaded, pruned, and as ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoders import MAX_TOKENS, TINY, save_encoder
from toy_tweets import save_toy_encoder, toy_tweets

from device.records import SlimpiError
from pipeline.encoder_parts import parts_of, sizes_of
from pipeline.encoders import Encoder, encode_batch, load_encoder
from pipeline.encoders import save_encoder as save
from pipeline.export.onnx import export_encoder, make_variant
from pipeline.pooling import POOLED, attach_pooling, pool_mean
from pipeline.prune.encoder import apply, whole_cut
from pipeline.tweets.transformer import FineTuning, components, encoder_logits, fine_tune

LABELS = ["no", "yes"]
TEXTS = ["fire", "a fire in the hills above the town", "no", "smoke over the road, and it is spreading fast"]


def pooled(family: str, folder: Path) -> Encoder:
    save_encoder(family, folder)
    encoder = load_encoder(folder, LABELS, MAX_TOKENS)
    pool_mean(encoder.model)
    return encoder


def by_hand(encoder: Encoder, text: str) -> np.ndarray:
    """One text, no padding: the mean of the states that the body's last layer leaves, then the family's own head."""
    states = []
    body, kind = encoder.model.base_model, encoder.model.config.model_type
    last = body.get_submodule(parts_of(kind).layers)[-1]
    hook = last.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        encoder.model(**encode_batch(encoder, [text], MAX_TOKENS))
    hook.remove()
    mean = states[0][0].double().mean(0).float()
    model = encoder.model
    with torch.no_grad():
        if kind == "bert":
            out = model.classifier(mean)
        elif kind == "distilbert":
            out = model.classifier(torch.relu(model.pre_classifier(mean)))
        else:
            out = model.classifier.out_proj(torch.tanh(model.classifier.dense(mean)))
    return out.numpy()


def test_every_pruned_family_can_be_pooled() -> None:
    assert set(TINY) == POOLED


@pytest.mark.parametrize("family", TINY)
def test_logits_are_those_of_the_mean_by_hand(family: str, tmp_path: Path) -> None:
    first = encoder_logits(load_encoder(_saved(family, tmp_path / "a"), LABELS, MAX_TOKENS), TEXTS, MAX_TOKENS)
    encoder = pooled(family, tmp_path / "b")
    found = encoder_logits(encoder, TEXTS, MAX_TOKENS)  # one padded batch
    expected = np.stack([by_hand(encoder, text) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - first).max() > 1e-2


@pytest.mark.parametrize("family", TINY)
def test_models_that_answer_with_tuples_read_the_mean_too(family: str, tmp_path: Path) -> None:
    encoder = pooled(family, tmp_path)
    batch = encode_batch(encoder, TEXTS, MAX_TOKENS)
    with torch.no_grad():
        named, bare = encoder.model(**batch).logits, encoder.model(**batch, return_dict=False)[0]
    assert torch.equal(named, bare)


def _saved(family: str, folder: Path) -> Path:
    save_encoder(family, folder)
    return folder


@pytest.mark.parametrize("family", TINY)
def test_it_is_saved_loaded_and_exported(family: str, tmp_path: Path) -> None:
    encoder = pooled(family, tmp_path / "hf")
    attach_pooling(encoder.model)  # a second time changes nothing
    save(encoder, tmp_path / "saved")
    loaded = load_encoder(tmp_path / "saved", LABELS, MAX_TOKENS)
    assert loaded.fresh == ()
    expected = encoder_logits(encoder, TEXTS, MAX_TOKENS)
    np.testing.assert_array_equal(encoder_logits(loaded, TEXTS, MAX_TOKENS), expected)
    export_encoder(tmp_path / "saved", tmp_path / "onnx", LABELS, MAX_TOKENS)  # compares with torch, texts padded
    make_variant(tmp_path / "onnx" / "model.onnx", tmp_path / "int8", "INT8-dynamic")


@pytest.mark.parametrize("family", TINY)
def test_a_pruned_copy_pools_its_own_states(family: str, tmp_path: Path) -> None:
    encoder = pooled(family, tmp_path / "hf")
    before = encoder_logits(encoder, TEXTS, MAX_TOKENS)
    cut = replace(whole_cut(sizes_of(encoder.model.config.to_dict(), "it")), heads=((0, 2), (1,)))
    made = Encoder(apply(encoder.model, cut), encoder.tokenizer, ())
    expected = np.stack([by_hand(made, text) for text in TEXTS])
    encoder_logits(encoder, TEXTS[:1], MAX_TOKENS)  # the whole model's masks are its own
    np.testing.assert_allclose(encoder_logits(made, TEXTS, MAX_TOKENS), expected, atol=1e-5)
    assert np.abs(expected - before).max() > 1e-2
    save(made, tmp_path / "saved")
    export_encoder(tmp_path / "saved", tmp_path / "onnx", LABELS, MAX_TOKENS)


@pytest.mark.parametrize("family", TINY)
def test_it_learns_in_the_pooled_form(family: str, tmp_path: Path) -> None:
    save_toy_encoder(family, tmp_path)
    sets = [
        ([t.text for t in tweets], [int(t.target or 0) for t in tweets])
        for tweets in (toy_tweets(160, 0), toy_tweets(40, 1))
    ]
    settings = FineTuning(epochs=8, learning_rate=2e-3, batch_size=16, patience=20, pooling="mean")
    fit = fine_tune(tmp_path, *sets, LABELS, MAX_TOKENS, settings, 0)
    assert not [name for name, _ in fit.encoder.model.named_parameters() if "pooler" in name]
    assert all(components(fit.encoder.model).values())
    tests = toy_tweets(60, 2)
    logits = encoder_logits(fit.encoder, [t.text for t in tests], MAX_TOKENS)
    assert (logits.argmax(1) == [t.target for t in tests]).mean() > 0.7


def test_a_family_with_a_summary_of_its_own_is_told(tmp_path: Path) -> None:
    save_encoder("xlnet", tmp_path)
    with pytest.raises(SlimpiError, match='xlnet has no pooling = "mean"'):
        pool_mean(load_encoder(tmp_path, LABELS, MAX_TOKENS).model)
