"""Golden outputs: recorded on the host when an artifact is built, compared with what the device computes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.classifier import OnnxClassifier
from device.inputs import read_text, read_texts
from device.language_models import LanguageModel, open_language_model
from device.records import SlimpiError, write_atomic
from device.results import Measurement, Sample
from device.runtimes import Logits, Tokens
from device.samples import Taken, measurement
from device.schema import Job, Parity, RecordGolden
from device.wire import Request, Started
from device.words import Text

GOLDEN_NAME = "golden.npz"


def run_record_golden(request: Request, task: RecordGolden) -> Iterator[Started | Sample]:
    """Write golden.npz (schema.Golden) to the work folder; the one sample is the number of rows in it."""
    job = request.job
    yield Started(total=1)
    if job.artifact.task == "lm":
        if task.n > task.n_tokens:
            raise SlimpiError(f"{task.n} golden positions need as many tokens, n_tokens is {task.n_tokens}. Raise it.")
        with open_language_model(job.artifact, job.artifact_dir, job.threads) as model:
            tokens = model.tokenize(read_text(job, task.dataset))[: task.n_tokens]
            if len(tokens) < task.n_tokens:
                raise SlimpiError(
                    f"{task.dataset.name} has {len(tokens)} tokens, {task.n_tokens} are asked for. Ask for fewer."
                )
            _save_golden(job, tokens=tokens, logits=_last_logits(model, tokens, task.n))
            yield request.sample("recorded", 0, task.n)
    else:
        with OnnxClassifier(Path(job.artifact_dir), job.artifact, job.threads) as classifier:
            column = task.keyword_column if classifier.reads_keywords else ""
            texts = read_texts(job, task.dataset, task.n, column)
            _save_golden(job, **_text_arrays(texts), logits=_each_logits(classifier, texts))
            yield request.sample("recorded", 0, task.n)


def summarize_record_golden(task: RecordGolden, taken: Taken, job: Job) -> list[Measurement]:
    """Its product is the file; there is nothing to measure."""
    return []


def run_parity(request: Request, task: Parity) -> Iterator[Started | Sample]:
    """Per golden row (position or text): largest |logit difference|, KL(golden || device), same top label."""
    job = request.job
    inputs, golden = read_golden(job)
    yield Started(total=3 * len(golden))
    if job.artifact.task == "lm":
        with open_language_model(job.artifact, job.artifact_dir, job.threads) as model:
            _check_golden(job, golden, model.n_vocab, len(inputs))
            yield from _compare(request, golden, _last_logits(model, inputs.astype(np.int32), len(golden)))
    else:
        texts = read_golden_texts(job, inputs)
        with OnnxClassifier(Path(job.artifact_dir), job.artifact, job.threads) as classifier:
            _check_golden(job, golden, classifier.n_labels, len(texts))
            yield from _compare(request, golden, _each_logits(classifier, texts))


def _compare(request: Request, golden: Logits, logits: Logits) -> Iterator[Sample]:
    for i in range(request.first_missing("max_abs_logit_diff", "kl_nats", "top1"), len(golden)):
        yield request.sample("max_abs_logit_diff", i, np.abs(logits[i].astype(np.float64) - golden[i]).max())
        yield request.sample("kl_nats", i, kl_divergence(golden[i], logits[i]))
        yield request.sample("top1", i, float(golden[i].argmax() == logits[i].argmax()))


def summarize_parity(task: Parity, taken: Taken, job: Job) -> list[Measurement]:
    """A logit's largest difference, KL divergence (nats) and top-1 agreement with the golden outputs; who made them."""
    golden = job.artifact.golden
    told = {"golden_machine": golden.machine, "golden_runtime": golden.runtime} if golden else {}
    return [
        measurement(job, "max_abs_logit_diff", "logit", taken["max_abs_logit_diff"], False, told),
        measurement(job, "kl_divergence", "nats", taken["kl_nats"], False, told),
        measurement(job, "top1_agreement", "fraction", taken["top1"], True, told),
    ]


def kl_divergence(golden: NDArray[Any], other: NDArray[Any]) -> float:
    """KL(softmax(golden) || softmax(other)) of two logit rows (n,), nats, in float64."""
    p, q = _log_softmax(golden), _log_softmax(other)
    return float(np.sum(np.exp(p) * (p - q)))


def read_golden(job: Job) -> tuple[NDArray[Any], Logits]:
    """Inputs (tokens or texts) and logits (n, classes) of the artifact's golden file, read without pickle."""
    if job.artifact.golden is None:
        raise SlimpiError(f"{job.artifact.id} has no golden outputs. Build it again.")
    path = Path(job.artifact_dir) / job.artifact.golden.file
    name, kind = ("tokens", "i") if job.artifact.task == "lm" else ("texts", "U")
    try:
        with np.load(path, allow_pickle=False) as archive:
            inputs, logits = archive[name], archive["logits"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise SlimpiError(f"{path} has no readable `{name}` and `logits`: {error}. Build it again.") from error
    good = inputs.ndim == 1 and inputs.dtype.kind == kind and logits.ndim == 2 and logits.dtype == np.float32
    if not good or not len(logits) or not np.isfinite(logits).all():
        raise SlimpiError(
            f"{path} has `{name}` {inputs.dtype} {inputs.shape} and `logits` {logits.dtype} {logits.shape}, "
            "expected (n,) and finite float32 (n, classes). Build it again."
        )
    return inputs, logits


def read_golden_texts(job: Job, texts: NDArray[Any]) -> list[Text]:
    """The golden file's texts, with its keywords if it has any."""
    assert job.artifact.golden
    path = Path(job.artifact_dir) / job.artifact.golden.file
    try:
        with np.load(path, allow_pickle=False) as archive:
            keywords = archive["keywords"] if "keywords" in archive else np.full(len(texts), "")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SlimpiError(f"{path} has no readable `keywords`: {error}. Build it again.") from error
    if keywords.dtype.kind != "U" or keywords.shape != texts.shape:
        raise SlimpiError(
            f"{path} has `keywords` {keywords.dtype} {keywords.shape} for `texts` {texts.shape}, expected one a text. "
            "Build it again."
        )
    return [Text(str(text), str(keyword)) for text, keyword in zip(texts, keywords, strict=True)]


def _text_arrays(texts: list[Text]) -> dict[str, NDArray[Any]]:
    keywords = [text.keyword for text in texts]
    return {"texts": np.array([text.text for text in texts])} | (
        {"keywords": np.array(keywords)} if any(keywords) else {}
    )


def _save_golden(job: Job, **arrays: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomic(Path(job.work_dir) / GOLDEN_NAME, buffer.getvalue())


def _check_golden(job: Job, golden: Logits, n_classes: int, n_inputs: int) -> None:
    enough = n_inputs >= len(golden) if job.artifact.task == "lm" else n_inputs == len(golden)
    if golden.shape[1] != n_classes or not enough:
        raise SlimpiError(
            f"golden logits of {job.artifact.id} are {golden.shape} for {n_inputs} inputs, the model gives {n_classes} "
            "a row. Build the artifact again."
        )


def _last_logits(model: LanguageModel, tokens: Tokens, n: int) -> Logits:
    model.open_context(len(tokens), n_outputs=n)
    return np.concatenate([rows.copy() for _, rows in model.logits(tokens, len(tokens) - n)])


def _each_logits(classifier: OnnxClassifier, texts: list[Text]) -> Logits:
    """One text at a time: dynamic quantization scales depend on the whole batch."""
    return np.concatenate([classifier.logits([text]) for text in texts])


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
