"""Reference curves of runs for comparison: thinned metrics, a chart and a table per stage.

`anytoken reference RUN...` writes them into `stages/`; a recipe's ``reference`` draws them behind its own curves.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anytoken.training.metrics import read_metrics
from anytoken.training.report.html import bits_of, held_out
from anytoken.training.report.markdown import held_out_table, moments_table
from anytoken.training.report.svg import Line, board, line_chart
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import ConfigError

KEPT = 25  # log lines of a run
BEGIN, END = "<!-- curves -->", "<!-- /curves -->"


def publish_references(runs: Sequence[Path], stages: Path) -> Path:
    """Write ``reference/NAME.jsonl`` and ``.svg`` of each run, and the tables of README.md between its marks."""
    page = stages / "README.md"
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ConfigError(
            f"{page} has no place for the curves; put the lines {BEGIN} and {END} where they belong"
        )
    parts = [_publish(run, stages / "reference") for run in runs]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return write_file(page, "\n\n".join([before + BEGIN, *parts, END + after]))


def _publish(run: Path, folder: Path) -> str:
    entries = thin_metrics(read_metrics(run / "metrics.jsonl"))
    write_file(folder / f"{run.name}.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    names = dict.fromkeys(name for entry in entries for name in entry.get("groups", {}))
    charts = [
        line_chart(name, [Line(bits_of(entries, name)), Line(bits_of(held_out(entries), name), "dots")])
        for name in names
    ]
    write_file(folder / f"{run.name}.svg", board(charts) + "\n")
    return "\n\n".join(
        [
            f"### {run.name}",
            f"![Bits per target of {run.name} over its steps](reference/{run.name}.svg)",
            "Training:",
            moments_table(entries),
            "Held out:",
            held_out_table(entries),
        ]
    )


def thin_metrics(entries: Sequence[dict[str, Any]], kept: int = KEPT) -> list[dict[str, Any]]:
    """Bits per group of ``kept`` training lines, evenly spaced from the first to the last, and of all held-out ones."""
    train = [entry for entry in entries if "groups" in entry]
    if len(train) > kept:
        train = [train[round(n * (len(train) - 1) / (kept - 1))] for n in range(kept)]
    steps = {entry["step"] for entry in train}
    found = []
    for entry in entries:
        if "groups" in entry and entry["step"] in steps:
            found.append({"step": entry["step"], "groups": _bits(entry["groups"])})
        elif "eval" in entry:
            found.append({"step": entry["step"], "eval": {"groups": _bits(entry["eval"]["groups"])}})
    return found


def _bits(groups: dict[str, Any]) -> dict[str, Any]:
    return {name: {"bits": round(group["bits"], 3)} for name, group in groups.items()}
