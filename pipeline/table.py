"""The comparison on the screen: one table, its conditions above it, warnings and the answer below."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from device.results import Report
from device.schema import Artifact
from pipeline.answer import answer
from pipeline.compare import (
    Row,
    describe_divergence,
    describe_energy,
    describe_latency,
    describe_loss,
    describe_memory,
    describe_parity,
    describe_quality,
    describe_speed,
    groups,
    pareto,
)
from pipeline.compare_choices import describe_choices

PLAIN_WIDTH = 210
_OF_A_BLOCK = "blk."
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
    for provenance in dict.fromkeys(r.report.provenance for r in rows):  # they never share a column
        console.print(_table([r for r in rows if r.report.provenance == provenance]))
    for line in _remarks(rows):
        console.print(line, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title=Text(_conditions(rows)), title_justify="left", title_style="")
    diverging = any(r.kld for r in rows)
    sets = list(dict.fromkeys(name for row in rows for name in row.choices))
    for name, justify in (
        ("variant", "left"),
        ("MiB", "right"),
        ("bits/w all", "right"),
        ("linear", "right"),
        ("quality", "left"),
        ("loss against the reference [95%]", "left"),
        *([("KL divergence [95%]", "left")] if diverging else []),
        *((f"{name}, zero-shot [95%]", "left") for name in sets),
        ("speed", "left"),
        ("latency", "left"),
        ("load ms", "right"),
        ("peak MiB (anon+file)", "right"),
        ("parity", "left"),
    ):
        table.add_column(Text(name), justify=justify)  # type: ignore[arg-type]
    has_energy = any(row.energy for row in rows)
    if has_energy:
        table.add_column("energy of the timed task")
    several = len({r.host for r in rows}) > 1
    for host, model, group in groups(rows):
        front = pareto([r for r in group if r.quality_known])
        table.add_section()
        table.add_row(Text(f"{host}: {model}" if several else model, style="bold"))
        for row in group:
            cells = _cells(row, row.artifact.id in front, diverging, sets)
            table.add_row(*map(Text, cells + ([describe_energy(row)] if has_energy else [])))
    return table


def _cells(row: Row, on_front: bool, diverging: bool, sets: Sequence[str]) -> list[str]:
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
        *([describe_divergence(row)] if diverging else []),
        *(describe_choices(row.choices.get(name)) for name in sets),
        describe_speed(row),
        describe_latency(row),
        f"{row.load_ms:.0f}" if row.load_ms is not None else "-",
        describe_memory(row),
        describe_parity(row),
    ]


def _conditions(rows: Sequence[Row]) -> str:
    lines = dict.fromkeys(_machine_line(r.host, r.report) for r in rows)
    several = len({r.host for r in rows}) > 1
    for host, model, group in groups(rows):
        conditions = group[0].quality.conditions if group[0].quality else {}
        shown = ", ".join(f"{k} {v}" for k, v in conditions.items() if not k.endswith("sha256"))
        who = f"{host}, {model}" if several else model
        lines[f"{who}: {shown}" if shown else who] = None
    return "\n".join(lines)


def _machine_line(host: str, report: Report) -> str:
    """One line for the machine; the minute of measurement is left to the report files."""
    facts = report.results[0].facts_before
    day = time.strftime("%Y-%m-%d", time.gmtime(facts.time_unix_s))
    threads = f"{report.threads} thread" + ("s" if report.threads > 1 else "")
    who = f"{host}: " if host else ""
    return f"{who}{PROVENANCE[report.provenance]}. {facts.board}, {facts.cpu}, {facts.machine}, {threads}, {day}"


def _remarks(rows: Sequence[Row]) -> list[str]:
    lines = [
        "* no other variant is both smaller and better    "
        "~ some tensors fell back to another type    ! a run with a warning or a failure"
    ]
    for row in rows:
        who = f"{row.host} {row.artifact.name}".strip()
        lines += [f"! {who} {task} FAILED: {error}" for task, error in row.failures.items()]
        lines += [f"! {who} {task}: {'; '.join(texts)}" for task, texts in row.warnings.items()]
    return [*lines, *dict.fromkeys(line for row in rows for line in _notes(row.artifact)), "", *answer(rows)]


def _notes(artifact: Artifact) -> list[str]:
    """Of those about single blocks the first: there may be one for each."""
    blocks = [note for note in artifact.notes if note.startswith(_OF_A_BLOCK)]
    lines = [f"{artifact.model}: {note}" for note in artifact.notes if note not in blocks]
    if blocks:
        more = f" (and {len(blocks) - 1} more such notes, in its manifest.json)" if blocks[1:] else ""
        lines.append(f"{artifact.name}: {blocks[0]}{more}")
    return lines
