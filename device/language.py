"""Tasks for causal language models (GGUF in llama.cpp, ONNX in ONNX Runtime): perplexity and throughput."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from device.inputs import read_text
from device.language_models import RUNTIMES, LanguageModel, open_language_model
from device.runtimes import N_BATCH, N_UBATCH, Logits, Tokens
from device.samples import Taken, measurement
from device.schema import Job, Measurement, Perplexity, RecordLogits, Sample, SlimpiError, Throughput
from device.wire import Request, Started

N_LOADS = 3


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
    if model.add_eos:
        raise SlimpiError(
            f"the tokenizer of {job.artifact.id} ends every text with an end token, which perplexity "
            "is not defined for. Set tokenizer.ggml.add_eos_token to false."
        )
    tokens = model.tokenize(read_text(job, task.dataset).removesuffix(b"\n"))
    n_chunks = _count_chunks(task, len(tokens))
    return tokens[: n_chunks * task.n_ctx].reshape(n_chunks, task.n_ctx)


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


def run_throughput(request: Request, task: Throughput) -> Iterator[Started | Sample]:
    """Series load_ms, prefill_ms, ttft_ms, decode_ms, one sample a repetition, warm-ups first.

    Timed as llama-bench times pp and tg (tools/llama-bench/llama-bench.cpp): random tokens, an empty cache, a
    context just large enough, logits of the last token only, llama_synchronize before the clock stops;
    tokenization, sampling and making the batches are outside. Time to first token is the same run as prefill plus
    reading the most likely token out of its logits. Load is llama_model_load_from_file plus a context.
    """
    job, total = request.job, task.warmup + task.repetitions
    yield Started(total=N_LOADS + 3 * total)
    RUNTIMES[job.artifact.kind].load()
    for i in range(min(request.first_missing("load_ms"), N_LOADS - 1), N_LOADS):
        begin_ns = time.perf_counter_ns()
        with open_language_model(job.artifact, job.artifact_dir, job.threads) as model:
            model.open_context(task.n_prompt)
            yield request.sample("load_ms", i, _ms_since(begin_ns))
            if i == N_LOADS - 1:
                yield from _time_prefill(request, task, model)
                yield from _time_decode(request, task, model)


def _time_prefill(request: Request, task: Throughput, model: LanguageModel) -> Iterator[Sample]:
    batches = model.random_batches(task.n_prompt, min(N_BATCH, task.n_prompt), seed=0)
    for i in _repetitions(task, request.first_missing("prefill_ms", "ttft_ms", warmup=task.warmup)):
        model.reset()
        begin_ns = time.perf_counter_ns()
        model.run(batches)
        prefill_ms = _ms_since(begin_ns)
        model.next_token()
        ttft_ms = _ms_since(begin_ns)
        yield request.sample("prefill_ms", i, prefill_ms, warmup=i < task.warmup)
        yield request.sample("ttft_ms", i, ttft_ms, warmup=i < task.warmup)


def _time_decode(request: Request, task: Throughput, model: LanguageModel) -> Iterator[Sample]:
    model.open_context(task.n_gen)
    batches = model.random_batches(task.n_gen, 1, seed=1)
    for i in _repetitions(task, request.first_missing("decode_ms", warmup=task.warmup)):
        model.reset()
        begin_ns = time.perf_counter_ns()
        model.run(batches)
        yield request.sample("decode_ms", i, _ms_since(begin_ns), warmup=i < task.warmup)


def _repetitions(task: Throughput, done: int) -> Iterator[int]:
    """Indices still to run: a fresh process warms up again even if the journal holds its warm-ups; the worker drops
    samples that are already there."""
    if done < task.repetitions:
        yield from range(task.warmup)
        yield from range(task.warmup + done, task.warmup + task.repetitions)


def summarize_throughput(task: Throughput, taken: Taken, job: Job) -> list[Measurement]:
    runtime = RUNTIMES[job.artifact.kind].settings
    prompt = {"threads": job.threads, "n_prompt": task.n_prompt, **runtime}
    gen = {"threads": job.threads, "n_gen": task.n_gen, **runtime}
    load = {"threads": job.threads, "page_cache": "as found, just after the file was read to check its hash"}

    def per_second(count: int) -> Callable[[float], float]:
        return lambda duration_ms: count * 1000.0 / duration_ms

    prefill, decode = taken["prefill_ms"], taken["decode_ms"]
    return [
        measurement(job, "prefill_tokens_per_s", "token/s", prefill, True, prompt, per_second(task.n_prompt)),
        measurement(job, "decode_tokens_per_s", "token/s", decode, True, gen, per_second(task.n_gen)),
        measurement(job, "ttft_ms", "ms", taken["ttft_ms"], False, prompt),
        measurement(job, "load_ms", "ms", taken["load_ms"], False, load),
    ]


def _ms_since(begin_ns: int) -> float:
    return (time.perf_counter_ns() - begin_ns) / 1e6
