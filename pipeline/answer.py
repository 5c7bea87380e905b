"""Rows of a comparison -> the answer in plain sentences: which variant to run, and what it loses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.compare import Row, badness, describe_loss, describe_speed, groups
from pipeline.paired import Difference

# "No difference" recommends a variant only if the interval also rules out a loss as large as this.
TOLERANCE = {"% ppl": 3.0, "points": 2.0}
ACCEPTED = {"% ppl": (1.0, 2.0, 5.0, 10.0, 20.0), "points": (0.5, 1.0, 2.0, 5.0)}
"""Losses that one may be ready to accept, each told what it buys."""
_UNITS = {"% ppl": "% of perplexity", "points": "points of accuracy"}


def answer(candidates: Sequence[Row]) -> list[str]:
    """Per device and model: the smallest variant without a measurable loss, what accepted losses buy, the fastest."""
    lines = []
    several = len({r.host for r in candidates}) > 1
    for host, model, group in groups(candidates):
        who = f"{host}, {model}" if several else model
        known = [r for r in group if r.quality_known]
        timed = [r for r in group if r.speed_valid and not math.isnan(r.speed)]
        emulated = group[0].report.provenance == "emulated"
        alike = [r for r in known if r.loss is None or not (r.loss.significant and badness(r.loss) > 0)]
        lossless = [r for r in alike if r.loss is None or _worst(r.loss) <= TOLERANCE[r.loss.unit]]
        if lossless:
            lines.append(f"{who}: {_recommend('smallest without a measurable loss', min(lossless, key=_size))}.")
            lines += [f"{who}: {line}" for line in _bought(lossless, known, [] if emulated else timed)]
            unsettled = [r.artifact.variant for r in alike if r not in lossless]
            if unsettled:
                lines.append(f"{who}: too few samples to judge {', '.join(unsettled)}: measure more chunks or rows.")
        else:
            lines.append(f"{who}: no loss was measured against the reference, so nothing can be recommended.")
        if emulated:
            lines.append(f"{who}: which is fastest an emulated machine cannot tell.")
        elif timed:
            lines.append(f"{who}: {_recommend('fastest', max(timed, key=_speed))}.")
        else:
            lines.append(f"{who}: no valid speed, so which is fastest is not said.")
    return lines


def _bought(lossless: Sequence[Row], known: Sequence[Row], timed: Sequence[Row]) -> list[str]:
    """For each loss in ACCEPTED that buys something: the smallest and the fastest variant whose interval is within."""
    lines, free = [], {r.artifact.id for r in lossless}
    smallest, fastest = min(lossless, key=_size), _fastest(lossless, timed)
    unit = next((r.loss.unit for r in known if r.loss), "% ppl")
    for accepted in ACCEPTED[unit]:
        within = [r for r in known if r.artifact.id in free or (r.loss and _loses_at_most(r.loss, accepted, unit))]
        found = min(within, key=_size), _fastest(within, timed)
        bought = [
            _recommend(why, row)
            for why, row, before in zip(("smallest", "fastest"), found, (smallest, fastest), strict=True)
            if row and row is not before
        ]
        if bought:
            lines.append(f"at most {accepted:g} {_UNITS[unit]} lost: {'; '.join(bought)}.")
        smallest, fastest = found
    return lines


def _fastest(within: Sequence[Row], timed: Sequence[Row]) -> Row | None:
    ids = {r.artifact.id for r in within}
    return max((r for r in timed if r.artifact.id in ids), key=_speed, default=None)


def _loses_at_most(loss: Difference, accepted: float, unit: str) -> bool:
    """A row whose perplexity failed counts in points of zero-shot accuracy: those are no percent."""
    return loss.unit == unit and _worst(loss) <= accepted


def _worst(loss: Difference) -> float:
    """The bad end of the interval, in the direction of `badness`."""
    return -loss.low if loss.unit == "points" else loss.high


def _size(row: Row) -> int:
    return row.artifact.size_bytes


def _speed(row: Row) -> float:
    return row.speed


def _recommend(why: str, row: Row) -> str:
    loss = "the reference itself" if row.loss is None else f"loss {describe_loss(row)}"
    return f"{why} is {row.artifact.variant} ({row.artifact.size_bytes / 2**20:.1f} MiB, {describe_speed(row)}; {loss})"
