"""Present results: a table of scores and baselines, and a self-contained HTML page with samples and media."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anytoken.evaluation.suite.samples import Outcome
from anytoken.inference.outputs import segment_html
from anytoken.segments import Segment, Text
from anytoken.utils.atomic import write_file

SHOWN = 24  # samples of a task, whose media are inside the page
STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;
background:light-dark(#fff,#161618);color:light-dark(#222,#ddd)}
section{border-top:1px solid light-dark(#ddd,#333);padding:.5rem 0 1rem}h1,h2{margin:.4rem 0}h2{font-size:1.1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.25rem 1rem .25rem 0;text-align:left;vertical-align:top}.note{color:light-dark(#666,#999)}
img{min-width:64px;max-width:12rem;border-radius:6px}audio{width:14rem}code{overflow-wrap:anywhere}p{margin:.1rem 0}
"""


def write_page(
    folder: Path, model: str, reports: Mapping[str, Any], outcomes: Mapping[str, Sequence[Outcome]]
) -> Path:
    """Write FOLDER/index.html for the tasks of a run."""
    sections = [f"<section><h2>Figures</h2>{table(rows_of(reports))}</section>"]
    sections += [_section(name, reports[name], outcomes[name]) for name in reports]
    title = html.escape(model)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        "<p class='note'>Intervals: 95 %, by bootstrap over samples. shuffled: each prompt with another one's answer. "
        f"↓: lower is better.</p>{''.join(sections)}</html>\n"
    )
    return write_file(folder / "index.html", text)


def rows_of(reports: Mapping[str, Any]) -> list[list[str]]:
    """Figures as rows of text, the first being the head."""
    table = [["task", "metric", "score", "95 %", "majority", "shuffled", "samples"]]
    for name, report in reports.items():
        for metric, one in report["metrics"].items():
            shown = one["percent"]
            own = one["model"]
            interval = f"{_number(own['low'], shown)}–{_number(own['high'], shown)}"
            others = [
                _number(one[who]["value"], shown) if who in one else "" for who in ("majority", "shuffled")
            ]
            arrow = " ↓" if one["lower_is_better"] else ""
            unit = " %" if shown else ""
            value = _number(own["value"], shown) + (unit if own["value"] is not None else "")
            table.append([name, metric + arrow, value, interval, *others, str(own["total"])])
    return table


def _number(value: float | None, percent: bool) -> str:
    return "" if value is None else f"{100 * value:.1f}" if percent else f"{value:.3f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an HTML table, the first being the head."""
    head, *body = rows
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _section(name: str, report: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    cells = ["<tr><th>prompt</th><th>answer</th><th>truth</th></tr>"]
    for one in outcomes[:SHOWN]:
        prompt = "".join(_shown(turn["content"]) for turn in one.sample.messages)
        truth = "".join(_shown(reference) for reference in one.sample.truth[:3])
        cells.append(f"<tr><td>{prompt}</td><td>{_answer(one)}</td><td>{truth}</td></tr>")
    more = (
        f"<p class='note'>The first {SHOWN} of {len(outcomes)} samples.</p>" if len(outcomes) > SHOWN else ""
    )
    about = f"<p>{html.escape(report['description'])}</p>" if report["description"] else ""
    return f"<section><h2>{html.escape(name)}</h2>{about}<table>{''.join(cells)}</table>{more}</section>"


def _shown(content: str | Sequence[Segment]) -> str:
    segments = [Text(content)] if isinstance(content, str) else content
    return "".join(segment_html(segment) for segment in segments)


def _answer(outcome: Outcome) -> str:
    if outcome.choice is not None:
        label = outcome.sample.labels[outcome.choice]
        shown = (
            html.escape(label)
            if isinstance(label, str)
            else _shown([label] if isinstance(label, Segment) else label)
        )
        return f"{shown} <span class='note'>{100 * outcome.probabilities[outcome.choice]:.0f} %</span>"
    if outcome.score is not None:
        return f"{outcome.score:+.2f} nats"
    if outcome.ranking:
        return f"rank {outcome.ranks[0]} of {len(outcome.ranking)}"
    return _shown(outcome.answer)
