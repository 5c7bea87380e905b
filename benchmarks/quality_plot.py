"""KL divergence against MiB as a self-contained HTML page: one panel a model and text, llama-quantize's hull drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from quality_rows import Quality, QualityRow, Score, log_kld, lower_hull, mean_interval

from device.records import SlimpiError

PEER = "llama-quantize"
HULL = f"hull of {PEER}"
FREE = "in types that hold the source's"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


@dataclass(frozen=True)
class Trace:
    """Points of one name in a panel: MiB, mean KLD, half-widths of its 95% interval down and up, and hover texts."""

    name: str
    mib: list[float] = field(default_factory=list)
    kld: list[float] = field(default_factory=list)
    down: list[float] = field(default_factory=list)
    up: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One model on one text; `hull` is llama-quantize's lower hull, (MiB, KLD)."""

    title: str
    traces: list[Trace]
    hull: list[tuple[float, float]]


def panels(rows: Sequence[QualityRow]) -> list[Panel]:
    found = []
    for model in dict.fromkeys(r.model for r in rows):
        mine = sorted((r for r in rows if r.model == model), key=lambda r: r.size_bytes)
        for corpus in dict.fromkeys(s.corpus for r in mine for s in r.scores):
            scored = [(r, s) for r in mine if (s := r.score(corpus))]
            found.append(Panel(f"{model}, {corpus}", _traces(scored), _hull(scored)))
    return found


def _traces(scored: Sequence[tuple[QualityRow, Score]]) -> list[Trace]:
    traces: dict[str, Trace] = {}
    for row, score in scored:
        name = FREE if row.free else PEER if row.maker == "llama-quantize" else row.variant.partition("-")[0]
        trace = traces.setdefault(name, Trace(name))
        low, high = mean_interval(score.kld_chunks) or (score.kld, score.kld)
        trace.mib.append(row.size_bytes / 2**20)
        trace.kld.append(score.kld)
        trace.down.append(min(score.kld - low, 0.999 * score.kld))  # the axis is logarithmic
        trace.up.append(high - score.kld)
        trace.text.append(
            f"{row.variant}<br>{row.bits_per_linear_weight:.3f} bits per linear weight<br>KLD {score.kld:.5f} "
            f"[{low:.5f}, {high:.5f}], n = {score.n_chunks} chunks<br>median {score.kld_median:.5f}, 99% "
            f"{score.kld_p99:.4f}<br>top-1 {100 * score.same_top:.2f}%<br>perplexity {score.perplexity:.3f}"
        )
    return list(traces.values())


def _hull(scored: Sequence[tuple[QualityRow, Score]]) -> list[tuple[float, float]]:
    points = {
        (r.size_bytes / 2**20, log_kld(s.kld)): s.kld for r, s in scored if r.maker == "llama-quantize" and not r.free
    }
    return [(point[0], points[point]) for point in lower_hull(list(points))]


def page(quality: Quality) -> str:
    """The whole page with plotly.js in it. SlimpiError if plotly is not installed."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise SlimpiError("plots need plotly: pip install plotly (or slimpi[dev]). The figures are written.") from error
    shown = panels(quality.rows)
    if not shown:
        raise SlimpiError("there is nothing to plot. Measure something first.")
    titles = [panel.title for panel in shown]
    figure = make_subplots(rows=len(shown), cols=1, subplot_titles=titles, vertical_spacing=0.3 / len(shown))
    colours = dict(zip(dict.fromkeys([PEER, *(t.name for p in shown for t in p.traces)]), cycle(COLOURS), strict=False))
    in_legend: set[str] = set()
    for place, panel in enumerate(shown, start=1):
        for trace in panel.traces:
            figure.add_trace(_scatter(go, trace, colours[trace.name], trace.name not in in_legend), row=place, col=1)
            in_legend.add(trace.name)
        if panel.hull:
            figure.add_trace(_line(go, panel.hull, colours[PEER], HULL not in in_legend), row=place, col=1)
            in_legend.add(HULL)
    figure.update_xaxes(title_text="whole file, MiB")
    figure.update_yaxes(title_text="mean KL divergence, nats/token", type="log")
    c = quality.conditions
    made = f"{c.cpu}, llama-cpp-python {c.llama_cpp_python} ({c.wheel_commit}), {c.start_time}"
    figure.update_layout(
        title=f"KL divergence at equal bytes; {made}", height=520 * len(shown), template="plotly_white"
    )
    return str(figure.to_html(full_html=True, include_plotlyjs=True))


def _scatter(go: Any, trace: Trace, colour: str, in_legend: bool) -> Any:
    return go.Scatter(
        x=trace.mib,
        y=trace.kld,
        error_y={"type": "data", "symmetric": False, "array": trace.up, "arrayminus": trace.down},
        mode="markers",
        marker={"size": 8, "color": colour, "symbol": "circle-open" if trace.name == FREE else "circle"},
        name=trace.name,
        legendgroup=trace.name,
        showlegend=in_legend,
        text=trace.text,
        hoverinfo="text",
    )


def _line(go: Any, hull: Sequence[tuple[float, float]], colour: str, in_legend: bool) -> Any:
    x, y = zip(*hull, strict=True)
    line = {"color": colour, "width": 1}
    return go.Scatter(
        x=x, y=y, mode="lines", line=line, name=HULL, legendgroup=HULL, showlegend=in_legend, hoverinfo="skip"
    )
