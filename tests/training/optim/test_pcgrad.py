"""Harmonised gradients: the ordinary step without conflict, no conflict left after it with two losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.metrics import read_metrics
from anytoken.training.optim.pcgrad import backward, cosines, project
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_projection(seed: int, count: int) -> None:
    gradients = torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))
    projected = project(gradients)
    if (gradients @ gradients.T >= 0).all():
        assert torch.equal(projected, gradients)
    if count == 2:  # each is then at most orthogonal to the other's gradient
        assert (projected[0] @ gradients[1]).item() > -1e-5 and (projected[1] @ gradients[0]).item() > -1e-5
    assert (projected.norm(dim=1) <= gradients.norm(dim=1) + 1e-5).all()


def test_cosines_of_all_pairs() -> None:
    gradients = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])
    assert cosines(gradients).tolist() == [0, -1, 0]
    assert cosines(gradients[:1]).tolist() == []


def test_what_is_no_modalitys_share_is_left_alone() -> None:
    layer = nn.Linear(2, 1, bias=False)
    first, second = layer(torch.tensor([1.0, 0.0])).sum(), layer(torch.tensor([-1.0, 1.0])).sum()
    shared = 5 * layer.weight[0, 0]
    found = backward(layer, first + second + shared, [first, second], scale=0.5)
    # the parts (1, 0) and (-1, 1) conflict: they become (0.5, 0.5) and (0, 1)
    torch.testing.assert_close(layer.weight.grad, 0.5 * torch.tensor([[0.5 + 5.0, 1.5]]))
    assert found == {"gradient_cosine": pytest.approx(-(0.5**0.5)), "gradient_conflict": 1.0}


def test_a_run_without_conflict_is_the_ordinary_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {
        "steps": 3,
        "gradient_accumulation_steps": 2,
        "data": [{"path": "things", "views": {"text->tile": 1}}],
    }
    recipe["loss"] = {
        "modality_weights": {"text": 0, "beep": 0},
        "control_weight": 0,
    }  # one loss: nothing to conflict
    plain = read_metrics(train(TrainConfig.from_dict(recipe)) / "metrics.jsonl")
    changed = recipe | {"pcgrad": True, "output": str(tmp_path / "harmonised")}
    ours = read_metrics(train(TrainConfig.from_dict(changed)) / "metrics.jsonl")
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in plain], abs=1e-5)


def test_conflict_is_in_the_log_and_the_run_learns(recipe: dict[str, Any]) -> None:
    entries = read_metrics(train(TrainConfig.from_dict(recipe | {"pcgrad": True})) / "metrics.jsonl")
    assert all(
        -1 <= entry["gradient_cosine"] <= 1 and 0 <= entry["gradient_conflict"] <= 1 for entry in entries
    )
    assert entries[-1]["loss"] < entries[0]["loss"]


def test_several_processes_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one process only"):
        TrainConfig.from_dict(recipe | {"pcgrad": True, "distributed": {"world_size": 2}})
