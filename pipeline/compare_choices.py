"""Multiple choice in the comparison: accuracy on each set of questions, and what it differs by from the reference's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from device.results import Measurement, Report
from device.schema import Choices
from pipeline.paired import Difference, accuracy_difference


@dataclass(frozen=True)
class ChoiceScores:
    """One artifact on one set. acc, acc_norm: 0 or 1 a question (device/choices.py). The losses are differences to the
    reference over the same questions; None without one, and of the reference itself."""

    acc: Measurement
    acc_norm: Measurement
    loss: Difference | None
    loss_norm: Difference | None


def choice_scores(report: Report, reference: Report | None) -> dict[str, ChoiceScores]:
    """By name of the set; sets that only one of the two has are there, too, without a loss."""
    base = {} if reference is None or reference is report else _of_sets(reference)
    scores = {}
    for name, found in _of_sets(report).items():
        losses = {
            metric: accuracy_difference(found[metric].samples, base[name][metric].samples) if name in base else None
            for metric in ("acc", "acc_norm")
        }
        scores[name] = ChoiceScores(found["acc"], found["acc_norm"], losses["acc"], losses["acc_norm"])
    return scores


def _of_sets(report: Report) -> dict[str, dict[str, Measurement]]:
    return {
        result.task.dataset.name: {m.metric: m for m in result.measurements}
        for result in report.results
        if isinstance(result.task, Choices) and result.status == "ok"
    }


def describe_choices(scores: ChoiceScores | None) -> str:
    """Two lines: acc and acc_norm in percent with their standard error, then the paired difference in points."""
    if scores is None:
        return "-"
    acc = _describe("acc", scores.acc, scores.loss)
    return f"{acc}\n{_describe('norm', scores.acc_norm, scores.loss_norm)} (n={scores.acc.n})"


def _describe(name: str, accuracy: Measurement, loss: Difference | None) -> str:
    shown = f"{name} {100 * accuracy.mean:.1f}% ±{100 * accuracy.stderr:.1f}"
    return shown if loss is None else f"{shown}, {describe_points(loss)}"


def describe_points(loss: Difference) -> str:
    """A paired difference of accuracies: points, interval, and how many questions went either way."""
    span = f"[{loss.low:+.1f}, {loss.high:+.1f}]" if math.isfinite(loss.low) else "[unknown]"
    verdict = "" if loss.significant else " no difference"
    return f"{loss.mean:+.1f} {span}, {loss.flips_worse} worse {loss.flips_better} better{verdict}"
