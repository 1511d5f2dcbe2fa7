"""The benchmark of a step: both sides run on the same batch, and the shares are shares."""

from typing import Any

from anytoken.benchmarks.train import bench_train
from anytoken.training.config import TrainConfig


def test_a_step_is_compared(recipe: dict[str, Any]) -> None:
    [row] = bench_train(TrainConfig.from_dict(recipe), repeats=1)["rows"]
    assert row["ids"] == recipe["tokens_per_batch"] and 0 < row["learnt"] < row["ids"]
    assert row["ratio"] > 0 and 0 < row["loading, of a step"] < 1 and 0 < row["real ids"] <= 1
