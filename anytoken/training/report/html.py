"""``report.html``: the report of a run, during training and afterwards.

One file without network or scripts: curves, expert load, samples, configuration and machine. It is rewritten at every
line of the log, so reloading it shows the current state. If the recipe names a ``reference``, another run's metrics
are drawn behind the curves as dashed lines.
"""

import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from anytoken import recipes
from anytoken.training.config import TrainConfig
from anytoken.training.metrics import read_metrics
from anytoken.training.report.markdown import REPORT
from anytoken.training.report.samples import read_samples
from anytoken.training.report.svg import Line, flowing, heat_map, line_chart, thin
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import ConfigError

FACTS = "run.json"
MOMENTS = 5  # sampled steps that are shown
LOAD_LINES = 10  # last log lines whose expert load is averaged
SHARE_OF_TIME = 0.02  # of the run, at most, for writing this page
STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;
background:light-dark(#fff,#161618);color:light-dark(#222,#ddd)}
section{border-top:1px solid light-dark(#ddd,#333);padding:.5rem 0 1rem}h1,h2{margin:.4rem 0}h2{font-size:1.1rem}
h1{overflow-wrap:anywhere}table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.25rem .8rem .25rem 0;text-align:left;vertical-align:top}
th{font-weight:600}.note{color:light-dark(#666,#999)}img,video{width:96px;image-rendering:pixelated;border-radius:6px}
audio{width:12rem}pre{overflow-x:auto;background:light-dark(#f5f5f5,#222);padding:.8rem;border-radius:6px}
"""
Entries = Sequence[dict[str, Any]]


class HtmlReport:
    """Writes a run's report, limited to a share of the training time."""

    def __init__(self, stage: TrainConfig) -> None:
        self.stage, self.folder = stage, Path(stage.output)
        self.reference = read_metrics(find_reference(stage.reference)) if stage.reference else []
        self.next = 0.0

    def update(self, finished: bool = False) -> None:
        """Write the page if it is time, or if the run has finished."""
        start = time.monotonic()
        if start < self.next and not finished:
            return
        write_file(self.folder / REPORT, self._html(finished), sync=finished)
        self.next = time.monotonic() + (time.monotonic() - start) / SHARE_OF_TIME

    def _html(self, finished: bool) -> str:
        entries = read_metrics(self.folder / "metrics.jsonl")
        train = [entry for entry in entries if "groups" in entry]
        recipe = html.escape(yaml.safe_dump(self.stage.model_dump(mode="json"), sort_keys=False))
        sections = {**run_sections(self.folder, self.reference), "Recipe": f"<pre>{recipe}</pre>"}
        body = "".join(f"<section><h2>{name}</h2>{part}</section>" for name, part in sections.items())
        title = html.escape(self.folder.name)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
            f"<h1>{title}</h1><p>{_status(self.stage, train, finished)}</p>{body}</html>\n"
        )


def run_sections(folder: Path, reference: Entries = ()) -> dict[str, str]:
    """Titles and HTML of the sections of a run's report so far; `reference`: another run's metrics."""
    path, facts_path = folder / "metrics.jsonl", folder / FACTS
    entries = read_metrics(path) if path.is_file() else []
    train = [entry for entry in entries if "groups" in entry]
    facts = json.loads(facts_path.read_text(encoding="utf-8")) if facts_path.is_file() else {}
    curves = [line_chart(name, [Line(thin(points))]) for name, points in _curves(train)]
    sections = {
        "Bits per target": _losses(entries, reference) + _legend(bool(reference), entries) if entries else "",
        "Optimization": flowing(curves) if curves else "",
        "Expert load": _experts(train),
        "Samples": _samples(folder),
        "Run": _table({key: value for key, value in facts.items() if key != "data"}),
        "Data": _rows(facts.get("data", [])),
    }
    return {name: part for name, part in sections.items() if part}


def find_reference(name: str) -> Path:
    """A metrics file, given by path or bundled; ConfigError if it does not exist."""
    for path in (Path(name), recipes.root() / name):
        if path.is_file():
            return path
    raise ConfigError(f"reference {name!r} is not a metrics file; give a run's metrics.jsonl or leave it out")


def _status(stage: TrainConfig, train: Entries, finished: bool) -> str:
    if not train:
        return "No step has been logged yet."
    last = train[-1]
    state = "finished" if finished else f"at {time.strftime('%Y-%m-%d %H:%M:%S')}"
    rates = sorted(entry["tokens_per_second"] for entry in train)
    mfu = last.get("mfu", last.get("share_of_peak"))  # as version 0.1 had it
    share = "" if mfu is None else f", MFU {100 * mfu:.0f} % (of the measured peak)"
    return (
        f"Step {last['step']:,} of {stage.steps:,}, {state}. Loss {last['loss']:.3f}. "
        f"Median speed {rates[len(rates) // 2]:,.0f} tokens/s{share}."
    )


def _losses(entries: Entries, reference: Entries) -> str:
    names = dict.fromkeys(name for entry in entries for name in entry.get("groups", {}))
    charts = []
    for name in names:
        lines = [
            Line(thin(bits_of(reference, name)), "reference"),
            Line(thin(bits_of(entries, name))),
            Line(bits_of(held_out(entries), name), "dots"),
        ]
        charts.append(line_chart(name, [line for line in lines if line.points]))
    return flowing(charts)


def _legend(reference: bool, entries: Entries) -> str:
    parts = ["Line: training"]
    parts += ["dots: held out"] if held_out(entries) else []
    parts += ["dashed: the reference run"] if reference else []
    return f"<p class='note'>{'; '.join(parts)}. Steps from left to right.</p>"


def bits_of(entries: Entries, name: str) -> list[tuple[float, float]]:
    """(step, bits per target) of a group, from those entries that have it."""
    found = [(entry["step"], entry.get("groups", {}).get(name)) for entry in entries]
    return [(step, group["bits"]) for step, group in found if group]


def held_out(entries: Entries) -> list[dict[str, Any]]:
    """The held-out entries, in the form of the others."""
    return [{"step": entry["step"], **entry["eval"]} for entry in entries if "eval" in entry]


def _curves(train: Entries) -> list[tuple[str, list[tuple[float, float]]]]:
    """Every plain number of the log over the steps, in its order."""
    names = dict.fromkeys(
        key for entry in train for key, value in entry.items() if isinstance(value, float) and key != "step"
    )
    return [
        (name.replace("_", " "), [(entry["step"], entry[name]) for entry in train if name in entry])
        for name in names
    ]


def _experts(train: Entries) -> str:
    """A map for each modality, its load averaged over the last lines."""
    loads = [entry["expert_load"] for entry in train if "expert_load" in entry][-LOAD_LINES:]
    maps = []
    for name in dict.fromkeys(name for load in loads for name in load):
        found = [load[name] for load in loads if name in load]
        layers = (
            [_mean(rows) for rows in zip(*found, strict=True)]
            if isinstance(found[0][0], list)
            else [_mean(found)]
        )
        maps.append(heat_map(name, layers))
    note = "<p class='note'>Share of each layer's tokens routed to an expert; full color: twice the uniform share.</p>"
    return flowing(maps) + note if maps else ""


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _samples(folder: Path) -> str:
    taken = read_samples(folder)
    if len(taken) > MOMENTS:
        taken = [taken[round(n * (len(taken) - 1) / (MOMENTS - 1))] for n in range(MOMENTS)]
    if not taken:
        return ""
    head = "".join(f"<th>step {step:,}</th>" for step, _ in taken)
    lines = []
    for number, one in enumerate(taken[-1][1]):
        prompt = one["prompt"] if isinstance(one["prompt"], str) else json.dumps(one["prompt"])
        cells = "".join(f"<td>{found[number]['html']}</td>" for _, found in taken if number < len(found))
        lines.append(f"<tr><th>{html.escape(prompt)} → {html.escape(str(one['output']))}</th>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _table(values: dict[str, Any]) -> str:
    lines = [
        f"<tr><th>{html.escape(key.replace('_', ' '))}</th><td>{html.escape(_shown(value))}</td></tr>"
        for key, value in values.items()
    ]
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
