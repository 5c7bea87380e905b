"""KL divergence of a model's next-token distributions to a reference's, as llama-perplexity --kl-divergence has it.

Two tasks: record_logits runs the reference once, divergence scores anything with the same vocabulary against its file.

For scored position with reference p and model q:  KLD = sum over tokens with ln p > -16 of p (ln p - ln q), p from the
file's 16-bit log-probabilities (tools/perplexity/perplexity.cpp, kl_divergence). The tokens left out hold little of p
(n_vocab * 1.1e-7 at most), so a KLD can come out a hair below zero where both are the same. A target that the file has
at its floor counts as that likely under the reference; the recording's own `nll` is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.language import log_partition, n_scored, open_scoring, read_chunks, scored_rows, summarize_perplexity
from device.language_models import LanguageModel, open_language_model
from device.logits_file import CUT_NATS, Info, LogitsFile, Recording, Words, decode_row, encode_row
from device.records import SlimpiError
from device.results import Measurement, Sample
from device.runtimes import Logits, Tokens
from device.samples import Taken, measurement
from device.schema import Divergence, Job, RecordLogits
from device.wire import Request, Started

DEFINITION = "llama-perplexity --kl-divergence"


@dataclass(frozen=True)
class Score:
    """One position: KL divergence, negative log-likelihood under the model and under the reference (nats), and
    whether both put the same token first."""

    kld: float
    nll: float
    nll_reference: float
    same_top: bool


def run_record_logits(request: Request, task: RecordLogits) -> Iterator[Started | Sample]:
    """Write reference.logits to the work folder. Series `nll` as in run_perplexity, each once its chunk is on disk."""
    job = request.job
    with open_language_model(job.artifact, job.artifact_dir, job.threads) as model:
        chunks = read_chunks(job, task, model)
        info = Info(
            n_ctx=task.n_ctx,
            n_vocab=model.n_vocab,
            n_chunks=len(chunks),
            corpus=task.dataset.name,
            corpus_sha256=task.dataset.file.sha256,
            tokenizer_sha256=job.artifact.tokenizer_sha256,
            reference=job.artifact.id,
        )
        yield Started(total=len(chunks))
        open_scoring(model, task.n_ctx)
        words = np.empty((n_scored(task.n_ctx), info.row_words), dtype=np.uint16)
        with Recording(Path(job.work_dir), info, chunks, request.first_missing("nll")) as recording:
            for i in range(recording.n_chunks, len(chunks)):
                nll = _encode_chunk(model, chunks[i], words)
                _check_finite(job, i, nll)
                recording.append(words)
                yield request.sample("nll", i, nll)
            recording.finish()


def _encode_chunk(model: LanguageModel, chunk: Tokens, words: Words) -> float:
    """Fill `words` (n_scored, row_words); the chunk's mean negative log-likelihood."""
    nlls: list[float] = []
    for rows, targets in scored_rows(model, chunk):
        for row, target in zip(rows, targets, strict=True):
            encode_row(row, words[len(nlls)])
            top, log_sum = log_partition(row)
            nlls.append(log_sum - float(row[target] - top))
    return math.fsum(nlls) / len(nlls)


def summarize_record_logits(task: RecordLogits, taken: Taken, job: Job) -> list[Measurement]:
    """Its product is the file; the perplexity of the reference comes with it."""
    return summarize_perplexity(task, taken, job)


def run_divergence(request: Request, task: Divergence) -> Iterator[Started | Sample]:
    """Per scored token `kld` and `nll_difference` (model - reference), per chunk mean `nll` and share `same_top`."""
    job = request.job
    path = Path(job.data_dir) / task.dataset.file.path
    with LogitsFile(path) as reference, open_language_model(job.artifact, job.artifact_dir, job.threads) as model:
        _check_reference(job, task, reference.info, model)
        count = n_scored(task.n_ctx)
        yield Started(total=task.n_chunks * 2 * (count + 1))
        open_scoring(model, task.n_ctx)
        for i in range(request.first_missing("nll", "same_top"), task.n_chunks):  # the last samples of a chunk
            scores = _score_chunk(model, reference, i)
            _check_finite(job, i, *(s.kld for s in scores), *(s.nll for s in scores))
            for at, score in enumerate(scores, start=i * count):
                yield request.sample("kld", at, score.kld)
                yield request.sample("nll_difference", at, score.nll - score.nll_reference)
            yield request.sample("nll", i, math.fsum(s.nll for s in scores) / count)
            yield request.sample("same_top", i, sum(s.same_top for s in scores) / count)


def _score_chunk(model: LanguageModel, reference: LogitsFile, chunk: int) -> list[Score]:
    scores: list[Score] = []
    for rows, targets in scored_rows(model, reference.tokens[chunk]):
        for row, target in zip(rows, targets, strict=True):
            scores.append(score_row(reference.row(chunk, len(scores)), row, int(target)))
    return scores


def score_row(words: Words, row: Logits, target: int) -> Score:
    """The reference's 16-bit log-probabilities (row_words,) against the model's logits (n_vocab,)."""
    top, log_sum = log_partition(row)
    reference = decode_row(words, len(row))
    kept = np.flatnonzero(reference > -CUT_NATS)
    log_p = reference[kept]
    log_q = (row[kept] - top) - np.float32(log_sum)
    return Score(
        kld=float((np.exp(log_p) * (log_p - log_q)).sum(dtype=np.float64)),
        nll=log_sum - float(row[target] - top),
        nll_reference=-float(reference[target]),
        same_top=bool(reference.argmax() == row.argmax()),
    )


def summarize_divergence(task: Divergence, taken: Taken, job: Job) -> list[Measurement]:
    """Raw per-token samples, so that medians and percentiles can be computed when read.

    The perplexity's name is not `nll`, which belongs to the perplexity task and its own text.
    """
    conditions = {
        "n_ctx": task.n_ctx,
        "n_chunks": task.n_chunks,
        "n_scored_tokens_per_chunk": n_scored(task.n_ctx),
        "corpus": task.corpus,
        "corpus_sha256": task.corpus_sha256,
        "tokenizer_sha256": job.artifact.tokenizer_sha256,
        "reference": task.reference,
        "reference_sha256": task.dataset.file.sha256,
        "definition": DEFINITION,
    }
    return [
        measurement(job, "kld", "nats/token", taken["kld"], False, conditions),
        measurement(job, "nll_difference", "nats/token", taken["nll_difference"], False, conditions),
        measurement(job, "same_top", "fraction", taken["same_top"], True, conditions),
        measurement(job, "divergence_nll", "nats/token", taken["nll"], False, conditions),
    ]


def _check_reference(job: Job, task: Divergence, info: Info, model: LanguageModel) -> None:
    """SlimpiError unless the file holds what the task says, in this model's vocabulary."""
    name = task.dataset.file.path
    for what, have, want in (
        ("n_ctx", info.n_ctx, task.n_ctx),
        ("corpus_sha256", info.corpus_sha256, task.corpus_sha256),
        ("reference", info.reference, task.reference),
        ("tokenizer_sha256", info.tokenizer_sha256, job.artifact.tokenizer_sha256),
        ("n_vocab", info.n_vocab, model.n_vocab),
    ):
        if have != want:
            raise SlimpiError(f"{name} has {what} {have}, {job.artifact.id} needs {want}. Record the reference again.")
    if info.n_chunks < task.n_chunks:
        raise SlimpiError(
            f"{name} has {info.n_chunks} chunks, {task.n_chunks} are asked for. Ask for fewer or record more."
        )


def _check_finite(job: Job, chunk: int, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise SlimpiError(
            f"{job.artifact.id} gives logits that are no numbers, or probabilities of 0, in chunk {chunk}. "
            "Its weights are broken: build it again."
        )
