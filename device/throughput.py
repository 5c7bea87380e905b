"""Task throughput: how fast a language model loads, reads a prompt, and writes.

No numpy here, see `llama`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from device.language_models import RUNTIMES, LanguageModel, open_language_model
from device.llama import N_BATCH
from device.results import Measurement, Sample
from device.samples import Taken, measurement
from device.schema import Job, Throughput
from device.wire import Request, Started

N_LOADS = 3


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
    """Prefill and decode in tokens/s, TTFT and load in ms, with what they were taken under."""
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
