"""Classifiers on the device: inputs by the graph's names, any text, batches that pad little, keywords in the tasks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import KEYWORDS, TWEETS, VOCABULARY, World, artifact, write_csv, write_word_classifier
from hypothesis import example, given
from hypothesis import strategies as st
from jobs import golden_job, run

from device.classifier import MAX_PADDING, OnnxClassifier, batches
from device.records import SlimpiError, encode
from device.schema import Artifact, Job, Parity, RecordGolden, Tweets
from device.words import Text

ODD = ["", " ", "\0", "a\0b", "\U0001f525\U0001f525 fire", "x" * 10_000, "fire " * 2_000, "\u202efire\u202c", "\ufeff"]
KINDS = ("tokens", "words", "both")


pytestmark = pytest.mark.usefixtures("quick_facts")


def folder_of(root: Path, kind: str) -> Path:
    """A folder holding a classifier that reads a tokenizer's pieces, words, or both."""
    if kind == "tokens":
        return World.make(root).root / "classifier"
    root.mkdir(parents=True)
    write_word_classifier(root, tokens=kind == "both")
    return root


@pytest.fixture(scope="module", params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = folder_of(tmp_path_factory.mktemp("made") / "x", request.param)
    with OnnxClassifier(folder, artifact(folder, "onnx"), 1) as model:
        yield model


def test_a_text_alone_and_in_a_batch_has_the_same_logits(opened: OnnxClassifier) -> None:
    texts = [Text(text, keyword) for (text, _), keyword in zip(TWEETS, [*KEYWORDS, "", "?"] * 2, strict=False)]
    texts += [Text(text) for text in ODD]
    alone = np.concatenate([opened.logits([text]) for text in texts])
    assert alone.shape == (len(texts), 2)
    assert np.isfinite(alone).all()
    assert np.unique(alone, axis=0).shape[0] > 3, "a model that does not look proves nothing"
    np.testing.assert_allclose(opened.logits(texts), alone, atol=1e-5)
    batched, padding = opened.logits_in_batches(texts, 4)
    np.testing.assert_allclose(batched, alone, atol=1e-5)
    assert 0.0 <= padding < 0.5


@given(st.text(max_size=60), st.text(max_size=10))
@example("#" * 60, "%zz%20")
def test_any_text_has_finite_logits(opened: OnnxClassifier, text: str, keyword: str) -> None:
    assert np.isfinite(opened.logits([Text(text, keyword)])).all()


def test_word_inputs_reach_the_graph(tmp_path: Path) -> None:
    """Every input changes the logits by what its own matrix says."""
    import onnx
    from onnx import numpy_helper

    folder = folder_of(tmp_path / "x", "words")
    made = onnx.load(folder / "model.onnx").graph.initializer
    c = {tensor.name: numpy_helper.to_array(tensor) for tensor in made}
    with OnnxClassifier(folder, artifact(folder, "onnx"), 1) as model:
        (got,) = model.logits([Text("Fire, the FLOOD!", "car crash")])
        assert model.reads_keywords
    words = [VOCABULARY.index(w) for w in ("fire", "<UNK>", "the", "flood", "<UNK>")]
    terms = [VOCABULARY.index(w) for w in ("fire", "the", "flood")]
    expected = c["words"][words].sum(0) + c["keywords"][2] + 2 * c["weight"][0] + c["words"][terms].sum(0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@given(st.lists(st.integers(1, 130), max_size=80), st.integers(1, 9))
@example([], 3)
def test_batches_hold_every_text_once_and_pad_little(lengths: list[int], batch_size: int) -> None:
    made = list(batches(lengths, batch_size))
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in made)
    for batch in made:
        longest = max(lengths[i] for i in batch)
        assert all(longest <= max(lengths[i] + 1, lengths[i] * (1 + MAX_PADDING)) for i in batch)
    ordered = [lengths[i] for batch in made for i in batch]
    assert ordered == sorted(lengths)


def test_real_tweets_in_batches_are_hardly_padded(opened: OnnxClassifier, data_dir: Path) -> None:
    with (data_dir / "tweets" / "test.csv").open(encoding="utf-8", newline="") as handle:
        texts = [Text(row["text"], row["keyword"]) for row in csv.DictReader(handle)][:256]
    batched, padding = opened.logits_in_batches(texts, 32)
    assert padding < MAX_PADDING
    np.testing.assert_allclose(batched, np.concatenate([opened.logits([t]) for t in texts]), atol=1e-4)


def test_a_model_that_gives_no_numbers_is_an_error_not_a_label(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    folder = folder_of(tmp_path / "x", "words")
    model = onnx.load(folder / "model.onnx")
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(np.array([[np.nan, 1.0]], np.float32), "weight"))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(SlimpiError, match="logits that are not finite"):
        OnnxClassifier(folder, artifact(folder, "onnx"), 1)


def without(made: Artifact, name: str) -> Artifact:
    return msgspec.structs.replace(made, files=[file for file in made.files if file.path != name])


@pytest.mark.parametrize(
    ("kind", "name"), [("both", "words.json"), ("both", "tokenizer.json"), ("words", "words.json")]
)
def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path: Path, kind: str, name: str) -> None:
    folder = folder_of(tmp_path / "x", kind)
    with pytest.raises(SlimpiError, match=f"fake-1 has no {name}. Build it again"):
        OnnxClassifier(folder, without(artifact(folder, "onnx"), name), 1)


def word_job(root: Path, task: Any, **changes: Any) -> Job:
    """A job on a word classifier, and a table with keywords."""
    world = World.make(root)
    folder = folder_of(root / "words", "words")
    with (world.root / "data" / "keyed.csv").open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([("text", "target", "keyword"), *((*row, "fire") for row in TWEETS)])
    made = artifact(folder, "onnx", max_tokens=0, **changes)
    return world.job("onnx", [task(world)], artifact=made, artifact_dir=str(folder))


def failed(job: Job) -> str:
    result = run(job)[0].results[0]
    assert (result.status, result.measurements) == ("failed", [])
    return result.error


def test_tweets_reads_the_keyword_of_each_row(tmp_path: Path) -> None:
    job = word_job(tmp_path, lambda w: Tweets(dataset=w.dataset("keyed.csv"), keyword_column="keyword", warmup=1))
    report, _ = run(job)
    result = report.results[0]
    assert result.status == "ok", result.error
    accuracy = next(m for m in result.measurements if m.metric == "accuracy")
    with OnnxClassifier(Path(job.artifact_dir), job.artifact, 1) as model:
        texts = [Text(text, "fire") for text, _ in TWEETS]
        logits = np.concatenate([model.logits([text]) for text in texts])
        unkeyed = np.concatenate([model.logits([Text(text.text)]) for text in texts])
    labels = [label for _, label in TWEETS]
    assert accuracy.samples == (logits.argmax(1) == labels).astype(float).tolist()
    assert not np.allclose(logits, unkeyed)


def test_a_table_without_the_keyword_is_refused_only_where_it_is_read(tmp_path: Path) -> None:
    unnamed = word_job(tmp_path / "a", lambda w: Tweets(dataset=w.dataset("keyed.csv")))
    assert "reads a keyword of each text. Name its column: keyword_column" in failed(unnamed)
    lacking = word_job(tmp_path / "b", lambda w: Tweets(dataset=w.dataset("tweets.csv"), keyword_column="keyword"))
    assert "no column 'keyword'; it has ['text', 'target']" in failed(lacking)
    world = World.make(tmp_path / "c")
    unread = world.job("onnx", [Tweets(dataset=world.dataset("tweets.csv"), keyword_column="keyword")])
    assert run(unread)[0].results[0].status == "ok"


def test_odd_tweets_are_classified_by_the_task(tmp_path: Path) -> None:
    world = World.make(tmp_path)
    write_csv(world.root / "data" / "tweets.csv", [(text, 1) for text in ODD])
    report, _ = run(world.job("onnx", [Tweets(dataset=world.dataset("tweets.csv"), batch_size=2)]))
    assert report.results[0].status == "ok", report.results[0].error
    accuracy = next(m for m in report.results[0].measurements if m.metric == "accuracy")
    assert accuracy.n == len(ODD)


def golden_word_job(root: Path, keyword_column: str = "keyword") -> Job:
    from device.schema import Golden

    record = word_job(root, lambda w: RecordGolden(dataset=w.dataset("keyed.csv"), n=5, keyword_column=keyword_column))
    report, _ = run(record)
    assert report.results[0].status == "ok", report.results[0].error
    folder = Path(record.artifact_dir)
    (folder / "golden.npz").write_bytes((Path(record.work_dir) / "golden.npz").read_bytes())
    golden = Golden(file="golden.npz", n=5, machine="x86_64", runtime="test")
    made = artifact(folder, "onnx", max_tokens=0, golden=golden)
    return msgspec.structs.replace(record, id="parity", artifact=made, tasks=[Parity()], work_dir=str(root / "parity"))


def test_golden_outputs_carry_the_keywords(tmp_path: Path) -> None:
    job = golden_word_job(tmp_path)
    path = Path(job.artifact_dir) / "golden.npz"
    with np.load(path) as archive:
        assert archive["keywords"].tolist() == ["fire"] * 5
        arrays = dict(archive)
    result = run(job)[0].results[0]
    assert result.status == "ok", result.error
    assert max(next(m for m in result.measurements if m.metric == "max_abs_logit_diff").samples) < 1e-6
    for i, keywords in enumerate([np.array(["fire"] * 4), np.arange(5)]):
        np.savez(path, **arrays | {"keywords": keywords})
        changed = artifact(Path(job.artifact_dir), "onnx", max_tokens=0, golden=job.artifact.golden)
        again = msgspec.structs.replace(job, artifact=changed, work_dir=str(tmp_path / f"broken-{i}"))
        assert "expected one a text" in failed(again)


def test_golden_files_without_keywords_still_hold(tmp_path: Path) -> None:
    world = World.make(tmp_path / "old")
    job = golden_job(world, "onnx")
    with np.load(Path(job.artifact_dir) / "golden.npz") as archive:
        assert set(archive) == {"texts", "logits"}
    assert run(job)[0].results[0].status == "ok"
    job = golden_word_job(tmp_path / "new", keyword_column="")
    assert run(job)[0].results[0].status == "ok"


def test_a_broken_words_file_fails_the_task_with_a_reason(tmp_path: Path) -> None:
    job = word_job(tmp_path, lambda w: Tweets(dataset=w.dataset("keyed.csv"), keyword_column="keyword"))
    path = Path(job.artifact_dir) / "words.json"
    spec = json.loads(path.read_bytes())
    path.write_text(json.dumps(spec | {"steps": ["stem"]}))
    with pytest.raises(SlimpiError, match=r"words.json has \d+ bytes, expected"):
        run(job)
    changed = artifact(Path(job.artifact_dir), "onnx", max_tokens=0)
    assert "unknown step or number 'stem'" in failed(msgspec.structs.replace(job, artifact=changed))


def test_a_classifier_without_reader_is_refused_before_it_runs(tmp_path: Path) -> None:
    job = word_job(tmp_path, lambda w: Tweets(dataset=w.dataset("keyed.csv"), keyword_column="keyword"))
    bare = msgspec.structs.replace(job, artifact=without(job.artifact, "words.json"))
    with pytest.raises(SlimpiError, match=r"has no tokenizer.json or words.json among its files"):
        run(bare)


def test_an_older_artifacts_job_is_still_read() -> None:
    """Jobs and manifests written before keywords have no such field."""
    task = msgspec.json.decode(
        b'{"task": "tweets", "dataset": {"name": "x", "file": {"path": "x.csv", "sha256": "' + b"0" * 64 + b'", '
        b'"size_bytes": 1}}}',
        type=Tweets,
    )
    assert task.keyword_column == ""
    assert b'"keyword_column": ""' in encode(task)
