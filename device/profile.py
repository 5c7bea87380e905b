"""Task profile: nanoseconds a weight of a matrix product, for each format and shape, on this device.

What a token costs when decoding is almost only that, and on NEON fewer bits are not always faster; plans that keep a
budget of time are made from this table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from device.ggml import Backend, Products, Weights
from device.results import Measurement, Sample
from device.samples import Taken, measurement
from device.schema import Job, Profile
from device.wire import Request, Started

_MIB = 2**20
_MAX_COPIES = 1024


def run_profile(request: Request, task: Profile) -> Iterator[Started | Sample]:
    """Series ns_per_weight, index = round * number of products + product; warm-up rounds first. Series product_error,
    one a product: |y - W x| / |W x| of the kernel's result, in the first round.

    Timed: one graph of as many equal matrices as working_set_mib holds, so that weights come from memory as they do
    when decoding, with the threads and the node-by-node order of llama.cpp's own graphs. Filling them, and one pass
    before the clock starts, are not timed. Rounds go through all products, so that a clock that drops hits all alike.
    """
    found = task.products
    n_rounds = task.warmup + task.repetitions
    yield Started(total=len(found) * (n_rounds + 1))
    done = request.first_missing("ns_per_weight", warmup=task.warmup * len(found))
    checked = request.first_missing("product_error")
    if done >= task.repetitions * len(found) and checked >= len(found):
        return
    weights = [Weights(product.format, product.rows, product.columns) for product in found]
    with Backend(request.job.threads) as backend:
        first = True
        for turn in (*range(task.warmup), *range(task.warmup + done // len(found), n_rounds)):
            for index, matrix in enumerate(weights):
                ns, error = _time(backend, matrix, task)
                if first:
                    yield request.sample("product_error", index, error)
                at = turn * len(found) + index
                yield request.sample("ns_per_weight", at, ns, warmup=turn < task.warmup)
            first = False


def _time(backend: Backend, weights: Weights, task: Profile) -> tuple[float, float]:
    n_copies = copies(weights, task)
    with Products(backend, weights, n_copies, task.n_tokens) as products:
        products.compute()
        begin_ns = time.perf_counter_ns()
        products.compute()
        spent_ns = time.perf_counter_ns() - begin_ns
        return spent_ns / (n_copies * weights.rows * weights.columns), products.relative_error()


def copies(weights: Weights, task: Profile) -> int:
    """Matrices, with the results they give, that fill the working set."""
    each = weights.n_bytes + 4 * weights.rows * task.n_tokens
    return min(math.ceil(task.working_set_mib * _MIB / each), _MAX_COPIES)


def summarize_profile(task: Profile, taken: Taken, job: Job) -> list[Measurement]:
    """ns_per_weight and product_error of each product; the conditions say which product."""
    found = task.products
    results = []
    for index, product in enumerate(found):
        conditions = {
            "format": product.format,
            "rows": product.rows,
            "columns": product.columns,
            "threads": job.threads,
            "n_tokens": task.n_tokens,
            "working_set_mib": task.working_set_mib,
        }
        mine = [sample for sample in taken["ns_per_weight"] if sample.index % len(found) == index]
        error = [sample for sample in taken["product_error"] if sample.index == index]
        results.append(measurement(job, "ns_per_weight", "ns/weight", mine, False, conditions))
        results.append(measurement(job, "product_error", "relative", error, False, conditions))
    return results
