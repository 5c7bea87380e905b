"""Distances from what a classifier learned from: against a naive twin, in every graph, in INT8, and on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import outliers as bench
import pytest
import torch
from jobs import artifact
from tiny_encoders import MAX_TOKENS, TINY
from toy_tweets import ODD, save_toy_encoder, toy_settings, toy_tweets, write_vectors

from device import classify as device_classify
from device.classifier import OnnxClassifier
from device.records import SlimpiError, encode_line
from device.schema import DISTANCE
from device.words import Text
from pipeline.encoders import encode_batch, load_encoder
from pipeline.export.onnx import describe_onnx, make_variant, one_thread
from pipeline.export.onnx_graph import Graph
from pipeline.store import write_manifest
from pipeline.tweets.classifiers import CLASSIFIERS
from pipeline.tweets.classifiers.encoder import LABELS
from pipeline.tweets.decide import Decider, feeds_of, train_decider
from pipeline.tweets.outliers import QUANTILE, add_features, check_layers, fit_outliers

TOLD = [name for name, entry in CLASSIFIERS.items() if entry.layered]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outliers")
    write_vectors(folder / "vectors.txt")
    save_toy_encoder("bert", folder / "hf")
    return folder


def train(name: str, places: Path, told: bool = True) -> Decider:
    table = toy_settings(name, places / "vectors.txt")
    folders = (places / "hf", places / "cache", places / "work")
    return train_decider(name, table, toy_tweets(), *folders, validation_share=0.2, outliers=told)


@pytest.fixture(scope="module", params=TOLD)
def told(request: pytest.FixtureRequest, places: Path) -> tuple[Decider, Path]:
    decider = train(request.param, places)
    decider.export(places / request.param)
    return decider, places / request.param


def run(path: Path, decider: Decider, tweets: list, *outputs: str) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), one_thread(), providers=["CPUExecutionProvider"])
    feeds = feeds_of(decider.model.spec, decider.model.tokenizer, decider.model.max_tokens, tweets)
    return session.run(list(outputs), {value.name: feeds[value.name] for value in session.get_inputs()})


def test_distances_equal_a_naive_twin() -> None:
    """Loops and a plain inverse of the covariance that scikit-learn shrinks."""
    from sklearn.covariance import ledoit_wolf

    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 5)) @ rng.standard_normal((5, 5)) + 3
    held, new = features[:60] + 0.1, 2 * rng.standard_normal((20, 5))
    found = fit_outliers(features, held)
    mean = features.mean(0)
    inverse = np.linalg.inv(ledoit_wolf(features)[0])

    def squared(x: np.ndarray) -> float:
        return float((x - mean) @ inverse @ (x - mean))

    unit = np.quantile([squared(x) for x in held], QUANTILE)
    np.testing.assert_allclose(found.distances(new), [squared(x) / unit for x in new], rtol=1e-9)
    assert (found.distances(held) > 1).mean() == pytest.approx(1 - QUANTILE, abs=0.02)


def test_the_graph_tells_them_beside_the_same_logits(told: tuple[Decider, Path], places: Path) -> None:
    decider, folder = told
    tweets = [*toy_tweets(12, seed=7), *ODD]
    logits, distance = run(folder / "model.onnx", decider, tweets, "logits", DISTANCE)
    assert distance.shape == (len(tweets),)
    np.testing.assert_allclose(logits, decider.logits(tweets), atol=1e-3)
    assert decider.outliers is not None
    features = by_hand(decider, tweets)
    np.testing.assert_allclose(distance, decider.outliers.distances(features), rtol=2e-3, atol=1e-4)
    assert np.ptp(distance) > 0.05


def by_hand(decider: Decider, tweets: list) -> np.ndarray:
    """One text after the other through torch: the mean state behind the first of the tiny encoder's two layers."""
    model = decider.model
    encoder = model.encoder if hasattr(model, "encoder") else model.embedder.encoder
    found = []
    for tweet in tweets:
        batch = encode_batch(encoder, [tweet.text], model.max_tokens)
        with torch.no_grad():
            states = encoder.model.base_model(**batch, output_hidden_states=True).hidden_states
        found.append(states[1][0].double().mean(0).numpy())
    return np.stack(found)


def test_int8_keeps_the_distance_in_fp32(places: Path) -> None:
    decider = train("transformer", places)
    folder = places / "int8"
    decider.export(folder)
    make_variant(folder / "model.onnx", folder / "int8", "INT8-dynamic")
    tweets = toy_tweets(40, seed=3)
    whole, small = (run(f / "model.onnx", decider, tweets, DISTANCE)[0] for f in (folder, folder / "int8"))
    np.testing.assert_allclose(small, whole, rtol=0.25, atol=0.05)
    plain = train("transformer", places, told=False)
    plain.export(folder / "plain")
    assert describe_onnx(folder / "model.onnx").n_weights == describe_onnx(folder / "plain" / "model.onnx").n_weights


def test_the_device_says_it_and_is_silent_where_there_is_none(places: Path) -> None:
    for with_it in (True, False):
        decider = train("transformer", places, told=with_it)
        folder = places / f"device-{with_it}"
        decider.export(folder)
        made = artifact(folder, "onnx")
        with OnnxClassifier(folder, made, 1) as model:
            logits, distance = model.judge(Text("smoke near our house"))
            np.testing.assert_array_equal(logits, model.logits([Text("smoke near our house")])[0])
        line = encode_line(device_classify.predict(0, logits, distance, made.labels))
        assert (b'"distance":' in line) == with_it == (distance is not None)


@pytest.mark.parametrize("name", ["mlp", "ensemble"])
def test_those_that_are_no_encoder_are_refused_before_they_train(
    name: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CLASSIFIERS, name, replace(CLASSIFIERS[name], train=None))
    with pytest.raises(SlimpiError, match=f"{name} has no layers of an encoder.*embeddings, transformer"):
        train(name, places)


@pytest.mark.parametrize("name", TOLD)
def test_an_encoder_without_such_layers_is_refused_before_it_trains(
    name: str, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_toy_encoder("xlnet", tmp_path)
    monkeypatch.setitem(CLASSIFIERS, name, replace(CLASSIFIERS[name], train=None))
    with pytest.raises(SlimpiError, match="cannot tell the layers of an encoder with 4 LayerNorms"):
        train_decider(name, {}, toy_tweets(), tmp_path, places / "cache", places / "work", outliers=True)


@pytest.mark.parametrize("family", TINY)
def test_every_prunable_family_has_such_layers(family: str, tmp_path: Path) -> None:
    save_toy_encoder(family, tmp_path)
    check_layers(load_encoder(tmp_path, LABELS, MAX_TOKENS))


def test_an_unknown_classifier_is_told_as_ever(places: Path) -> None:
    with pytest.raises(SlimpiError, match="unknown classifier 'svm'"):
        train_decider("svm", {}, toy_tweets(), None, places / "cache", places / "work", outliers=True)


@pytest.mark.parametrize("n_norms", [0, 1, 4])
def test_layers_that_cannot_be_told_are_refused(n_norms: int) -> None:
    graph = Graph()
    for _ in range(n_norms):
        graph.add("LayerNormalization", ["x", "gain"])
    with pytest.raises(SlimpiError, match=f"with {n_norms} LayerNorms"):
        add_features(graph)


def test_auroc_counts_pairs_and_halves_ties() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40).tolist(), rng.integers(2, 12, 30).tolist()
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    assert bench.auroc(a, b) == pytest.approx(np.mean(pairs))


def test_the_benchmark_compares_texts_of_two_kinds(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("id,text\n" + "".join(f"{t.id},{t.text}\n" for t in toy_tweets(30, seed=4)))
    (tmp_path / "out.txt").write_text("qqq www\n\nzzz\n" * 10)
    arguments = ["toy", "--inside", f"path:{tmp_path / 'in.csv'}", "--outside", f"path:{tmp_path / 'out.txt'}"]
    for told, code in ((True, 0), (False, 1)):
        folder = tmp_path / f"told-{told}"
        train("transformer", places, told).export(folder)
        write_manifest(folder, artifact(folder, "onnx"))
        monkeypatch.setattr(bench, "find_artifact", lambda artifacts, name, folder=folder: folder)
        assert bench.main(arguments) == code
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:4]] == ["30", "20"]
    with OnnxClassifier(tmp_path / "told-True", artifact(tmp_path / "told-True", "onnx"), 1) as model:
        inside, outside = (
            [model.judge(Text(text)) for text in texts]
            for texts in ([t.text for t in toy_tweets(30, seed=4)], ["qqq www", "zzz"] * 10)
        )
    by_distance = bench.auroc([d for _, d in outside], [d for _, d in inside])
    by_doubt = bench.auroc(*([-float(np.ptp(logits)) for logits, _ in side] for side in (outside, inside)))
    assert [cell.strip() for cell in lines[3].split("|")[5:7]] == [f"{by_distance:.3f}", f"{by_doubt:.3f}"]
    assert "tells no distances" in said.err
