"""What a comparison with llama.cpp's tools leaves behind, and what is concluded from it. Pure; nothing runs here.

History of peers.json's schema: 1 (2026-11) first version. 2 (2026-11) verdicts have the median's 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Literal

from bench_common import Here
from scipy import stats

from device.records import Record, SlimpiError
from device.schema import Provenance

MAX_PPL_DIFFERENCE = 0.005
MIN_SPEED_RATIO = 0.98
MIN_PAIRS, MAX_PAIRS = 8, 40

Tool = Literal["slimpi", "llama-bench"]


class PerplexityRow(Record, frozen=True, kw_only=True):
    """One model's perplexity by both: slimpi's mean NLL of each chunk, llama-perplexity's estimate after each."""

    variant: str
    model_sha256: str
    corpus: str
    corpus_sha256: str
    n_ctx: int
    n_threads: int
    slimpi_chunk_nll_nats: list[float]
    llama_running_ppl: list[float]
    llama_ppl_stderr: float
    provenance: Provenance

    def __post_init__(self) -> None:
        ours, theirs = len(self.slimpi_chunk_nll_nats), len(self.llama_running_ppl)
        if ours != theirs or not ours:
            raise SlimpiError(
                f"{self.variant}: slimpi scored {ours} chunks, llama-perplexity {theirs}. "
                "Ask for as many --chunks as the text has, or 0 for all."
            )

    @property
    def slimpi_running_ppl(self) -> list[float]:
        totals = accumulate(self.slimpi_chunk_nll_nats)
        return [math.exp(total / n) for n, total in enumerate(totals, start=1)]

    @property
    def running_ratios(self) -> list[float]:
        """slimpi's estimate over llama-perplexity's after each chunk; the last one is of the whole text."""
        return [a / b for a, b in zip(self.slimpi_running_ppl, self.llama_running_ppl, strict=True)]


class SpeedRow(Record, frozen=True, kw_only=True):
    """One test of one run, under llama-bench's field names. `pair` counts from 0, `order` is the place within it.

    slimpi reports tokens/s; its samples_ns are computed back from them, to the nanosecond.
    """

    tool: Tool
    variant: str
    model_sha256: str
    pair: int
    order: int
    n_prompt: int
    n_gen: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    test_time: str
    load_1min_before: float
    samples_ns: list[int]
    provenance: Provenance

    @property
    def test(self) -> str:
        return f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second of each repetition."""
        return [(self.n_prompt + self.n_gen) * 1e9 / ns for ns in self.samples_ns]


class Verdict(Record, frozen=True, kw_only=True):
    """slimpi's figure over the peer's, against its target; recomputable from the rows.

    Perplexity: `ratio` of the whole text, lowest and highest over the n running estimates (a compensating pair of
    errors shows there). Throughput: median, lowest and highest of the n pairs' ratios of medians, and the 95 %
    interval of that median (`low` to `high`, see `interval_of_median`); the text is one, so perplexity has none.
    """

    variant: str
    test: str
    peer: str
    ratio: float
    ratio_min: float
    ratio_max: float
    low: float | None = None
    high: float | None = None
    n: int
    target: str
    ok: bool


class Conditions(Here, frozen=True, kw_only=True):
    """What both sides ran on and from; `features` are the CPU features llama.cpp was compiled for."""

    llama_cpp_python: str
    wheel_commit: str
    build_commit: str
    build_number: int
    features: str
    load_avg_before: list[float]
    load_avg_after: list[float]


class Peers(Record, frozen=True, kw_only=True):
    """peers.json."""

    schema: Literal[2] = 2
    conditions: Conditions
    perplexity: list[PerplexityRow]
    throughput: list[SpeedRow]
    verdicts: list[Verdict]


def pair_ratios(rows: Sequence[SpeedRow], variant: str, test: str) -> list[float]:
    """Per pair, slimpi's median tokens/s over llama-bench's; SlimpiError for unlike or missing halves."""
    chosen = [row for row in rows if (row.variant, row.test) == (variant, test)]
    ratios = []
    for pair in sorted({row.pair for row in chosen}):
        half = {row.tool: row for row in chosen if row.pair == pair}
        if set(half) != {"slimpi", "llama-bench"}:
            raise SlimpiError(f"{variant} {test} pair {pair} has only {sorted(half)}. Measure it again.")
        ours, theirs = half["slimpi"], half["llama-bench"]
        for field in ("model_sha256", "n_threads", "n_batch", "n_ubatch"):
            if getattr(ours, field) != getattr(theirs, field):
                raise SlimpiError(
                    f"{variant} {test}: {field} is {getattr(ours, field)} in slimpi, {getattr(theirs, field)} in "
                    "llama-bench. Only like is compared with like."
                )
        ratios.append(median(ours.samples_ts) / median(theirs.samples_ts))
    return ratios


def verdicts_of(perplexity: Sequence[PerplexityRow], throughput: Sequence[SpeedRow]) -> list[Verdict]:
    tests = dict.fromkeys((row.variant, row.test) for row in throughput)
    return [*map(_perplexity_verdict, perplexity), *(_speed_verdict(throughput, *test) for test in tests)]


def _perplexity_verdict(row: PerplexityRow) -> Verdict:
    ratios = row.running_ratios
    return Verdict(
        variant=row.variant,
        test=f"perplexity ctx {row.n_ctx}",
        peer="llama-perplexity",
        ratio=ratios[-1],
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        n=len(ratios),
        target=f"1 +/- {MAX_PPL_DIFFERENCE}",
        ok=abs(ratios[-1] - 1) <= MAX_PPL_DIFFERENCE,
    )


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median by the sign test: two of the values themselves, -inf or inf for want of values.

    It assumes nothing of their distribution but independence (Conover, Practical Nonparametric Statistics, 3.2).
    """
    found = stats.quantile_test(values, p=0.5).confidence_interval(confidence_level=0.95)
    low, high = float(found.low), float(found.high)
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


def decided(rows: Sequence[SpeedRow]) -> bool:
    """Whether each test has MIN_PAIRS pairs and its median's interval lies on one side of the target."""
    for variant, test in {(row.variant, row.test) for row in rows}:
        ratios = pair_ratios(rows, variant, test)
        low, high = interval_of_median(ratios)
        if len(ratios) < MIN_PAIRS or low < MIN_SPEED_RATIO <= high:
            return False
    return bool(rows)


def _speed_verdict(rows: Sequence[SpeedRow], variant: str, test: str) -> Verdict:
    ratios = pair_ratios(rows, variant, test)
    low, high = interval_of_median(ratios)
    return Verdict(
        variant=variant,
        test=test,
        peer="llama-bench",
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        low=low if math.isfinite(low) else None,
        high=high if math.isfinite(high) else None,
        n=len(ratios),
        target=f">= {MIN_SPEED_RATIO}, {MIN_PAIRS} pairs or more",
        ok=median(ratios) >= MIN_SPEED_RATIO and len(ratios) >= MIN_PAIRS,
    )
