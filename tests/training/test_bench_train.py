"""The benchmark of a step: both sides run on the same batch, and the shares are shares."""

from typing import Any

import pytest

from anytoken.benchmarks.train import bench_train
from anytoken.training.config import TrainConfig


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_a_step_is_compared(recipe: dict[str, Any], precision: str) -> None:
    [row] = bench_train(TrainConfig.from_dict(recipe | {"precision": precision}), repeats=1)["rows"]
    assert row["precision"] in ("fp32", "bf16") and precision in ("auto", row["precision"])
    assert row["recipe tokens/s"] == pytest.approx(row["recipe to float32"] * row["tokens/s"])
    assert row["ids"] == recipe["tokens_per_batch"] and 0 < row["learnt"] < row["ids"]
    assert row["ratio"] > 0 and 0 < row["loading, of a step"] < 1 and 0 < row["real ids"] <= 1
