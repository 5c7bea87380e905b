"""Task for text classifiers (ONNX): quality, latency of single texts, throughput in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from device.classifier import OnnxClassifier
from device.inputs import read_columns
from device.records import SlimpiError
from device.results import Measurement, Sample
from device.samples import Taken, from_values, measurement, values
from device.schema import Artifact, Job, Tweets
from device.wire import Request, Started
from device.words import Text

# Throughput is timed over a fixed part of the rows: enough batches to average over lengths, few enough that the
# passes cost a fraction of the row-by-row part.
N_PASS_BATCHES, N_PASSES, N_WARMUP_PASSES = 8, 5, 1


def run_tweets(request: Request, task: Tweets) -> Iterator[Started | Sample]:
    """Per row: latency_ms (tokenization and inference of this text alone), cpu_ms (the same in CPU time of all threads,
    which other work on the machine stretches little), predicted and true label. Then pass_ms: tokenization and
    inference of a fixed part of the rows in batches of like length, and what share is padding."""
    job = request.job
    with OnnxClassifier(Path(job.artifact_dir), job.artifact, job.threads) as model:
        texts, cells = read_labelled(job, task, model.reads_keywords)
        labels = parse_labels(cells, job.artifact, model.n_labels)
        yield Started(total=2 * task.warmup + 4 * len(texts) + 2 * (N_WARMUP_PASSES + N_PASSES))
        yield from _classify_each(request, task, model, texts, labels)
        yield from _time_passes(request, task, model, texts)


def read_labelled(job: Job, task: Tweets, reads_keywords: bool) -> tuple[list[Text], list[str]]:
    """The rows' texts, with their keywords where they are read, and their labels as written."""
    if reads_keywords and not task.keyword_column:
        raise SlimpiError(f"{job.artifact.id} reads a keyword of each text. Name its column: keyword_column.")
    keyword = [task.keyword_column] if reads_keywords else []
    rows = read_columns(job, task.dataset, [task.label_column, task.text_column, *keyword], task.limit)
    return [Text(*row[1:]) for row in rows], [row[0] for row in rows]


def _classify_each(
    request: Request, task: Tweets, model: OnnxClassifier, texts: list[Text], labels: list[int]
) -> Iterator[Sample]:
    timed = request.first_missing("latency_ms", "cpu_ms", warmup=task.warmup)
    done = min(timed, request.first_missing("predicted", "label"))
    if done == len(texts):
        return
    for i in (*range(task.warmup), *range(task.warmup + done, task.warmup + len(texts))):
        warmup, row = i < task.warmup, i - task.warmup
        text = texts[i % len(texts) if warmup else row]
        begin_ns, begin_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        logits = model.logits([text])
        cpu_ms, latency_ms = (time.process_time_ns() - begin_cpu_ns) / 1e6, _ms_since(begin_ns)
        yield request.sample("latency_ms", i, latency_ms, warmup)
        yield request.sample("cpu_ms", i, cpu_ms, warmup)
        if not warmup:
            yield request.sample("predicted", row, int(logits[0].argmax()))
            yield request.sample("label", row, labels[row])


def _time_passes(request: Request, task: Tweets, model: OnnxClassifier, texts: list[Text]) -> Iterator[Sample]:
    count = pass_size(task, len(texts))
    part = [texts[i * len(texts) // count] for i in range(count)]
    done = request.first_missing("pass_ms", "padding", warmup=N_WARMUP_PASSES)
    if done == N_PASSES:
        return
    for i in (*range(N_WARMUP_PASSES), *range(N_WARMUP_PASSES + done, N_WARMUP_PASSES + N_PASSES)):
        begin_ns = time.perf_counter_ns()
        _, padding = model.logits_in_batches(part, task.batch_size)
        yield request.sample("pass_ms", i, _ms_since(begin_ns), warmup=i < N_WARMUP_PASSES)
        yield request.sample("padding", i, padding, warmup=i < N_WARMUP_PASSES)


def pass_size(task: Tweets, n_rows: int) -> int:
    """Texts in one throughput pass, taken evenly over the rows."""
    return min(n_rows, N_PASS_BATCHES * task.batch_size)


def summarize_tweets(task: Tweets, taken: Taken, job: Job) -> list[Measurement]:
    """accuracy keeps 0/1 for every row in the file's order, so that two variants can be paired."""
    predicted = [int(value) for value in values(taken, "predicted")]
    labels = [int(value) for value in values(taken, "label")]
    n_labels = max(len(job.artifact.labels), max(labels) + 1, max(predicted) + 1)
    data = {
        "corpus": task.dataset.name,
        "corpus_sha256": task.dataset.file.sha256,
        "n_rows": len(labels),
        "tokenizer_sha256": job.artifact.tokenizer_sha256,
        "max_tokens": job.artifact.max_tokens,
    }
    average = "label 1" if n_labels == 2 else f"macro over {n_labels} labels"
    timed = {**data, "threads": job.threads, "timed": "tokenization and inference"}
    size = pass_size(task, len(labels))
    batched = {**timed, "batch_size": task.batch_size, "n_texts": size, "batches": "of like length"}
    hits = [float(p == t) for p, t in zip(predicted, labels, strict=True)]
    scores = precision_recall_f1(labels, predicted, n_labels)
    return [
        from_values(job, "accuracy", "fraction", hits, True, data),
        *(
            from_values(job, name, "fraction", [value], True, {**data, "positive": average})
            for name, value in zip(("precision", "recall", "f1"), scores, strict=True)
        ),
        measurement(job, "latency_ms", "ms", taken["latency_ms"], False, {**timed, "batch_size": 1}),
        measurement(job, "cpu_ms", "ms", taken["cpu_ms"], False, {**timed, "batch_size": 1}),
        measurement(job, "tweets_per_s", "text/s", taken["pass_ms"], True, batched, lambda ms: size * 1000.0 / ms),
        measurement(job, "padding", "fraction", taken["padding"], False, batched),
    ]


def precision_recall_f1(labels: list[int], predicted: list[int], n_labels: int) -> tuple[float, float, float]:
    """Of label 1 when there are two, else the unweighted mean over the labels; a ratio over nothing counts 0
    (scikit-learn's precision_recall_fscore_support with zero_division=0)."""
    classes = [1] if n_labels == 2 else list(range(n_labels))
    scores = []
    for label in classes:
        hit = sum(t == p == label for t, p in zip(labels, predicted, strict=True))
        precision = hit / max(1, predicted.count(label))
        recall = hit / max(1, labels.count(label))
        scores.append((precision, recall, 2 * precision * recall / ((precision + recall) or 1.0)))
    precision, recall, f1 = (sum(column) / len(classes) for column in zip(*scores, strict=True))
    return precision, recall, f1


def parse_labels(cells: list[str], artifact: Artifact, n_labels: int) -> list[int]:
    """Labels as numbers 0 ... n_labels-1 or as the artifact's names."""
    known = {str(i): i for i in range(n_labels)} | {name: i for i, name in enumerate(artifact.labels)}
    labels = []
    for number, cell in enumerate(cells, start=1):
        if cell.strip() not in known:
            raise SlimpiError(
                f"row {number} has label {cell[:40]!r}, expected one of {sorted(known)}. Check label_column."
            )
        labels.append(known[cell.strip()])
    return labels


def _ms_since(begin_ns: int) -> float:
    return (time.perf_counter_ns() - begin_ns) / 1e6
