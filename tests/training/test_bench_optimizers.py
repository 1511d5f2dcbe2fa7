"""Optimizers are compared at equal ids, on the same batches, by their held-out bits."""

from pathlib import Path
from typing import Any

import pytest

from anytoken.benchmarks.optimizers import compare_optimizers, draw
from anytoken.training.config import TrainConfig
from anytoken.training.metrics import read_metrics
from anytoken.utils.errors import EvaluationError


@pytest.fixture
def compared(recipe: dict[str, Any]) -> dict[str, Any]:
    source = {**recipe["data"][0], "split": None}
    muon = {"kind": "muon", "lr": 1e-2, "muon_lr": 0.02}
    return recipe | {
        "steps": 4,
        "optimizer": muon,
        "eval": {"every": 2, "batches": 1, "data": [source]},
    }


def test_the_recipe_is_compared_with_the_best_adamw(compared: dict[str, Any], tmp_path: Path) -> None:
    figures = compare_optimizers(TrainConfig.from_dict(compared), [1e-3, 1e-2], tmp_path / "runs")
    rows = {row["optimizer"]: row for row in figures["rows"]}
    assert list(rows) == ["muon 0.02", "adamw 0.001", "adamw 0.01"]
    best = min(rows[name]["held-out bits"] for name in ("adamw 0.001", "adamw 0.01"))
    for row in rows.values():
        assert row["ids"] == 4 * 256 and row["to AdamW's best"] == pytest.approx(row["held-out bits"] / best)
    assert {tuple(step for step, _ in points) for points in figures["curves"].values()} == {(2, 4)}
    first = {
        folder.name: read_metrics(folder / "metrics.jsonl")[0]["groups"]
        for folder in (tmp_path / "runs").iterdir()
    }
    tokens = [{name: one["tokens"] for name, one in groups.items()} for groups in first.values()]
    assert tokens[0] == tokens[1] == tokens[2]  # the same batches
    losses = [{name: one["bits"] for name, one in groups.items()} for groups in first.values()]
    assert losses[0] == losses[1] == losses[2]  # and the same weights at the start
    assert draw(figures, tmp_path / "curve.svg").read_text().count("<polyline") == 3


def test_a_recipe_without_held_out_bits_is_an_error(compared: dict[str, Any], tmp_path: Path) -> None:
    del compared["eval"]
    with pytest.raises(EvaluationError, match=r"eval\.data"):
        compare_optimizers(TrainConfig.from_dict(compared), [1e-3], tmp_path)
