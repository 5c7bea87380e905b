"""What the comparison of classifiers' latency leaves behind, and what is concluded from it. Pure; nothing runs here.

History of classify_speed.json's schema: 1 (2026-11) first version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal

from bench_common import Here

from device.records import Record, SlimpiError
from device.schema import Provenance

MIN_PAIRS = 5

Tool = Literal["slimpi", "onnxruntime", "optimum"]

TARGETS: dict[Tool, float] = {"optimum": 0.25, "onnxruntime": 1.05}
"""The most that slimpi's latency may be of a peer's, the median over tweets."""

OPTIMUM_FILE = "optimum-INT8-dynamic"
"""Under this name the rows have the file that optimum made; all others are of our artifacts' variants."""


class LatencyRow(Record, frozen=True, kw_only=True):
    """One run of one tool over the tweets, one at a time. `pair` counts from 0, `order` is the place within it.

    samples_ns, cpu_ns: tokenization and inference of each tweet, in the order of the table, by the clock and in CPU
    time. pad_to: every tweet is padded to this length; 0 = none is.
    """

    tool: Tool
    variant: str
    model_sha256: str
    pair: int
    order: int
    n_threads: int
    pad_to: int
    test_time: str
    load_1min_before: float
    samples_ns: list[int]
    cpu_ns: list[int]
    provenance: Provenance


class Verdict(Record, frozen=True, kw_only=True):
    """slimpi's latency over a peer's: the median of the pairs' ratios, each the median over the tweets of the ratio
    for this tweet; lowest and highest pair; the ratio of all pairs' total times. `ratio_of_cpu` is `ratio` in CPU time,
    which is what a busy machine disturbs least; the target is the clock's."""

    variant: str
    peer: Tool
    ratio: float
    ratio_min: float
    ratio_max: float
    ratio_of_totals: float
    ratio_of_cpu: float
    n: int
    target: str
    ok: bool


class Conditions(Here, frozen=True, kw_only=True):
    packages: dict[str, str]
    rows: str
    rows_sha256: str
    n_rows: int
    max_tokens: int
    optimum_settings: str
    load_avg_before: list[float]
    load_avg_after: list[float]
    note: str


class ClassifySpeed(Record, frozen=True, kw_only=True):
    """classify_speed.json."""

    schema: Literal[1] = 1
    conditions: Conditions
    rows: list[LatencyRow]
    verdicts: list[Verdict]


def _samples_ns(row: LatencyRow) -> list[int]:
    return row.samples_ns


def _cpu_ns(row: LatencyRow) -> list[int]:
    return row.cpu_ns


def pair_ratios(
    ours: Sequence[LatencyRow], theirs: Sequence[LatencyRow], times: Callable[[LatencyRow], list[int]] = _samples_ns
) -> list[float]:
    """Per pair, the median over the tweets of ours / theirs. SlimpiError for unlike or missing halves."""
    by_pair = {row.pair: row for row in theirs}
    ratios = []
    for row in ours:
        peer = by_pair.get(row.pair)
        if peer is None or len(times(peer)) != len(times(row)) or peer.n_threads != row.n_threads:
            raise SlimpiError(f"pair {row.pair} of {row.variant} lacks a like run of its peer. Measure it again.")
        ratios.append(median(a / b for a, b in zip(times(row), times(peer), strict=True)))
    return ratios


def verdicts_of(rows: Sequence[LatencyRow]) -> list[Verdict]:
    """Each of our variants against optimum's file and against ONNX Runtime on the same file."""
    verdicts = []
    for variant in dict.fromkeys(row.variant for row in rows if row.tool == "slimpi"):
        ours = [row for row in rows if (row.tool, row.variant) == ("slimpi", variant)]
        for peer, target in TARGETS.items():
            named = OPTIMUM_FILE if peer == "optimum" else variant
            theirs = [row for row in rows if (row.tool, row.variant) == (peer, named)]
            ratios = pair_ratios(ours, theirs)
            if peer == "onnxruntime" and {r.model_sha256 for r in ours} != {r.model_sha256 for r in theirs}:
                raise SlimpiError(f"{variant} was another file in onnxruntime. Only like is compared with like.")
            verdicts.append(
                Verdict(
                    variant=variant,
                    peer=peer,
                    ratio=median(ratios),
                    ratio_min=min(ratios),
                    ratio_max=max(ratios),
                    ratio_of_totals=_total(ours) / _total(theirs),
                    ratio_of_cpu=median(pair_ratios(ours, theirs, _cpu_ns)),
                    n=len(ratios),
                    target=f"<= {target}, {MIN_PAIRS} pairs or more",
                    ok=median(ratios) <= target and len(ratios) >= MIN_PAIRS,
                )
            )
    return verdicts


def _total(rows: Sequence[LatencyRow]) -> int:
    return sum(sum(row.samples_ns) for row in rows)
