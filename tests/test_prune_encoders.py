"""Pruned encoders are run: their ONNX files against torch, what was measured against the model that was made of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import test_train_recipe
import torch
from tiny_encoders import MAX_TOKENS, PROSE, TINY, save_encoder
from tokenizers import Tokenizer

from device.records import SlimpiError
from pipeline import deploy
from pipeline.build import build
from pipeline.encoder_parts import parts_of
from pipeline.encoders import Encoder, load_encoder
from pipeline.encoders import save_encoder as save
from pipeline.export.onnx import describe_onnx, export_encoder, make_variant
from pipeline.export.onnx_observe import Calibration, batches, in_batches, logits_of
from pipeline.progress import Progressor
from pipeline.prune import PruneSpec
from pipeline.prune.encoder import (
    ENCODER_PRUNERS,
    EncoderCut,
    Pruning,
    apply,
    column_scores,
    layers,
    n_kept,
    prune_encoder,
    whole_cut,
)
from pipeline.prune.encoder_passes import divergence, log_p
from pipeline.pruning_onnx import parse_variant
from pipeline.recipes import Recipe
from pipeline.store import Places, load_artifact
from pipeline.tweets import data
from pipeline.tweets.transformer import cross_entropy

LABELS = ["quiet", "alarm", "noise"]
PERCENT = {"layers": 25, "heads": 50, "channels": 30}  # 30 % of 128 channels: 96 stay
SIZES = {"num_hidden_layers": 4, "n_layers": 4, "intermediate_size": 128, "hidden_dim": 128}
CPU = torch.device("cpu")


def save_deeper(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, n_labels: int = 3) -> None:
    """Four layers of 128 channels, each of which changes the stream less than `save_encoder`'s wide weights do."""
    monkeypatch.setitem(TINY, family, {k: SIZES.get(k, v) for k, v in TINY[family].items()})
    save_encoder(family, folder, n_labels)


@pytest.fixture(params=TINY)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_deeper(request.param, tmp_path / "hf", monkeypatch)
    return tmp_path


def passages(folder: Path, first: int, n: int) -> Calibration:
    """Sentences of the demo's prose."""
    reader = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    reader.no_padding()
    reader.enable_truncation(MAX_TOKENS)
    sentences = [s.strip() for s in PROSE.read_text(encoding="utf-8").replace("\n", " ").split(".") if s.strip()]
    return Calibration("prose", reader.encode_batch(sentences[first : first + n]))


def subject(folder: Path, n: int = 48) -> Pruning:
    return Pruning(load_encoder(folder / "hf", LABELS, MAX_TOKENS), passages(folder, 0, n), CPU)


def saved_and_loaded(encoder: Encoder, folder: Path) -> Any:
    save(encoder, folder)
    return load_encoder(folder, LABELS, MAX_TOKENS).model


@pytest.mark.parametrize(("pruner", "repair"), [("layers", "repair"), ("heads", ""), ("channels", "repair")])
def test_the_onnx_file_computes_what_the_pruned_model_does(folder: Path, pruner: str, repair: str) -> None:
    """And its folder loads, says its sizes, is smaller, and diverges as was measured; INT8 is made of it as of any."""
    whole = subject(folder)
    pruned, facts = prune_encoder(whole, PruneSpec(pruner, repair, PERCENT[pruner]))
    loaded = saved_and_loaded(pruned, folder / "pruned")
    unseen = passages(folder, 60, 24)
    expected = log_p(pruned.model, unseen)
    saved, kept = pruned.model.state_dict(), loaded.state_dict()
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    # Not bit for bit: how weights lie in memory decides the order in which some CPUs' products are summed.
    assert (log_p(loaded, unseen) - expected).abs().max() < 1e-5
    export_encoder(folder / "pruned", folder / "onnx", LABELS, MAX_TOKENS)
    logits = logits_of((folder / "onnx" / "model.onnx").read_bytes(), unseen)
    assert (torch.log_softmax(torch.from_numpy(logits).double(), -1) - expected).abs().max() < 1e-4
    assert np.abs(logits - torch_logits(loaded, unseen)).max() < 1e-4
    measured = divergence(log_p(whole.encoder.model, whole.passages), log_p(loaded, whole.passages))
    assert facts["kl_divergence"] == pytest.approx(measured, rel=1e-3)
    assert measured > 1e-6
    assert sizes(folder / "pruned") == {"layers": (3, 4, 128), "heads": (4, 2, 128), "channels": (4, 4, 96)}[pruner]
    summary = describe_onnx(folder / "onnx" / "model.onnx")
    assert summary.n_weights == sum(p.numel() for p in loaded.parameters())
    assert summary.n_weights < sum(p.numel() for p in whole.encoder.model.parameters())
    # 0.07 to 0.51 for random weights, by family and CPU: the whole model's own is what it compares with.
    save(whole.encoder, folder / "whole")
    export_encoder(folder / "whole", folder / "whole_onnx", LABELS, MAX_TOKENS)
    assert int8_error(folder / "onnx", unseen) < min(0.7, 0.1 + 1.5 * int8_error(folder / "whole_onnx", unseen))


def int8_error(folder: Path, text: Calibration) -> float:
    """Of INT8-dynamic's logits, as a share of the spread of the exported model's over the passages: 1 is the mean's."""
    make_variant(folder / "model.onnx", folder / "int8", "INT8-dynamic")
    logits, rounded = (logits_of((path / "model.onnx").read_bytes(), text) for path in (folder, folder / "int8"))
    return float(np.linalg.norm(rounded - logits) / np.linalg.norm(logits - logits.mean(0)))


def torch_logits(model: Any, text: Calibration) -> np.ndarray:
    """One passage at a time."""
    rows = []
    with torch.inference_mode():
        for i in in_batches(text):
            ids = torch.tensor([text.encodings[i].ids])
            rows.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy())
    return np.array(rows)


def sizes(folder: Path) -> tuple[int, int, int]:
    """As config.json says: layers, heads that stay in each of them, channels."""
    config = json.loads((folder / "config.json").read_text())
    parts = parts_of(config["model_type"])
    n_layers, n_heads = config[parts.n_layers], config[parts.n_heads]
    kept = {n_heads - len(config.get("pruned_heads", {}).get(str(i), [])) for i in range(n_layers)}
    assert len(kept) == 1
    return n_layers, kept.pop(), config[parts.n_channels]


@pytest.mark.parametrize("pruner", ENCODER_PRUNERS)
def test_repair_reduces_the_divergence_on_unseen_text(folder: Path, pruner: str) -> None:
    whole, unseen = subject(folder, 120), passages(folder, 130, 40)
    reference = log_p(whole.encoder.model, unseen)
    lost = {}
    for repair in ("", "repair"):
        made, facts = prune_encoder(whole, PruneSpec(pruner, repair, PERCENT[pruner]))
        lost[repair] = divergence(reference, log_p(made.model, unseen))
    assert lost["repair"] < lost[""]
    assert facts["refit"]
    assert facts["kl_divergence"] < facts["kl_divergence_unrepaired"]


def test_the_layer_that_goes_first_is_the_one_that_costs_least(folder: Path) -> None:
    """Against models with config and weights of each choice, made one by one."""
    whole = subject(folder)
    model, cut = whole.encoder.model, whole_cut(whole.sizes)
    reference = log_p(model, whole.passages)
    costs = []
    for gone in range(4):
        kept = tuple(i for i in range(4) if i != gone)
        made = apply(model, EncoderCut(kept, cut.heads[:3], cut.channels[:3]))
        costs.append(divergence(reference, log_p(made, whole.passages)))
    assert layers(whole, 3).layers == tuple(i for i in range(4) if i != int(np.argmin(costs)))
    assert torch.equal(log_p(model, whole.passages), reference)  # nothing of it was changed


def test_scores_are_weights_and_inputs_squared(folder: Path) -> None:
    """Against the inputs of each matrix, taken down and squared by numpy."""
    whole = subject(folder, 6)
    model = whole.encoder.model
    path = parts_of(model.config.model_type).mlp
    block = model.base_model.get_submodule(parts_of(model.config.model_type).layers)[1]
    rows: list[np.ndarray] = []
    hook = block.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0].numpy()))
    with torch.inference_mode():
        for feed in batches(whole.passages, ["input_ids", "attention_mask"]):
            model(**{k: torch.from_numpy(v) for k, v in feed.items()})
    hook.remove()
    x = np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows]).astype(np.float64)
    expected = (block.get_submodule(path).weight.detach().numpy().astype(np.float64) ** 2).sum(0) * (x**2).mean(0)
    assert column_scores(whole, path)[1].numpy() == pytest.approx(expected, rel=1e-5)


def test_heads_that_are_gone_are_those_that_are_masked(folder: Path) -> None:
    """Other heads in every layer: against the whole model with zeros in the columns that read them."""
    whole = subject(folder)
    parts, cut = parts_of(whole.encoder.model.config.model_type), whole_cut(whole.sizes)
    kept = ((0, 2), (1, 3), (0, 1), (2, 3))
    made = apply(whole.encoder.model, replace(cut, heads=kept))
    masked = apply(whole.encoder.model, cut)
    for block, own in zip(masked.base_model.get_submodule(parts.layers), kept, strict=True):
        for head in set(range(4)) - set(own):
            block.get_submodule(parts.attention).weight.data[:, head * 8 : head * 8 + 8] = 0
    assert (log_p(made, whole.passages) - log_p(masked, whole.passages)).abs().max() < 1e-4


def recipe(tmp_path: Path, variants: list[str], family: str = "bert", **more: Any) -> Recipe:
    return msgspec.convert(
        {
            "name": "tiny",
            "source": f"path:{tmp_path / 'hf'}",
            "export": "onnx",
            "variants": variants,
            "labels": LABELS[:2],
            "max_tokens": MAX_TOKENS,
            "calibration": {"text": f"path:{PROSE}", "n_chunks": 24},
            "prune": {"passages": 16},
            "golden": {"dataset": "demo:tweets_test.csv", "n": 6},
            "bench": {"limit": 8},
            **more,
        },
        Recipe,
    )


def test_pruned_variants_of_a_recipe_run_on_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_deeper("mpnet", tmp_path / "hf", monkeypatch, 2)
    places = Places(tmp_path / "home")
    variants = ["FP32", "LAYERS-50-FP32", "HEADS+REPAIR-50-INT8-dynamic", "CHANNELS-30-INT8-static"]
    folders = build(recipe(tmp_path, variants), places, Progressor(plain=True))
    whole = load_artifact(folders[0])
    for folder, name in zip(folders, variants, strict=True):
        artifact = load_artifact(folder)
        report = deploy.bench("local", folder, places, threads=1, overrides={})
        measured = {m.metric: m for result in report.results for m in result.measurements}
        assert max(measured["kl_divergence"].samples) < 1e-6
        assert (artifact.variant, artifact.tokenizer_sha256) == (name, whole.tokenizer_sha256)
        if name == "FP32":
            continue
        actions = [step.action for step in artifact.lineage]
        assert actions == ["export", "prune", *(["calibrate"] if "static" in name else []), "onnx variant"]
        facts = artifact.lineage[1].settings
        assert artifact.n_weights < whole.n_weights
        assert facts["n_passages"] == 16
        assert (len(facts["layers"]), len(facts["heads"][0]), facts["channels"][0]) == {
            "LAYERS": (2, 4, 128),
            "HEADS+REPAIR": (4, 2, 128),
            "CHANNELS": (4, 4, 96),
        }[name.partition("-")[0]]
        assert re.match(rf"{re.escape('-'.join(name.split('-')[:2]))}, \d+ % of the \w+ asked: ", artifact.notes[0])
    assert "96 of 128 channels in every layer stay (a multiple of 32), 25.0 % of them" in artifact.notes[0]


def test_a_trained_transformer_is_pruned_and_calibrated_again(tmp_path: Path) -> None:
    places = Places(tmp_path / "home")
    made = test_train_recipe.recipe(tmp_path, "transformer", ["FP32", "LAYERS-50-INT8-dynamic"])
    made = msgspec.structs.replace(made, calibration=recipe(tmp_path, ["FP32"]).calibration)
    whole, folder = build(made, places, Progressor(plain=True))
    artifact = load_artifact(folder)
    assert (folder / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert [step.action for step in artifact.lineage] == ["train transformer", "prune", "onnx variant"]
    assert any(note.startswith("calibrated again after pruning: temperature") for note in artifact.notes)
    report = deploy.bench("local", folder, places, threads=1, overrides={})
    assert all(result.status == "ok" for result in report.results)


def test_training_on_after_pruning_mends_what_pruning_lost(tmp_path: Path) -> None:
    """By the labels of rows that were held out; the rows are those of the first training, the tokenizer stays."""
    places = Places(tmp_path / "home")
    variants = ["FP32", "LAYERS-50-FP32", "LAYERS+TRAIN-50-FP32"]
    made = test_train_recipe.recipe(tmp_path, "transformer", variants)
    made = msgspec.structs.replace(made, calibration=recipe(tmp_path, ["FP32"]).calibration)
    whole, cut, trained = build(made, places, Progressor(plain=True))
    assert (trained / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    step = next(step for step in load_artifact(trained).lineage if step.action == "prune")
    before = next(step for step in load_artifact(cut).lineage if step.action == "prune").settings
    assert step.settings["kl_divergence_unrepaired"] == before["kl_divergence"]
    assert step.settings["layers"] == before["layers"]
    losses = step.settings["validation_losses"]
    assert losses[step.settings["best_evaluation"]] == min(losses)
    assert any("before it was trained on" in note for note in load_artifact(trained).notes)
    assert held_loss(cut, made) > 2 * held_loss(trained, made)


def held_loss(folder: Path, made: Recipe) -> float:
    """Cross-entropy of the artifact's own graph on the rows that its training held out, nats."""
    assert made.train is not None
    tweets = data.read_tweets(Path(made.train.rows.removeprefix("path:")))
    held = [tweets[i] for i in data.split(tweets, made.train.validation_share, made.train.seed).test]
    reader = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = Calibration("held", reader.encode_batch([t.text for t in held]))
    logits = logits_of((folder / "model.onnx").read_bytes(), text)
    return cross_entropy(logits, [int(held[i].target or 0) for i in in_batches(text)])


def test_training_on_needs_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_deeper("bert", tmp_path / "hf", monkeypatch, 2)
    places = Places(tmp_path / "home")
    with pytest.raises(SlimpiError, match=r"LAYERS\+TRAIN-50: the recipe has no \[train\] rows"):
        build(recipe(tmp_path, ["FP32", "LAYERS+TRAIN-50-FP32"]), places, Progressor(plain=True))
    assert not list(places.artifacts.glob("tiny*"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((f"LAYERS-{percent}-FP32", "give the percentage of the layers to remove") for percent in ("0", "100", "x")),
        ("HEADS-nan-FP32", "the percentage of the heads"),
        ("LAYERS-33", "says how to prune, not what to write. Name it after that: LAYERS-33-INT8-dynamic"),
        ("LAYERS-33-HEADS-50-FP32", "prunes twice"),
        ("LAYERS-33-INT2", "unknown ONNX variant 'INT2'"),
        ("DEPTH-33-FP32", "unknown pruner 'DEPTH'.*among LAYERS, HEADS, CHANNELS"),
        ("WIDTHS-25-FP32", "unknown pruner 'WIDTHS'"),
        ("layers-33-FP32", "unknown pruner 'layers'"),
        ("LAYERS+BIAS-33-FP32", "unknown repair 'BIAS' after LAYERS. Known: REPAIR, TRAIN"),
        ("INT2", "unknown ONNX variant 'INT2'.*Encoders are pruned by PRUNER-PERCENT-"),
    ],
)
def test_wrong_names_are_told(name: str, said: str) -> None:
    with pytest.raises(SlimpiError, match=said) as caught:
        parse_variant(name)
    assert "\n" not in str(caught.value)


def test_a_name_is_the_plain_one_and_how_it_is_pruned() -> None:
    assert parse_variant("HEADS+REPAIR-12.5-INT8-static-S8S8") == (
        PruneSpec("heads", "repair", 12.5),
        "INT8-static-S8S8",
    )
    assert parse_variant("INT8-static-S8S8") == (None, "INT8-static-S8S8")


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("LAYERS-10-FP32", "of 4 layers, all would stay. Prune another share, 25 % is one step"),
        ("LAYERS-90-FP32", "of 4 layers, none would stay"),
        ("HEADS-10-FP32", "of 4 heads in a layer, all would stay"),
        ("CHANNELS-5-FP32", "of 128 channels in a layer in multiples of 32, all would stay"),
        ("CHANNELS-90-FP32", "in multiples of 32, none would stay"),
    ],
)
def test_shares_that_round_to_none_or_all_are_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, said: str
) -> None:
    save_deeper("distilbert", tmp_path / "hf", monkeypatch, 2)
    places = Places(tmp_path / "home")
    with pytest.raises(SlimpiError, match=said):
        build(recipe(tmp_path, ["FP32", variant]), places, Progressor(plain=True))
    assert not list(places.artifacts.glob("tiny*"))


def test_channels_come_in_multiples_of_32(folder: Path) -> None:
    sizes = subject(folder, 1).sizes
    assert [n_kept(PruneSpec("channels", "", percent), sizes) for percent in (15, 25, 35, 40)] == [96, 96, 96, 64]


def test_other_families_and_classifiers_are_refused(tmp_path: Path) -> None:
    save_encoder("xlnet", tmp_path / "hf")
    places = Places(tmp_path / "home")
    with pytest.raises(SlimpiError, match=r"a xlnet cannot be pruned\. Take one of bert, distilbert, mpnet, roberta"):
        build(recipe(tmp_path, ["FP32", "LAYERS-50-FP32"]), places, Progressor(plain=True))
    for name in ("mlp", "lstm", "tfidf", "embeddings"):
        with pytest.raises(SlimpiError, match=f"LAYERS-50: a trained {name} has no layers of an encoder to prune"):
            build(test_train_recipe.recipe(tmp_path, name, ["FP32", "LAYERS-50-FP32"]), places, Progressor(plain=True))
    assert not list(places.artifacts.glob("*-*"))


def test_heads_are_not_pruned_twice(tmp_path: Path) -> None:
    model = save_encoder("bert", tmp_path / "hf", 2)
    model.prune_heads({0: [1]})
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(SlimpiError, match="has lost heads already"):
        build(recipe(tmp_path, ["FP32", "LAYERS-50-FP32"]), Places(tmp_path / "home"), Progressor(plain=True))
