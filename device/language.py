"""Task perplexity of a causal language model (GGUF in llama.cpp, ONNX in ONNX Runtime), and how a text is scored."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from device.inputs import read_text
from device.language_models import LanguageModel, open_language_model
from device.llama import N_UBATCH
from device.records import SlimpiError
from device.results import Measurement, Sample
from device.runtimes import Logits, Tokens
from device.samples import Taken, measurement
from device.schema import Job, Perplexity, RecordLogits
from device.wire import Request, Started


def run_perplexity(request: Request, task: Perplexity) -> Iterator[Started | Sample]:
    """One sample a chunk, series `nll`: mean negative log-likelihood of its scored tokens, nats/token.

    llama-perplexity's definition (tools/perplexity/perplexity.cpp): the text without its final newline is
    tokenized once and cut into chunks of n_ctx; each is evaluated alone, its first token replaced by BOS if the
    vocabulary adds one; positions n_ctx//2 ... n_ctx-2 predict the token after them.
    """
    job = request.job
    with open_language_model(job.artifact, job.artifact_dir, job.threads) as model:
        chunks = read_chunks(job, task, model)
        yield Started(total=len(chunks))
        open_scoring(model, task.n_ctx)
        for i in range(request.first_missing("nll"), len(chunks)):
            pieces = [-log_probs(rows, targets) for rows, targets in scored_rows(model, chunks[i])]
            yield request.sample("nll", i, float(np.concatenate(pieces).mean()))


def summarize_perplexity(task: Perplexity | RecordLogits, taken: Taken, job: Job) -> list[Measurement]:
    """Per-chunk means, so that exp(mean) is the perplexity and stderr its relative error (delta method)."""
    conditions = {
        "n_ctx": task.n_ctx,
        "n_chunks": len(taken["nll"]),
        "n_scored_tokens_per_chunk": n_scored(task.n_ctx),
        "corpus": task.dataset.name,
        "corpus_sha256": task.dataset.file.sha256,
        "tokenizer_sha256": job.artifact.tokenizer_sha256,
        "definition": "llama-perplexity",
    }
    return [measurement(job, "nll", "nats/token", taken["nll"], False, conditions)]


def perplexity_of(nll: Measurement) -> tuple[float, float]:
    """Perplexity and its standard error exp(m) * s (delta method), over chunks; NaN error for one chunk."""
    return math.exp(nll.mean), math.exp(nll.mean) * nll.stderr


def read_chunks(job: Job, task: Perplexity | RecordLogits, model: LanguageModel) -> Tokens:
    """The text's tokens, (n_chunks, n_ctx) int32; what is left at its end is not scored."""
    refuse_eos(job, model, "perplexity")
    tokens = model.tokenize(read_text(job, task.dataset).removesuffix(b"\n"))
    n_chunks = _count_chunks(task, len(tokens))
    return tokens[: n_chunks * task.n_ctx].reshape(n_chunks, task.n_ctx)


def refuse_eos(job: Job, model: LanguageModel, what: str) -> None:
    """SlimpiError where the tokenizer would put an end token behind the text of each chunk."""
    if model.add_eos:
        raise SlimpiError(
            f"the tokenizer of {job.artifact.id} ends every text with an end token, which {what} "
            "is not defined for. Set tokenizer.ggml.add_eos_token to false."
        )


def n_scored(n_ctx: int) -> int:
    """Scored tokens of a chunk: positions n_ctx//2 ... n_ctx-2."""
    return n_ctx - 1 - n_ctx // 2


def open_scoring(model: LanguageModel, n_ctx: int) -> None:
    """A context that gives logits of a chunk's second half only."""
    model.open_context(n_ctx, n_outputs=min(n_ctx - n_ctx // 2, N_UBATCH))


def scored_rows(model: LanguageModel, chunk: Tokens) -> Iterator[tuple[Logits, Tokens]]:
    """Evaluate one chunk (n_ctx,): (logits (n, n_vocab), tokens they are to predict (n,)) of its scored positions.

    The rows are llama.cpp's own memory and hold until the next piece is asked for.
    """
    seen, targets = chunk.copy(), chunk[1:]
    if model.add_bos:
        seen[0] = model.bos
    for at, rows in model.logits(seen, len(chunk) // 2):
        count = min(len(rows), len(targets) - at)
        if count:
            yield rows[:count], targets[at : at + count]


def log_probs(rows: Logits, targets: Tokens) -> NDArray[np.float64]:
    """Log-probability each row of logits (n, n_vocab) gives its target (n,)."""
    result = np.empty(len(targets), dtype=np.float64)
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        top, log_sum = log_partition(row)
        result[i] = float(row[target] - top) - log_sum
    return result


def log_partition(row: Logits) -> tuple[np.float32, float]:
    """(largest logit, ln of the sum of exp(logit - largest)) of one row (n_vocab,).

    float32 exponentials summed in float64, as llama-perplexity's log_softmax.
    """
    top = row.max()
    return top, math.log(np.exp(row - top).sum(dtype=np.float64))


def _count_chunks(task: Perplexity | RecordLogits, n_tokens: int) -> int:
    if n_tokens < 2 * task.n_ctx:
        raise SlimpiError(
            f"{task.dataset.name} has {n_tokens} tokens, perplexity at n_ctx {task.n_ctx} needs "
            f"at least {2 * task.n_ctx}. Take a longer text or a smaller n_ctx."
        )
    available = n_tokens // task.n_ctx
    if task.n_chunks > available:
        raise SlimpiError(
            f"{task.dataset.name} has {available} chunks of {task.n_ctx} tokens, {task.n_chunks} are asked for. "
            "Ask for fewer, or 0 for all."
        )
    return task.n_chunks or available
