"""A training run while it trains: the content of `report.html`, rebuilt from the files of the run when they grow."""

from __future__ import annotations

import html
import time
from pathlib import Path

from anytoken.training.metrics import read_metrics
from anytoken.training.report.html import FACTS, run_sections
from anytoken.training.report.samples import FOLDER as SAMPLES
from anytoken.utils.errors import CheckpointError

METRICS = "metrics.jsonl"
STYLE = """
.run section{border-top:1px solid var(--border-color-primary);padding:.6rem 0}
.run h3{margin:.2rem 0}.run table{display:block;overflow-x:auto;border-collapse:collapse}
.run td,.run th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
.run img,.run video{width:96px;image-rendering:pixelated;border-radius:6px}.run audio{width:12rem}
.run .note{color:var(--body-text-color-subdued)}
"""


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder, the one that was written to last first: itself, or those below it.

    CheckpointError if there is none. A run is a folder with metrics.jsonl; one that has not logged yet has run.json.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the output folder of a training run, or one that holds several."
        )
    found = {path.parent for name in (METRICS, FACTS) for path in folder.rglob(name)}
    if not found:
        raise CheckpointError(f"{folder} holds no training run: there is no {METRICS} in it or below it.")
    return sorted(found, key=changed, reverse=True)


def changed(run: Path) -> float:
    """When a run was last written to, in seconds since 1970."""
    files = [run / METRICS, run / FACTS, run / SAMPLES]
    return max(path.stat().st_mtime for path in files if path.exists())


def run_view(run: Path) -> str:
    """Status, curves, samples and facts of a run as HTML for a page that brings STYLE."""
    path = run / METRICS
    entries = [entry for entry in (read_metrics(path) if path.is_file() else []) if "groups" in entry]
    if entries:
        last = entries[-1]
        status = f"Step {last['step']:,}, loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s."
    else:
        status = "No step has been logged yet."
    written = time.strftime("%H:%M:%S", time.localtime(changed(run)))
    sections = "".join(
        f"<section><h3>{html.escape(name)}</h3>{part}</section>" for name, part in run_sections(run).items()
    )
    return f"<div class='run'><p>{html.escape(run.name)}: {status} Last written at {written}.</p>{sections}</div>"
