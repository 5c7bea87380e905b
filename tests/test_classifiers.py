"""Every entry of CLASSIFIERS: it learns, its export computes the same, seeds reproduce, bad input is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from toy_tweets import ODD, save_toy_encoder, toy_settings, toy_tweets, write_vectors

from device.parity import kl_divergence
from device.records import SlimpiError
from device.words import WordSpec, read_spec
from pipeline.export.onnx import describe_onnx, make_variant, one_thread
from pipeline.export.onnx_graph import Graph
from pipeline.progress import quiet
from pipeline.tweets.classifiers import CLASSIFIERS, settings_of, with_max_tokens, word_nets
from pipeline.tweets.classifiers.base import Classifier, Job, WordSettings, vocabulary
from pipeline.tweets.classifiers.ensemble import combine
from pipeline.tweets.classifiers.lstm import LstmNet, LstmSettings
from pipeline.tweets.classifiers.mlp import MlpNet, MlpSettings
from pipeline.tweets.classifiers.word_nets import LstmStack
from pipeline.tweets.data import Tweet
from pipeline.tweets.decide import Decider, feeds_of, train_decider


@dataclass(frozen=True)
class Length:
    """A toy: log-odds by the number of words, to show that an entry is one line."""

    spec: WordSpec
    tokenizer: str = ""
    max_tokens: int = 0

    def log_odds(self, tweets: Sequence[Tweet]) -> np.ndarray:
        ids = feeds_of(self.spec, "", 0, tweets)["word_ids"]
        return (ids > 1).sum(1) - 1.5

    def add_to(self, graph: Graph) -> str:
        known = graph.add("Greater", [graph.ids("word_ids", self.spec.vocabulary), graph.constant(np.array(1))])
        count = graph.add("Cast", [known], to=1)
        total = graph.add("ReduceSum", [count, graph.constant(np.array([1]))], keepdims=1)
        return graph.add("Sub", [total, graph.constant(1.5)])


def train_length(job: Job, settings: WordSettings) -> Length:
    return Length(WordSpec(steps=settings.steps, vocabulary=["", "", "fire", "flood", "smoke", "storm", "quake"]))


CLASSIFIERS["toy-length"] = Classifier(WordSettings, train_length, needs_source=False)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vectors.txt and a tiny encoder in hf/."""
    folder = tmp_path_factory.mktemp("classifiers")
    write_vectors(folder / "vectors.txt")
    save_toy_encoder("bert", folder / "hf")
    return folder


def fit(name: str, places: Path, seed: int = 0, **changes: Any) -> Decider:
    table = toy_settings(name, places / "vectors.txt") | changes
    return train_decider(
        name, table, toy_tweets(), places / "hf", places / "cache", places / "work", seed, validation_share=0.2
    )


@pytest.fixture(scope="module", params=CLASSIFIERS)
def trained(request: pytest.FixtureRequest, places: Path) -> tuple[str, Decider, Path]:
    """(name, decider, folder it was exported to)."""
    decider = fit(request.param, places)
    folder = places / request.param
    decider.export(folder)
    return request.param, decider, folder


def run(path: Path, decider: Decider, batches: Sequence[Sequence[Tweet]]) -> np.ndarray:
    """Logits of all batches, one after the other."""
    session = onnxruntime.InferenceSession(str(path), one_thread(), providers=["CPUExecutionProvider"])
    names, model = [entry.name for entry in session.get_inputs()], decider.model
    feeds = [feeds_of(model.spec, model.tokenizer, model.max_tokens, batch) for batch in batches]
    return np.concatenate([session.run(["logits"], {name: feed[name] for name in names})[0] for feed in feeds])


def test_it_learns_what_the_words_tell(trained: tuple[str, Decider, Path]) -> None:
    name, decider, _ = trained
    new = toy_tweets(80, seed=5)
    right = (decider.logits(new).argmax(1) == [t.target for t in new]).mean()
    # The tiny encoder's weights are random: its frozen features tell less than trained ones.
    assert right >= {"toy-length": 0.7, "embeddings": 0.65}.get(name, 0.85), (name, right)


def test_export_equals_the_trained_model_at_every_batch(trained: tuple[str, Decider, Path]) -> None:
    """Mixed lengths in one batch, an empty text, and each text alone: padding changes nothing."""
    _, decider, folder = trained
    tweets = [*toy_tweets(12, seed=7), *ODD]
    together = run(folder / "model.onnx", decider, [tweets])
    alone = run(folder / "model.onnx", decider, [[tweet] for tweet in tweets])
    expected = decider.logits(tweets)
    assert together.dtype == np.float32
    assert together.shape == (len(tweets), 2)
    assert np.ptp(expected[:, 1]) > 0.5
    for found in (together, alone):
        assert max(kl_divergence(e, f) for e, f in zip(expected, found, strict=True)) < 1e-6
        assert np.abs(found - expected).max() < 1e-3


def test_the_artifact_describes_itself(trained: tuple[str, Decider, Path]) -> None:
    name, decider, folder = trained
    if decider.model.spec:
        assert read_spec(folder) == decider.model.spec
    assert (folder / "words.json").exists() == (decider.model.spec is not None)
    assert (folder / "tokenizer.json").exists() == bool(decider.model.tokenizer)
    graph = onnx.load(folder / "model.onnx").graph
    assert {value.name for value in graph.output} == {"logits"}
    if name != "toy-length":
        assert describe_onnx(folder / "model.onnx").n_weights == sum(
            int(np.prod(t.dims)) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims
        )


def test_dynamic_int8_decides_alike(trained: tuple[str, Decider, Path]) -> None:
    name, decider, folder = trained
    if name in ("tfidf", "toy-length"):
        with pytest.raises(SlimpiError, match="no constant fp32 matrices"):
            make_variant(folder / "model.onnx", folder / "int8", "INT8-dynamic")
        return
    make_variant(folder / "model.onnx", folder / "int8", "INT8-dynamic")
    tweets = toy_tweets(60, seed=9)
    found = run(folder / "int8" / "model.onnx", decider, [[tweet] for tweet in tweets])
    assert (found.argmax(1) == decider.logits(tweets).argmax(1)).mean() >= 0.9
    assert np.abs(found - decider.logits(tweets)).max() > 0


@pytest.mark.parametrize("name", ["multi-input", "mlp", "transformer"])
def test_same_seed_same_logits(name: str, places: Path) -> None:
    short = {"epochs": 2}
    new = toy_tweets(10, seed=3)
    state = torch.random.get_rng_state()
    first, again, other = (fit(name, places, seed, **short).model.log_odds(new) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


# Networks against naive twins.


def naive_lstm(layer: torch.nn.LSTM, x: np.ndarray, suffix: str = "") -> np.ndarray:
    """States (words, hidden) of one sequence, gate by gate in float64."""
    w, r, b, c = (
        getattr(layer, f"{name}_l0{suffix}").detach().double().numpy()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h, cell, states = np.zeros(layer.hidden_size), np.zeros(layer.hidden_size), []
    for row in x:
        i, f, g, o = np.split(w @ row + b + r @ h + c, 4)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        cell = f * cell + i * np.tanh(g)
        h = o * np.tanh(cell)
        states.append(h)
    return np.array(states)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_stack_equals_its_naive_twin_at_mixed_lengths(bidirectional: bool) -> None:
    torch.manual_seed(0)
    stack = LstmStack(5, (4, 3), 0.0, 0.0, bidirectional).eval()
    lengths = [1, 7, 3, 5]
    x = torch.randn(len(lengths), max(lengths), 5)
    found = stack(x, torch.tensor(lengths)).detach().numpy()
    for row, length, got in zip(x.double().numpy(), lengths, found, strict=True):
        states = row[:length]
        for layer in stack.layers:
            parts = [naive_lstm(layer, states)]
            last = [parts[0][-1]]
            if bidirectional:
                parts.append(naive_lstm(layer, states[::-1], "_reverse")[::-1])
                last.append(parts[1][0])
            states = np.concatenate(parts, axis=1)
        assert np.abs(np.concatenate(last) - got).max() < 1e-5


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_graph_equals_torch(bidirectional: bool) -> None:
    torch.manual_seed(1)
    words = ["", "", *"abcdefgh"]
    settings = LstmSettings(hidden=(4, 3), dense=5, bidirectional=bidirectional)
    net = LstmNet(torch.randn(len(words), 6), settings).eval()
    spec = WordSpec(steps=[], vocabulary=words)
    graph = Graph(spec)
    z = net.add_to(graph, spec)
    model = graph.finish(graph.add("Concat", [z, z], axis=1))
    ids = np.array([[2, 3, 4, 5], [9, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"word_ids": ids})
    expected = net({"word_ids": torch.from_numpy(ids)}).detach().numpy()
    assert np.abs(found[:, 0] - expected).max() < 1e-5
    assert np.ptp(expected) > 1e-3


def test_recurrent_dropout_drops_weights_between_states_in_training_only() -> None:
    torch.manual_seed(0)
    stack = LstmStack(5, (4, 3), dropout=0.0, recurrent_dropout=0.5, bidirectional=False)
    x, lengths = torch.randn(2, 6, 5), torch.tensor([6, 4])
    stack.eval()
    still = stack(x, lengths)
    assert torch.equal(still, stack(x, lengths))
    stack.train()
    assert not torch.equal(stack(x, lengths), stack(x, lengths))
    one_word = torch.tensor([1, 1])  # without a state before it nothing can be dropped
    assert torch.equal(stack(x[:, :1], one_word), stack(x[:, :1], one_word))


def test_word_dropout_leaves_words_out_of_the_mean_in_training_only() -> None:
    torch.manual_seed(0)
    table = torch.cat([torch.zeros(1, 3), torch.randn(7, 3)])
    net = MlpNet(table, MlpSettings(word_dropout=0.5))
    ids = torch.tensor([[2, 3, 4, 5, 6, 7], [2, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    net.eval()
    whole = net.means(ids)
    torch.testing.assert_close(whole[1], table[2:4].mean(0))
    net.train()
    drawn = torch.stack([net.means(ids) for _ in range(4000)])
    halves = {tuple(mean.tolist()) for mean in drawn[:, 1]}  # both words, either, never none
    assert halves == {tuple(mean.tolist()) for mean in (table[2], table[3], table[2:4].mean(0))}
    torch.testing.assert_close(drawn.mean(0)[0], whole[0], atol=0.05, rtol=0)
    assert not drawn[:, 2].any()  # an empty text


def test_averaged_weights_are_the_running_mean_of_those_after_each_batch(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    step = word_nets._step

    def watched(net: Any, *rest: Any) -> None:
        step(net, *rest)
        seen.append({name: p.detach().clone() for name, p in net.named_parameters()})

    monkeypatch.setattr(word_nets, "_step", watched)
    net = fit("mlp", places, epochs=1, averaging=0.75, train_vectors=True).model.net
    assert len(seen) > 1
    for name, found in net.named_parameters():
        mean = seen[0][name].double()
        for after in seen[1:]:
            mean = 0.75 * mean + 0.25 * after[name].double()
        torch.testing.assert_close(found.double(), mean, atol=1e-6, rtol=1e-5)
        assert not torch.equal(found, seen[-1][name])


def test_tfidf_equals_scikit_learn(places: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    tweets = toy_tweets()
    model = CLASSIFIERS["tfidf"].train(
        Job(tweets, toy_tweets(40, 1), None, places, places, 0, quiet), settings_of("tfidf", {"c": [1.0]})
    )
    texts = [" ".join(model.reader.words(tweet.text)) for tweet in tweets]
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\S+", lowercase=False
    ).fit(texts)
    assert sorted(vectorizer.vocabulary_) == sorted(model.spec.vocabulary[2:])
    order = [vectorizer.vocabulary_[word] for word in model.spec.vocabulary[2:]]
    expected = vectorizer.transform(texts)[:, order] @ model.coefficient[2:] + model.bias
    assert np.abs(model.log_odds(tweets) - expected).max() < 1e-9


# Ensembles and settings.


def test_ensemble_is_the_weighted_mean_of_calibrated_probabilities(places: Path) -> None:
    members = [fit(name, places).model for name in ("tfidf", "mlp")]
    model = combine(members, [2.0, 0.5], [3.0, 1.0])
    tweets = toy_tweets(10, seed=2)
    p, q = (1 / (1 + np.exp(-m.log_odds(tweets) / t)) for m, t in zip(members, (2.0, 0.5), strict=True))
    mean = np.clip(0.75 * p + 0.25 * q, 1e-6, 1 - 1e-6)
    assert np.abs(1 / (1 + np.exp(-model.log_odds(tweets))) - mean).max() < 1e-9


def test_an_encoder_can_be_in_an_ensemble_twice(places: Path) -> None:
    """With a seed of its own each is another model; with the same they are one."""
    short = toy_settings("transformer", places / "vectors.txt") | {"epochs": 3, "pooling": "mean"}
    new = toy_tweets(20, seed=3)

    def twice(*seeds: int) -> Decider:
        members = [{"classifier": "transformer", "settings": {**short, "seed": seed}} for seed in seeds]
        return train_decider(
            "ensemble", {"members": members}, toy_tweets(), places / "hf", places, places / "work", 0, 0.2
        )

    same, other = twice(0, 0), twice(0, 1)
    assert not np.allclose(same.model.log_odds(new), other.model.log_odds(new))
    other.export(places / "twice")
    found = run(places / "twice" / "model.onnx", other, [new])
    np.testing.assert_allclose(found, other.logits(new), atol=1e-4)


def test_members_that_read_texts_differently_are_refused(places: Path) -> None:
    a, b = (fit("mlp", places, epochs=1, max_words=n).model for n in (32, 30))
    with pytest.raises(SlimpiError, match="max_words 32 and 30"):
        combine([a, b], [1, 1], [1, 1])
    c = fit("embeddings", places).model
    with pytest.raises(SlimpiError, match="different tokenizers or max_tokens"):
        combine([c, replace(c, embedder=replace(c.embedder, max_tokens=7))], [1, 1], [1, 1])


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("svm", {}, "unknown classifier 'svm'. Known: lstm"),
        ("lstm", {"hiden": [8, 8]}, "settings of classifier lstm: .*hiden"),
        ("mlp", {"averaging": 1.0}, "settings of classifier mlp: averaging is 1.0; give 0 or a share below 1"),
        ("lstm", {"epochs": "many"}, "settings of classifier lstm: Expected `int`"),
        ("ensemble", {"members": [{"classifier": "tfidf"}]}, "two `members` at least"),
        ("ensemble", {"members": [{"classifier": "tfidf", "weight": 0}, {"classifier": "mlp"}]}, "greater than 0"),
        ("tfidf", {"min_count": 500}, "no term occurs in 500 tweets"),
        ("tfidf", {"c": []}, "`c` is empty"),
        ("mlp", {"vectors": []}, "`vectors` is empty"),
        ("mlp", {"steps": ["lowercase"]}, "unknown step 'lowercase'"),
        (
            "transformer",
            {"trained": "layer.7"},
            r"no component 'layer\.7'; train .* embeddings, layer\.0, layer\.1, head",
        ),
        ("ensemble", {"members": [{"classifier": "ensemble"}, {"classifier": "tfidf"}]}, "cannot be an ensemble"),
    ],
)
def test_bad_settings_are_told(places: Path, name: str, table: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimpiError, match=message):
        fit(name, places, **table) if name in CLASSIFIERS else settings_of(name, table)


def test_an_encoder_is_asked_for(places: Path) -> None:
    with pytest.raises(SlimpiError, match="no folder of an encoder"):
        train_decider("transformer", {}, toy_tweets(), None, places / "cache", places / "work")


def test_max_tokens_reaches_what_reads_tokens() -> None:
    assert with_max_tokens("transformer", {"epochs": 1}, 50) == {"epochs": 1, "max_tokens": 50}
    assert with_max_tokens("tfidf", {"ngrams": 1}, 50) == {"ngrams": 1}
    members = [{"classifier": "tfidf"}, {"classifier": "embeddings", "settings": {"tidy": False}}]
    found = with_max_tokens("ensemble", {"members": members}, 50)["members"]
    assert found[0]["settings"] == {}
    assert found[1]["settings"] == {"tidy": False, "max_tokens": 50}


def test_vocabulary_is_by_frequency_then_name() -> None:
    from collections import Counter

    words = vocabulary(Counter({"b": 2, "a": 2, "c": 5, "rare": 1}), 2, ["c", "z", "rare"])
    assert words == ["<PAD>", "<UNK>", "c", "a", "b", "z", "rare"]


def test_a_search_trains_what_it_found(places: Path) -> None:
    evolution = {"population": 3, "generations": 1, "elite": 1}
    work = places / "search"
    table = toy_settings("transformer", places / "vectors.txt") | {
        "epochs": 3,
        "trained": "search",
        "evolution": evolution,
    }
    decider = train_decider("transformer", table, toy_tweets(), places / "hf", places / "cache", work)
    lines = (work / "components.jsonl").read_text().splitlines()
    tried = [msgspec.json.decode(line) for line in lines]
    upper = {"layer.0", "layer.1", "head"}
    assert [set(t["trained"]) for t in tried] == [{"embeddings", *upper}, {"head"}, upper]
    best = min(tried, key=lambda t: t["loss"])["trained"]
    plain = train_decider(
        "transformer", table | {"trained": ",".join(best)}, toy_tweets(), places / "hf", places / "cache", work
    )
    new = toy_tweets(8, seed=4)
    assert np.array_equal(plain.logits(new), decider.logits(new))
