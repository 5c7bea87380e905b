"""An Exploration as one self-contained HTML page: plotly.js is in it, nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.tweets.explore import N_TOP, Bias, Exploration, Feature, repeated

COLOURS = {"no disaster": "#1f77b4", "disaster": "#d62728", "unlabelled": "#7f7f7f"}
_BIAS_NOTE = "Share of disasters with its 95% interval (Wilson); the dotted line is the whole table's share."
_STYLE = """
body { font-family: sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left; }
td.number, th.number { text-align: right; } p { max-width: 45em; }
"""


def page(found: Exploration) -> str:
    """Every text of the table is escaped: it may hold markup."""
    sections = [("Rows", "", _balance(found))]
    for field, biases in found.bias.items():
        if biases:
            title = f"{field.capitalize()}: the {len(biases)} commonest of {found.n_values[field]:,}"
            sections.append((title, _BIAS_NOTE if biases[0].n_disasters is not None else "", _biases(found, biases)))
    note = "Computed on the text as it came; the last bar holds what is beyond the 99th percentile."
    if len(found.n_by_class) == 2:
        note += " AUC: how often a disaster has the larger value."
    sections.append(("Numeric features", note, _features(found.features)))
    body = []
    for number, (title, note, figure) in enumerate(sections):
        body += [f"<h2>{escape(title)}</h2>", f"<p>{escape(note)}</p>" if note else ""]
        body.append(figure.to_html(full_html=False, include_plotlyjs=number == 0))
    body += ["<h2>Near-duplicates</h2>", f"<p>{escape(repeated(found))}.</p>", _examples(found)]
    title = escape(f"{found.name}: {found.n:,} tweets")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><h1>{title}</h1>\n{"".join(body)}\n</body></html>\n'
    )


def _balance(found: Exploration) -> Any:
    figure = make_subplots(rows=1, cols=2, subplot_titles=["rows of each class", "rows without a value"])
    for place, counts in enumerate((found.n_by_class, found.n_missing), start=1):
        colours = [COLOURS.get(label, "#7f7f7f") for label in counts]
        shares = [f"{n:,} ({n / found.n:.1%})" for n in counts.values()]
        bar = go.Bar(x=list(counts), y=list(counts.values()), text=shares, marker_color=colours, showlegend=False)
        figure.add_trace(bar, row=1, col=place)
    return figure.update_layout(template="plotly_white", height=320, margin_t=50)


def _biases(found: Exploration, biases: Sequence[Bias]) -> Any:
    """Shares with their intervals, or plain counts where there are no labels; the commonest on top."""
    names = [_label(bias, rank) for rank, bias in enumerate(biases)]
    shares = [bias.share for bias in biases]
    if None in shares:
        figure = go.Figure(go.Bar(x=[b.n for b in biases], y=names, orientation="h", marker_color="#7f7f7f"))
        figure.update_xaxes(title_text="rows")
    else:
        known = [share or 0.0 for share in shares]
        error = {
            "type": "data", "symmetric": False,
            "array": [b.high - s for b, s in zip(biases, known, strict=True)],
            "arrayminus": [s - b.low for b, s in zip(biases, known, strict=True)],
        }  # fmt: skip
        figure = go.Figure(
            go.Scatter(x=known, y=names, error_x=error, mode="markers", marker_color=COLOURS["disaster"])
        )
        figure.add_vline(x=found.n_by_class["disaster"] / found.n, line_dash="dot")
        figure.update_xaxes(title_text="share of disasters", range=[-0.02, 1.02])
    figure.update_yaxes(autorange="reversed", type="category")
    return figure.update_layout(
        template="plotly_white", height=90 + 24 * min(len(biases), N_TOP), margin_l=220, margin_t=20
    )


def _label(bias: Bias, rank: int) -> str:
    """plotly reads markup in labels. The rank keeps two values apart that are cut to the same."""
    short = bias.value if len(bias.value) <= 30 else bias.value[:29] + "…"
    return f"{rank + 1}. {escape(short)} ({bias.n})"


def _features(features: Sequence[Feature]) -> Any:
    titles = [f.name + (f" (AUC {f.auc:.3f})" if f.auc is not None else "") for f in features]
    figure = make_subplots(rows=len(features), cols=1, subplot_titles=titles, vertical_spacing=0.3 / len(features))
    for row, feature in enumerate(features, start=1):
        edges = _edges(feature)
        for label, values in feature.values.items():
            counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
            shares = counts / max(1, len(values))
            bar = go.Bar(
                x=edges[:-1].tolist(), y=shares.tolist(), width=np.diff(edges).tolist(), offset=0, name=label,
                legendgroup=label, showlegend=row == 1, marker_color=COLOURS[label], opacity=0.55,
            )  # fmt: skip
            figure.add_trace(bar, row=row, col=1)
        figure.update_yaxes(title_text="share of class", row=row, col=1)
    return figure.update_layout(template="plotly_white", barmode="overlay", height=240 * len(features), margin_t=50)


def _edges(feature: Feature) -> Any:
    """At most 40 bins up to the 99th percentile; what is beyond is counted in the last."""
    values = np.concatenate(list(feature.values.values()))
    top = max(1.0, float(np.ceil(np.quantile(values, 0.99))))
    whole = bool((values == np.round(values)).all())
    step = max(1.0, np.ceil((top + 1) / 40)) if whole else top / 40
    return np.arange(0.0, top + 1 + step if whole else top + step, step)


def _examples(found: Exploration) -> str:
    if not found.examples:
        return ""
    labelled = found.examples[0].n_disasters is not None
    rows = [
        f'<tr><td>{escape(e.text[:200])}</td><td class="number">{e.n}</td>'
        + (f'<td class="number">{e.n_disasters}</td>' if labelled else "")
        + "</tr>"
        for e in found.examples
    ]
    what = "The largest groups with both labels, by their first text:" if labelled else "The largest groups:"
    head = '<th>text</th><th class="number">rows</th>' + ('<th class="number">disasters</th>' if labelled else "")
    return f"<p>{what}</p><table><tr>{head}</tr>{''.join(rows)}</table>"
