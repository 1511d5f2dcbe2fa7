"""Muon against AdamW at equal ids: the same recipe, seed and batches, and held-out bits over the steps.

AdamW is run at several learning rates, since the best one is its own; what is compared is the best of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anytoken.benchmarks.harness import Figures
from anytoken.training.config import TrainConfig
from anytoken.training.metrics import read_metrics
from anytoken.training.report.html import held_out
from anytoken.training.report.svg import Line, Point, board, line_chart
from anytoken.training.trainer import train
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import EvaluationError


def compare_optimizers(stage: TrainConfig, rates: Sequence[float], runs: Path) -> Figures:
    """Run a recipe with its own optimizer and with AdamW at each rate; finished runs below `runs` are kept.

    EvaluationError for a recipe that measures no held-out bits during training.
    """
    if not stage.eval.data or not stage.eval.every:
        raise EvaluationError("The recipe measures no held-out bits: it needs eval.data and eval.every.")
    own = stage.optimizer
    adamw = [own.model_copy(update={"kind": "adamw", "lr": rate}) for rate in rates]
    rows: list[Figures] = []
    curves: dict[str, list[Point]] = {}
    for optimizer in (own, *adamw):
        rate = optimizer.muon_lr if optimizer.kind == "muon" else optimizer.lr
        name = f"{optimizer.kind} {rate:g}"
        changes = {"output": str(runs / name.replace(" ", "_")), "optimizer": optimizer}
        folder = train(stage.model_copy(update=changes))
        log = read_metrics(folder / "metrics.jsonl")
        curves[name] = [_bits(entry) for entry in held_out(log)]
        ends = [entry for entry in log if "groups" in entry]
        rows.append(
            {
                "optimizer": name,
                "ids": stage.steps * stage.tokens_per_batch,
                "training bits": _bits(ends[-1])[1],
                "held-out bits": curves[name][-1][1],
                "lowest held-out bits": min(bits for _, bits in curves[name]),
            }
        )
    best = min(rows[1:], key=lambda row: row["held-out bits"])
    for row in rows:
        row["to AdamW's best"] = row["held-out bits"] / best["held-out bits"]
    return {
        "recipe": stage.model_dump(mode="json", include={"model", "steps", "seed"}),
        "rows": rows,
        "curves": curves,
    }


def draw(figures: Figures, path: Path) -> Path:
    """The held-out curves as SVG: the recipe's optimizer, and AdamW dashed."""
    own, *others = figures["curves"].values()
    lines = [Line(own, "dots"), *(Line(points, "reference") for points in others)]
    return write_file(path, board([line_chart("held-out bits over steps", lines)]) + "\n")


def _bits(entry: Figures) -> Point:
    """Step and bits per target, over all groups but control ids, which are nearly always certain."""
    groups = [one for name, one in entry["groups"].items() if name != "control"]
    tokens = sum(one["tokens"] for one in groups)
    return entry["step"], sum(one["bits"] * one["tokens"] for one in groups) / tokens
