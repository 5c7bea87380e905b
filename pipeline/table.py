"""The comparison on the screen: one table, its conditions above it, warnings and the answer below."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from device.schema import Report
from pipeline.compare import (
    Row,
    answer,
    describe_latency,
    describe_loss,
    describe_memory,
    describe_parity,
    describe_quality,
    describe_speed,
    pareto,
)

PLAIN_WIDTH = 210
PROVENANCE = {
    "measured": "measured on the board",
    "emulated": "EMULATED: proves function and ISA safety, says nothing of speed",
    "predicted": "PREDICTED: a model's figures, not a measurement",
    "host": "HOST figures: quality carries over, speed and memory say nothing of the Pi's",
}


def show(rows: Sequence[Row]) -> None:
    """Print the comparison to stdout: wrapped to the terminal, or wide where there is none."""
    columns = os.environ.get("COLUMNS", "")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=int(columns) if columns.isdigit() else PLAIN_WIDTH)
    console.print(_table(rows))
    for line in _remarks(rows):
        console.print(line, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title=_conditions(rows), title_justify="left", title_style="")
    for name, justify in (
        ("variant", "left"),
        ("MiB", "right"),
        ("bits/w all", "right"),
        ("linear", "right"),
        ("quality", "left"),
        ("loss against the reference [95%]", "left"),
        ("speed", "left"),
        ("latency", "left"),
        ("load ms", "right"),
        ("peak MiB (anon+file)", "right"),
        ("parity", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for model in dict.fromkeys(r.artifact.model for r in rows):
        group = [r for r in rows if r.artifact.model == model]
        front = pareto([r for r in group if r.quality_known])
        table.add_section()
        table.add_row(f"[bold]{model}[/bold]")
        for row in group:
            table.add_row(*_cells(row, row.artifact.id in front))
    return table


def _cells(row: Row, on_front: bool) -> list[str]:
    artifact = row.artifact
    marks = (
        ("*" if on_front else "")
        + (" !" if row.failures or row.warnings else "")
        + (" ~" if artifact.fallbacks else "")
    )
    return [
        artifact.variant + marks,
        f"{artifact.size_bytes / 2**20:.1f}",
        f"{artifact.bits_per_weight:.2f}",
        f"{artifact.bits_per_linear_weight:.2f}",
        describe_quality(row),
        describe_loss(row),
        describe_speed(row),
        describe_latency(row),
        f"{row.load_ms:.0f}" if row.load_ms is not None else "-",
        describe_memory(row),
        describe_parity(row),
    ]


def _conditions(rows: Sequence[Row]) -> str:
    lines: list[str] = []
    lines += dict.fromkeys(_machine_line(r.report) for r in rows)
    for model in dict.fromkeys(r.artifact.model for r in rows):
        first = next(r for r in rows if r.artifact.model == model)
        conditions = first.quality.conditions if first.quality else {}
        shown = ", ".join(f"{k} {v}" for k, v in conditions.items() if not k.endswith("sha256"))
        lines.append(f"{model}: {shown}" if shown else model)
    return "\n".join(lines)


def _machine_line(report: Report) -> str:
    """One line for the machine; the minute of measurement is left to the report files."""
    facts = report.results[0].facts_before
    day = time.strftime("%Y-%m-%d", time.gmtime(facts.time_unix_s))
    threads = f"{report.threads} thread" + ("s" if report.threads > 1 else "")
    return f"{PROVENANCE[report.provenance]}. {facts.board}, {facts.cpu}, {facts.machine}, {threads}, {day}"


def _remarks(rows: Sequence[Row]) -> list[str]:
    lines = [
        "* no other variant is both smaller and better    "
        "~ some tensors fell back to another type    ! a run with a warning or a failure"
    ]
    for row in rows:
        lines += [f"! {row.artifact.name} {task} FAILED: {error}" for task, error in row.failures.items()]
        lines += [f"! {row.artifact.name} {task}: {'; '.join(texts)}" for task, texts in row.warnings.items()]
    lines += dict.fromkeys(f"{r.artifact.model}: {note}" for r in rows for note in r.artifact.notes)
    return [*lines, "", *answer(rows)]
