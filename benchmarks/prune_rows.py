"""What a comparison of pruned files leaves behind, and what is concluded from it. Pure; nothing runs here.

History of prune.json's schema: 1 (2026-11) first version.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from statistics import fmean, median, variance
from typing import Literal

from quality_rows import Conditions, Score, mean_interval

from device.records import Record

MIN_GAIN = 0.9
SIZE_SLACK = 0.001
"""Files are of one size if they differ by no more than this: per-layer keys take some bytes."""

Maker = Literal["llama-quantize", "slimpi"]
_PERCENT = re.compile(r"-(\d+(?:\.\d+)?)-")


class SpeedPair(Record, frozen=True, kw_only=True):
    """Decoded tokens a second of the whole model and of the pruned one, runs next to each other, median of each."""

    whole_tps: float
    pruned_tps: float


class Accuracy(Record, frozen=True, kw_only=True):
    """Zero-shot answers to a set of questions, 1 or 0 each, by the harness's acc and acc_norm; the worker's peak."""

    questions: str
    questions_sha256: str
    correct: list[float]
    correct_norm: list[float]
    peak_rss_bytes: int

    @property
    def same_set(self) -> tuple[str, str]:
        """What answers that compare question by question have in common."""
        return self.questions, self.questions_sha256


class PruneRow(Record, frozen=True, kw_only=True):
    """One file. artifact_id: what it was built as, "" in rows that are older than the field and of llama-quantize's.
    n_linear_weights: in the matrices of the decoder blocks."""

    model: str
    variant: str
    maker: Maker
    artifact_id: str = ""
    file_sha256: str
    size_bytes: int
    n_weights: int
    n_linear_weights: int
    score: Score
    notes: list[str]
    speed: list[SpeedPair]
    accuracy: list[Accuracy]

    @property
    def percent(self) -> float | None:
        """What was asked to be removed; None for the whole model."""
        found = _PERCENT.search(self.variant)
        return float(found[1]) if found else None

    @property
    def repaired(self) -> bool:
        return "+REPAIR" in self.variant

    @property
    def quantized(self) -> str:
        """The variant behind the pruning, such as Q8_0."""
        return self.variant[found.end() :] if (found := _PERCENT.search(self.variant)) else self.variant

    def comparable(self, peer: PruneRow) -> bool:
        """Whether it is in the peer's type, no larger, and was measured on the same text against the same reference."""
        mine, theirs = ((row.quantized, row.score.measured_against) for row in (self, peer))
        return mine == theirs and self.size_bytes <= peer.size_bytes * (1 + SIZE_SLACK)


class Verdict(Record, frozen=True, kw_only=True):
    """quality: our best repaired file in the type and of at most the bytes of the peer's best, by perplexity; ratio is
    ours over theirs. speed: the gain of decoding over the share of weights removed. Recomputable from the rows."""

    model: str
    what: Literal["quality", "speed"]
    percent: float
    variant: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    low: float | None = None
    high: float | None = None
    target: str
    ok: bool


class Pruning(Record, frozen=True, kw_only=True):
    """prune.json."""

    schema: Literal[1] = 1
    conditions: Conditions
    rows: list[PruneRow]
    verdicts: list[Verdict]


def merged(rows: Sequence[PruneRow], row: PruneRow) -> list[PruneRow]:
    """The rows with `row` in the place of the one it replaces, or at the end."""
    same = (row.model, row.variant)
    if same in [(r.model, r.variant) for r in rows]:
        return [row if (r.model, r.variant) == same else r for r in rows]
    return [*rows, row]


def verdicts_of(rows: Sequence[PruneRow]) -> list[Verdict]:
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        for percent in sorted({row.percent for row in mine if row.percent is not None}):
            found += _quality(mine, percent)
        whole = next((row for row in mine if row.percent is None), None)
        found += [_speed(row, whole) for row in mine if row.speed and whole is not None]
    return found


def _quality(rows: Sequence[PruneRow], percent: float) -> list[Verdict]:
    """None for a share that the peer was not asked for."""
    peers = [row for row in rows if row.percent == percent and row.maker == "llama-quantize"]
    if not peers:
        return []
    peer = min(peers, key=lambda row: row.score.perplexity)
    ours = [row for row in rows if row.percent == percent and row.repaired and row.comparable(peer)]
    if not ours:
        return []
    best = min(ours, key=lambda row: row.score.perplexity)
    differences = [a - b for a, b in zip(best.score.nll_chunks, peer.score.nll_chunks, strict=True)]
    interval = mean_interval(differences)
    return [
        Verdict(
            model=best.model,
            what="quality",
            percent=percent,
            variant=best.variant,
            peer=peer.variant,
            ours=best.score.perplexity,
            theirs=peer.score.perplexity,
            ratio=best.score.perplexity / peer.score.perplexity,
            low=interval[0] if interval else None,
            high=interval[1] if interval else None,
            target="< 1 (low, high: difference of ln PPL, 95 % over chunks)",
            ok=best.score.perplexity < peer.score.perplexity,
        )
    ]


def _speed(row: PruneRow, whole: PruneRow) -> Verdict:
    gains = [pair.pruned_tps / pair.whole_tps - 1 for pair in row.speed]
    share = 1 - row.n_weights / whole.n_weights
    gain = median(gains)
    return Verdict(
        model=row.model,
        what="speed",
        percent=row.percent or 0.0,
        variant=row.variant,
        peer="the whole model",
        ours=gain,
        theirs=share,
        ratio=gain / share,
        low=min(gains) / share,
        high=max(gains) / share,
        target=f">= {MIN_GAIN} (low, high: lowest and highest pair)",
        ok=gain / share >= MIN_GAIN,
    )


def common_sets(rows: Sequence[PruneRow]) -> set[str]:
    """The sets of questions that every row with answers has: means over others do not compare."""
    asked = [{answers.questions for answers in row.accuracy} for row in rows if row.accuracy]
    return set.intersection(*asked) if asked else set()


def line(row: PruneRow, sets: Collection[str] | None = None, whole: PruneRow | None = None) -> str:
    """sets: of questions that the mean of answers is taken over; all of the row if not said. whole: whose answers to
    the same questions are subtracted."""
    score = row.score
    low, high = mean_interval(score.kld_chunks) or (score.kld, score.kld)
    speed = ""
    if row.speed:
        gain = median(pair.pruned_tps / pair.whole_tps for pair in row.speed)
        speed = f"{median(p.pruned_tps for p in row.speed):7.1f} t/s x{gain:.3f}"
    return (
        f"{row.model:20} {row.variant:32} {row.size_bytes / 2**20:8.1f} {row.n_linear_weights / 1e6:8.1f} "
        f"{score.perplexity:10.3f} {score.kld:8.4f} [{low:.4f}, {high:.4f}] {100 * score.same_top:6.2f} "
        f"{_answers(row, sets, whole):44} {speed}"
    )


def _answers(row: PruneRow, sets: Collection[str] | None, whole: PruneRow | None) -> str:
    """Mean acc_norm over the sets, its standard error; the same of the difference to the whole model's, question by
    question; and the peak of memory with them."""
    answers = [a for a in row.accuracy if sets is None or a.questions in sets]
    if not answers:
        return ""
    theirs = {a.same_set: a.correct_norm for a in whole.accuracy} if whole and whole is not row else {}
    lost = ""
    if all(a.same_set in theirs for a in answers):
        # Sets are asked from their beginning: one of the two may have been asked further.
        pairs = [zip(a.correct_norm, theirs[a.same_set], strict=False) for a in answers]
        mean, stderr = _mean_of_means([[x - y for x, y in pair] for pair in pairs])
        lost = f" ({100 * mean:+5.1f} ±{100 * stderr:4.1f})"
    mean, stderr = _mean_of_means([a.correct_norm for a in answers])
    peak = max(a.peak_rss_bytes for a in answers) / 2**20
    return f"{100 * mean:5.1f} ±{100 * stderr:4.1f}{lost} % {peak:7.0f} MiB"


def _mean_of_means(sets: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of independent samples, each set weighing the same: the mean, and its standard error, nan of a single sample."""
    variances = [variance(values) / len(values) if len(values) > 1 else math.nan for values in sets]
    stderr = math.sqrt(sum(variances)) / len(sets)
    return fmean(map(fmean, sets)), stderr


def table(rows: Sequence[PruneRow]) -> list[str]:
    """One line a file, by model and by what is left, best first; answers to the questions that all of a model's rows
    with answers were asked."""
    head = (
        f"{'model':20} {'variant':32} {'MiB':>8} {'M linear':>8} {'perplexity':>10} {'KLD [95 % over chunks]':>25} "
        f"{'top-1 %':>7} {'acc_norm (less the whole model), peak RSS':44} decode"
    )
    found = [head]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        sets = common_sets(mine)
        whole = next((row for row in mine if row.percent is None and row.accuracy), None)
        ordered = sorted(mine, key=lambda row: (row.percent or 0.0, row.score.perplexity))
        found += [line(row, sets, whole) for row in ordered]
        if sets:
            found.append(f"{model}: acc_norm is the mean over {', '.join(sorted(sets))}")
    return found


def verdict_line(v: Verdict) -> str:
    interval = "" if v.low is None or v.high is None else f" [{v.low:.3f}, {v.high:.3f}]"
    return (
        f"{v.model} {v.percent:g} % {v.what}: {v.variant} {v.ours:.3f} against {v.theirs:.3f} ({v.peer}), "
        f"{v.ratio:.3f}{interval}, target {v.target}: {'ok' if v.ok else 'MISSED'}"
    )
