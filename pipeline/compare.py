"""Reports -> the rows of one table, with what each variant loses; what follows from them is pipeline/answer.py.

Only like is compared with like; differences are paired and carry 95% intervals; an interval that holds zero prints
"no difference"; a speed whose run was not valid is shown, marked, and left out of the answer. Quality does not depend
on the clock: a busy or throttled machine spoils speed only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from device.records import SlimpiError
from device.results import Measurement, Memory, Report, TaskResult
from device.schema import Artifact, Choices
from pipeline.compare_choices import ChoiceScores, choice_scores
from pipeline.energy import Energy, Reading, of_task
from pipeline.paired import Difference, accuracy_difference, paired_difference

MAX_NATS = 700.0  # exp of more is no float; nothing but a broken model comes near
_MUST_EQUAL = (
    *("n_ctx", "n_chunks", "corpus_sha256", "reference_sha256"),
    *("n_prompt", "n_gen", "batch_size", "n_rows", "n_questions"),
)
TIMED_TASKS = ("throughput", "tweets")
_LOADING = "load_ms "  # how a warning about it begins


@dataclass(frozen=True)
class Row:
    """One artifact's figures on one machine. None = not measured; never guessed."""

    host: str
    artifact: Artifact
    report: Report
    quality: Measurement | None
    loss: Difference | None
    loss_note: str
    prefill: Measurement | None
    decode: Measurement | None
    ttft_ms: Measurement | None
    latency_ms: Measurement | None
    tweets_per_s: Measurement | None
    load_ms: float | None
    memory: Memory | None
    parity_kl: Measurement | None
    parity_top1: Measurement | None
    energy: Energy | None
    kld: Difference | None
    same_top: Measurement | None
    choices: Mapping[str, ChoiceScores]
    warnings: dict[str, list[str]]
    failures: dict[str, str]

    @property
    def speed_valid(self) -> bool:
        """The timed task ended well and nothing spoke against its run (device/checks.py) but how long it took to load:
        that hangs on what the page cache holds, and the speed afterwards does not."""
        against = [
            text for task in TIMED_TASKS for text in self.warnings.get(task, ()) if not text.startswith(_LOADING)
        ]
        return not against and not any(task in self.failures for task in TIMED_TASKS)

    @property
    def quality_known(self) -> bool:
        return self.quality is not None and (self.loss is not None or self.artifact.reference)

    @property
    def speed(self) -> float:
        """What more of is better: decoded tokens/s for an LM, tweets/s for a classifier; NaN if not measured."""
        measurement = self.decode or self.tweets_per_s
        return median(measurement.samples) if measurement else math.nan


def perplexity(nll: Measurement) -> tuple[float, float]:
    """exp(mean NLL) and its standard error by the delta method."""
    value = math.exp(min(nll.mean, MAX_NATS))
    return value, value * nll.stderr


def divergence(kld: Measurement) -> Difference:
    """Mean KL divergence to the reference with its interval over chunks: tokens of one are not independent.

    The reference's own is zero, so each chunk is paired already.
    """
    chunks = np.reshape(kld.samples, (-1, kld.conditions["n_scored_tokens_per_chunk"])).mean(axis=1).tolist()
    return paired_difference(chunks, [0.0] * len(chunks), "nats/token")


def loss_percent(difference: Difference) -> Difference:
    """A difference in mean NLL (nats/token) as a change of perplexity in percent: 100 (exp(d) - 1)."""
    low, mean, high = (100.0 * math.expm1(min(x, MAX_NATS)) for x in (difference.low, difference.mean, difference.high))
    return Difference(mean, low, high, difference.n, "% ppl")


def conditions_key(report: Report) -> dict[str, Any]:
    """What must be equal for two reports to be compared: machine, threads, and each task's conditions."""
    facts = report.results[0].facts_before if report.results else None
    key: dict[str, Any] = {
        "provenance": report.provenance,
        "threads": report.threads,
        "tokenizer": report.artifact.tokenizer_sha256,
        "board": f"{facts.board} / {facts.cpu} / {facts.machine}" if facts else "",
    }
    for result in report.results:
        which = f"{result.task.dataset.name}." if isinstance(result.task, Choices) else ""  # several sets, one metric
        for measurement in result.measurements:
            for name in _MUST_EQUAL:
                if name in measurement.conditions:
                    key[f"{which}{measurement.metric}.{name}"] = measurement.conditions[name]
    return key


def check_alike(reports: Sequence[Report]) -> None:
    """Refuse reports of one model that were taken under different conditions, naming the first that differs."""
    for model in {r.artifact.model for r in reports}:
        same = [r for r in reports if r.artifact.model == model]
        first = conditions_key(same[0])
        for other in same[1:]:
            theirs = conditions_key(other)
            for name in first.keys() & theirs.keys():
                if first[name] != theirs[name]:
                    raise SlimpiError(
                        f"{same[0].artifact.name} and {other.artifact.name} are not comparable: {name} is "
                        f"{first[name]!r} and {theirs[name]!r}. Measure both under the same conditions."
                    )


def rows(reports: Sequence[Report], host: str = "", readings: Sequence[Reading] = ()) -> list[Row]:
    """One row a report of one host, losses against the same model's reference; raises if reports are not alike.

    readings: of a power meter at this host, in its clock.
    """
    if not reports:
        raise SlimpiError("there is nothing to compare. Run `slimpi bench ARTIFACT...` first.")
    check_alike(reports)
    references = {r.artifact.model: r for r in reports if r.artifact.reference}
    return [_row(host, r, references.get(r.artifact.model), readings) for r in reports]


def _row(host: str, report: Report, reference: Report | None, readings: Sequence[Reading]) -> Row:
    found = _measurements(report)
    choices = choice_scores(report, reference)
    loss, note = _loss(found, report, reference, choices)
    memories = [r.memory for r in report.results if r.memory]
    timed = [r for r in report.results if _task_name(r) in TIMED_TASKS and r.status == "ok"]
    return Row(
        host=host,
        artifact=report.artifact,
        report=report,
        quality=found.get("nll") or found.get("accuracy") or next((s.acc for s in choices.values()), None),
        loss=loss,
        loss_note=note,
        prefill=found.get("prefill_tokens_per_s"),
        decode=found.get("decode_tokens_per_s"),
        ttft_ms=found.get("ttft_ms"),
        latency_ms=found.get("latency_ms"),
        tweets_per_s=found.get("tweets_per_s"),
        load_ms=median(found["load_ms"].samples) if "load_ms" in found else None,
        memory=max(memories, key=lambda m: m.peak_rss_bytes, default=None),
        parity_kl=found.get("kl_divergence"),
        parity_top1=found.get("top1_agreement"),
        energy=of_task(timed[0], readings) if timed else None,
        kld=divergence(found["kld"]) if "kld" in found else None,
        same_top=found.get("same_top"),
        choices=choices,
        # A busy or hot machine changes no logits: what was said of tasks without a clock stays in the report.
        warnings={_task_name(r): r.warnings for r in report.results if r.warnings and _task_name(r) in TIMED_TASKS},
        failures={_task_name(r): r.error for r in report.results if r.status != "ok"},
    )


def _task_name(result: TaskResult) -> str:
    return str(result.task.__struct_config__.tag)


def _measurements(report: Report) -> dict[str, Measurement]:
    return {m.metric: m for r in report.results for m in r.measurements}


def _loss(
    found: dict[str, Measurement], report: Report, reference: Report | None, choices: Mapping[str, ChoiceScores]
) -> tuple[Difference | None, str]:
    """Of the quality that a row shows."""
    if report.artifact.reference:
        return None, "reference"
    if reference is None:
        return None, "no reference measured"
    base = _measurements(reference)
    if "nll" in found and "nll" in base:
        return loss_percent(paired_difference(found["nll"].samples, base["nll"].samples, "nats")), ""
    if "accuracy" in found and "accuracy" in base:
        return accuracy_difference(found["accuracy"].samples, base["accuracy"].samples), ""
    if found.keys() & {"nll", "accuracy"} or not choices:
        return None, "quality not measured"
    loss = next(iter(choices.values())).loss
    return loss, "" if loss else "not measured on the reference"


def pareto(candidates: Sequence[Row]) -> set[str]:
    """Ids of rows that no other row beats in size and mean loss at once (reference loss = 0)."""

    def cost(row: Row) -> tuple[float, float]:
        return row.artifact.size_bytes, 0.0 if row.loss is None else badness(row.loss)

    kept = set()
    for row in candidates:
        size, loss = cost(row)
        beaten = any(
            o is not row and cost(o)[0] <= size and cost(o)[1] <= loss and cost(o) != (size, loss) for o in candidates
        )
        if not beaten:
            kept.add(row.artifact.id)
    return kept


def badness(loss: Difference) -> float:
    """Points of accuracy lost or percent of perplexity gained: more is worse for both."""
    return -loss.mean if loss.unit == "points" else loss.mean


def groups(candidates: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """(host, model, rows) in the order they came: what may be compared with each other."""
    keys = dict.fromkeys((r.host, r.artifact.model) for r in candidates)
    return [(h, m, [r for r in candidates if (r.host, r.artifact.model) == (h, m)]) for h, m in keys]


def describe_loss(row: Row) -> str:
    if row.loss is None:
        return row.loss_note
    loss = row.loss
    span = f"[{loss.low:+.1f}, {loss.high:+.1f}]" if math.isfinite(loss.low) else "[unknown]"
    flips = f", {loss.flips_worse} worse {loss.flips_better} better" if loss.unit == "points" else ""
    verdict = "" if loss.significant else " no difference"
    return f"{loss.mean:+.1f} {loss.unit} {span}{flips}{verdict}"


def describe_speed(row: Row) -> str:
    mark = "" if row.speed_valid else " (not valid)"
    if row.decode and row.prefill:
        return f"{median(row.prefill.samples):.0f} prefill, {median(row.decode.samples):.1f} decode token/s{mark}"
    if row.tweets_per_s:
        return f"{median(row.tweets_per_s.samples):.0f} tweets/s{mark}"
    return "speed not measured"


def describe_latency(row: Row) -> str:
    if row.ttft_ms and row.decode:
        per_token = 1000.0 / median(row.decode.samples)
        return f"TTFT {median(row.ttft_ms.samples):.0f} ms, {per_token:.1f} ms/token"
    if row.latency_ms:
        p50, p90, p99 = np.percentile(row.latency_ms.samples, [50, 90, 99])
        return f"p50 {p50:.2f} p90 {p90:.2f} p99 {p99:.2f} ms/tweet"
    return "-"


def describe_quality(row: Row) -> str:
    if row.quality is None:
        return "-"
    if row.quality.metric == "nll":
        value, error = perplexity(row.quality)
        return f"ppl {value:.3f} ±{error:.2f} (n={row.quality.n} chunks)"
    accuracy = fmean(row.quality.samples)
    f1 = _measurements(row.report).get("f1")
    shown = f", F1 {f1.samples[0]:.3f}" if f1 else ""
    return f"acc {100 * accuracy:.1f}% ±{100 * row.quality.stderr:.1f}{shown} (n={row.quality.n})"


def describe_parity(row: Row) -> str:
    if row.parity_kl is None or row.parity_top1 is None:
        return "-"
    return f"KL {row.parity_kl.mean:.1e}, top-1 {100 * row.parity_top1.mean:.0f}%"


def describe_energy(row: Row) -> str:
    """Of the whole timed task: loading, warm-ups and all repetitions."""
    if row.energy is None:
        return "-"
    return f"{row.energy.joules:.1f} J, mean {row.energy.mean_w:.2f} W ({row.energy.source})"


def describe_divergence(row: Row) -> str:
    if row.kld is None or row.same_top is None:
        return "-"
    span = f"[{row.kld.low:.5f}, {row.kld.high:.5f}]" if math.isfinite(row.kld.low) else "[unknown]"
    return f"{row.kld.mean:.5f} {span}, top-1 {100 * row.same_top.mean:.1f}%"


def describe_memory(row: Row) -> str:
    if row.memory is None:
        return "-"
    m = row.memory
    return f"{m.peak_rss_bytes / 2**20:.0f} ({m.rss_anon_bytes / 2**20:.0f}+{m.rss_file_bytes / 2**20:.0f})"
