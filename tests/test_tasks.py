"""What the tasks compute, against naive float64 twins; what they time, against what they promise."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import reference
from fakes import TEXT, TWEETS, LlamaShape, World, artifact, llama_weights, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st

from device import inputs, language, llama, parity, throughput, tweets
from device.classifier import OnnxClassifier
from device.records import SlimpiError
from device.results import Measurement, Sample
from device.schema import Dataset, Job, Perplexity, Task, Throughput, Tweets, describe_file
from device.tasks import TASKS
from device.wire import Request, Started
from device.words import Text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


def take(job: Job, done: dict[str, int] | None = None) -> list[Started | Sample]:
    """Run the first task in this process."""
    request = Request(job=job, index=0, done=done or {}, agent_pid=0)
    return list(TASKS[type(job.tasks[0])].run(request, job.tasks[0]))


def measure(job: Job) -> dict[str, Measurement]:
    taken: dict[str, list[Sample]] = {}
    for message in take(job):
        if isinstance(message, Sample):
            taken.setdefault(message.series, []).append(message)
    task = job.tasks[0]
    return {m.metric: m for m in TASKS[type(task)].summarize(task, taken, job)}


def test_llama_logits_equal_the_float64_twin(world: World) -> None:
    shape = LlamaShape()
    with llama.LlamaModel(world.root / "lm" / "model.gguf", 1) as model:
        tokens = model.tokenize(TEXT.encode())[:40]
        model.open_context(40)
        ((first, rows),) = model.logits(tokens, 0)
        expected = reference.llama_logits(llama_weights(shape), shape, tokens.tolist())
        assert (first, rows.shape) == (0, (40, 272))
        np.testing.assert_allclose(rows, expected, atol=0.05)  # F16 KV cache; logits reach 14
        assert (rows.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("n_ctx", [32, 33])
def test_perplexity_equals_the_float64_twin(tmp_path: Path, add_bos: bool, n_ctx: int) -> None:
    shape = replace(LlamaShape(), add_bos=add_bos)
    world = World.make(tmp_path, shape)
    job = world.job("gguf", [Perplexity(dataset=world.dataset("text.txt"), n_ctx=n_ctx, n_chunks=3)])
    nll = measure(job)["nll"]
    with llama.LlamaModel(world.root / "lm" / "model.gguf", 1) as model:
        tokens = model.tokenize((world.root / "data" / "text.txt").read_bytes()).tolist()
    weights = llama_weights(shape)
    expected = reference.chunk_nlls(
        lambda seen: reference.llama_logits(weights, shape, seen), tokens[: 3 * n_ctx], n_ctx, 1 if add_bos else None
    )
    assert (tokens[0] == 1) == add_bos
    assert nll.samples == pytest.approx(expected, abs=0.01)
    assert nll.conditions["n_scored_tokens_per_chunk"] == n_ctx - 1 - n_ctx // 2
    assert nll.conditions["n_chunks"] == 3


def test_a_final_newline_is_not_part_of_the_text(world: World) -> None:
    """llama-perplexity drops one; here it would open one more chunk."""
    with llama.LlamaModel(world.root / "lm" / "model.gguf", 1) as model:
        text = TEXT.encode()
        while len(model.tokenize(text)) != 64:
            text = text[:-1]
        assert len(model.tokenize(text + b"\n")) == 65
    (world.root / "data" / "newline.txt").write_bytes(text + b"\n")
    task = Perplexity(dataset=world.dataset("newline.txt"), n_ctx=32)
    assert take(world.job("gguf", [task]))[0] == Started(total=2)
    (world.root / "data" / "newline.txt").write_bytes(text[:-1] + b"\n")
    with pytest.raises(SlimpiError, match="has 63 tokens, perplexity at n_ctx 32 needs at least 64"):
        take(world.job("gguf", [Perplexity(dataset=world.dataset("newline.txt"), n_ctx=32)]))


def test_perplexity_across_several_batches_equals_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.job("gguf", [Perplexity(dataset=world.dataset("text.txt"), n_ctx=96, n_chunks=1)])
    whole = measure(job)["nll"].samples
    monkeypatch.setattr(llama, "N_UBATCH", 20)
    monkeypatch.setattr(language, "N_UBATCH", 20)
    assert measure(job)["nll"].samples == pytest.approx(whole, abs=1e-3)


def test_log_probs_equal_the_float64_twin_even_for_large_logits() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((5, 300)) * 30 + 200).astype(np.float32)
    targets = rng.integers(0, 300, 4).astype(np.int32)
    expected = [-reference.negative_log_likelihood(rows[i], int(t)) for i, t in enumerate(targets)]
    got = language.log_probs(rows[:4], targets)
    assert got.shape == (4,)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_perplexity_of_carries_the_delta_methods_error() -> None:
    nll = Measurement(metric="nll", unit="nats/token", samples=[1.0, 2.0], higher_is_better=False, provenance="host")
    perplexity, error = language.perplexity_of(nll)
    assert perplexity == pytest.approx(math.exp(1.5))
    assert error == pytest.approx(math.exp(1.5) * 0.5)


def test_perplexity_resumes_at_the_next_chunk(world: World) -> None:
    job = world.job("gguf", [Perplexity(dataset=world.dataset("text.txt"), n_ctx=32, n_chunks=4)])
    whole = take(job)
    assert take(job, {"nll": 3}) == [whole[0], whole[4]]
    assert take(job, {"nll": 4}) == [whole[0]]


def test_throughput_counts_tokens_over_time(world: World) -> None:
    job = world.job("gguf", [Throughput(n_prompt=40, n_gen=6, repetitions=4, warmup=2)])
    samples = [m for m in take(job) if isinstance(m, Sample)]
    taken = {name: [s for s in samples if s.series == name] for name in {s.series for s in samples}}
    assert {name: len(found) for name, found in taken.items()} == {
        "load_ms": 3,
        "prefill_ms": 6,
        "ttft_ms": 6,
        "decode_ms": 6,
    }
    for prefill, ttft in zip(taken["prefill_ms"], taken["ttft_ms"], strict=True):
        assert 0 < prefill.value < ttft.value
    results = {m.metric: m for m in throughput.summarize_throughput(job.tasks[0], taken, job)}  # type: ignore[arg-type]
    speed = results["prefill_tokens_per_s"]
    assert (len(speed.warmup), len(speed.samples), speed.unit) == (2, 4, "token/s")
    assert speed.samples == pytest.approx([40 / (s.value / 1000) for s in taken["prefill_ms"][2:]])
    decode = results["decode_tokens_per_s"].samples
    assert decode == pytest.approx([6 / (s.value / 1000) for s in taken["decode_ms"][2:]])
    assert results["ttft_ms"].samples == [s.value for s in taken["ttft_ms"][2:]]
    assert "page_cache" in results["load_ms"].conditions


def test_throughput_warms_up_again_when_resumed(world: World) -> None:
    job = world.job("gguf", [Throughput(n_prompt=8, n_gen=4, repetitions=3, warmup=1)])
    done = {"load_ms": 3, "prefill_ms": 3, "ttft_ms": 2, "decode_ms": 4}
    got = [(m.series, m.index, m.warmup) for m in take(job, done) if isinstance(m, Sample)]
    assert got == [
        ("load_ms", 2, False),
        ("prefill_ms", 0, True),
        ("ttft_ms", 0, True),
        ("prefill_ms", 2, False),
        ("ttft_ms", 2, False),
        ("prefill_ms", 3, False),
        ("ttft_ms", 3, False),
    ]


def test_random_batches_hold_the_tokens_llama_bench_would_feed(world: World) -> None:
    with llama.LlamaModel(world.root / "lm" / "model.gguf", 1) as model:
        batches = model.random_batches(10, 4, seed=0)
        assert [batch.n_tokens for batch in batches] == [4, 4, 2]
        tokens = [batch.token[i] for batch in batches for i in range(batch.n_tokens)]
        assert tokens[0] == model.bos
        assert all(0 <= token < model.n_vocab for token in tokens)
        assert len(set(tokens)) > 5


def test_a_context_too_small_is_an_error_not_a_crash(world: World) -> None:
    with llama.LlamaModel(world.root / "lm" / "model.gguf", 1) as model:
        model.open_context(8)
        n_ctx = model._api.llama_n_ctx(model._context)
        with pytest.raises(SlimpiError, match="Use a larger n_ctx"):
            model.run(model.random_batches(n_ctx + 8, 8, seed=0))


def test_classifier_pads_only_inside_a_batch(world: World) -> None:
    fake = artifact(world.root / "classifier", "onnx")
    with OnnxClassifier(world.root / "classifier", fake, 1) as model:
        texts = [Text(text) for text, _ in TWEETS]
        alone = np.concatenate([model.logits([text]) for text in texts])
        np.testing.assert_allclose(model.logits(texts), alone, atol=1e-6)
        lengths = [text.length for text in model.encode([Text("a"), Text("a a a"), Text("a " * 100), Text("")])]
        assert lengths == [3, 5, fake.max_tokens, 2]


def test_tweets_equal_a_computation_by_hand(world: World) -> None:
    job = world.job("onnx", [Tweets(dataset=world.dataset("tweets.csv"), batch_size=3, warmup=2)])
    results = measure(job)
    with OnnxClassifier(world.root / "classifier", job.artifact, 1) as model:
        predicted = [int(model.logits([Text(text)]).argmax()) for text, _ in TWEETS]
    hits = [float(p == label) for p, (_, label) in zip(predicted, TWEETS, strict=True)]
    assert 0 < sum(hits) < len(hits), "a trivial case would prove nothing"
    assert results["accuracy"].samples == hits
    assert (len(results["latency_ms"].warmup), len(results["latency_ms"].samples)) == (2, len(TWEETS))
    assert (len(results["cpu_ms"].warmup), len(results["cpu_ms"].samples)) == (2, len(TWEETS))
    assert (len(results["tweets_per_s"].warmup), len(results["tweets_per_s"].samples)) == (1, 5)
    assert results["tweets_per_s"].conditions["n_texts"] == len(TWEETS)
    assert len(set(results["padding"].samples)) == 1
    assert results["f1"].n == results["precision"].n == results["recall"].n == 1


def test_tweets_limit_and_named_labels(world: World) -> None:
    rows = [(text, ["no", "yes"][label]) for text, label in TWEETS]
    write_csv(world.root / "data" / "named.csv", rows, columns=("body", "kind"))
    task = Tweets(dataset=world.dataset("named.csv"), text_column="body", label_column="kind", limit=4)
    numbered = world.job("onnx", [Tweets(dataset=world.dataset("tweets.csv"), limit=4)])
    assert measure(world.job("onnx", [task]))["accuracy"].samples == measure(numbered)["accuracy"].samples


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40), st.sampled_from([2, 3]))
def test_precision_recall_f1_equal_scikit_learn(pairs: list[tuple[int, int]], n_labels: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels = [min(t, n_labels - 1) for t, _ in pairs]
    predicted = [min(p, n_labels - 1) for _, p in pairs]
    options = {"average": "binary"} if n_labels == 2 else {"average": "macro", "labels": [0, 1, 2]}
    *expected, _ = metrics.precision_recall_fscore_support(labels, predicted, zero_division=0, **options)
    assert tweets.precision_recall_f1(labels, predicted, n_labels) == pytest.approx(expected)


def test_kl_divergence_equals_the_float64_twin() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.1, 1.0, 10.0):
        golden, other = (rng.standard_normal(50).astype(np.float32) * scale for _ in range(2))
        assert parity.kl_divergence(golden, other) == pytest.approx(reference.kl_divergence(golden, other), rel=1e-6)
    assert parity.kl_divergence(golden, golden + 7) == pytest.approx(0.0, abs=1e-6)


def test_every_task_is_in_the_registry() -> None:
    assert set(TASKS) == set(get_args(Task))


def test_every_real_tweet_is_read(world: World, data_dir: Path) -> None:
    path = "tweets/train.csv"
    dataset = Dataset(name=path, file=describe_file(data_dir, path))
    job = world.job("onnx", [Tweets(dataset=dataset)], data_dir=str(data_dir))
    rows = inputs.read_columns(job, dataset, ["text", "target"])
    labels = tweets.parse_labels([row[1] for row in rows], job.artifact, 2)
    assert (len(rows), sum(labels)) == (7613, 3271)  # SOURCES.md beside the data
    with (data_dir / path).open(encoding="utf-8", newline="") as handle:
        assert [row["text"] for row in csv.DictReader(handle)] == [row[0] for row in rows]
    assert any("\n" in row[0] for row in rows)


def test_golden_texts_come_from_tables_and_plain_files(world: World, data_dir: Path) -> None:
    job = world.job("onnx", [Tweets(dataset=world.dataset("tweets.csv"))], data_dir=str(data_dir))

    def first(path: str, count: int) -> list[str]:
        dataset = Dataset(name=path, file=describe_file(data_dir, path))
        return [text.text for text in inputs.read_texts(job, dataset, count)]

    assert first("tweets/test.csv", 1) == ["Just happened a terrible car crash"]
    assert first("glue/sst2_validation.tsv", 1) == ["it 's a charming and often affecting journey . "]
    assert first("wikitext-2/wiki.test.raw", 1) == [" = Robert Boulter = "]
    with pytest.raises(SlimpiError, match="has 872 texts, 873 are asked for"):
        first("glue/sst2_validation.tsv", 873)
    with pytest.raises(SlimpiError, match=r"none of them text or sentence"):
        first("glue/mrpc_validation.tsv", 1)
