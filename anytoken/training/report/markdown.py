"""The Markdown report of a finished run, from its ``metrics.jsonl``.

The table gives each group's loss in bits at a few steps and on the held-out sources, so that whoever repeats a recipe
can compare.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anytoken.training.config import TrainConfig
from anytoken.training.metrics import read_metrics
from anytoken.utils.atomic import write_file

MOMENTS = 6
REPORT = "report.html"


def write_report(folder: str | Path) -> Path:
    """Write ``training.md`` next to the metrics of a run; returns its path."""
    folder = Path(folder)
    entries = read_metrics(folder / "metrics.jsonl")
    train = [entry for entry in entries if "groups" in entry]
    speed = sorted(entry["tokens_per_second"] for entry in train)[len(train) // 2] if train else 0
    parts = [
        f"# {folder.name}",
        f"Steps: {train[-1]['step'] if train else 0}. Median speed: {speed:.0f} tokens/s.",
        "Training bits per target:",
        moments_table(entries),
    ]
    if any("eval" in entry for entry in entries):
        parts += ["Held-out bits per target:", held_out_table(entries)]
    return write_file(folder / "training.md", "\n\n".join(parts) + "\n")


def summary(stage: TrainConfig) -> list[str]:
    """What to say of a finished run: steps and loss, the last held-out losses, its report, and what to type next."""
    folder = Path(stage.output)
    entries = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    train = [entry for entry in entries if "loss" in entry]
    held_out = [entry["eval"]["groups"] for entry in entries if "eval" in entry]
    said = str(folder)
    if train:
        said += f": {train[-1]['step']:,} of {stage.steps:,} steps, loss {train[-1]['loss']:.3f}"
    lines = [said]
    if held_out:
        bits = ", ".join(f"{name} {group['bits']:.2f}" for name, group in held_out[-1].items())
        lines.append(f"held out, bits per target: {bits}")
    if (folder / REPORT).is_file():
        lines.append(f"report: {folder / REPORT}")
    model = ["--model", str(folder)] if stage.lora is None else adapted(stage.init_from, folder)
    return [*lines, f"next: {shlex.join(['anytoken', 'chat', *model])}"]


def adapted(model: str, adapter: Path) -> list[str]:
    """The options that open a model with an adapter."""
    return ["--model", model, "--adapter", str(adapter)]


def moments_table(entries: Sequence[dict[str, Any]]) -> str:
    """Bits per target of each group at a few moments of the training, in Markdown."""
    return _table(_moments([entry for entry in entries if "groups" in entry]))


def held_out_table(entries: Sequence[dict[str, Any]]) -> str:
    """Bits per target of each group on the held-out sources, in Markdown."""
    return _table([{"step": entry["step"], **entry["eval"]} for entry in entries if "eval" in entry])


def _moments(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few entries, evenly spaced, the first and the last among them."""
    if len(entries) <= MOMENTS:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (MOMENTS - 1))] for i in range(MOMENTS)]


def _table(entries: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry["groups"]))
    rows = [["step", *names], ["---:"] * (len(names) + 1)]
    for entry in entries:
        groups = entry["groups"]
        rows.append([str(entry["step"]), *(f"{groups[n]['bits']:.2f}" if n in groups else "" for n in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
