"""The average of weights: its arithmetic, and that it is what is evaluated and exported while training goes on."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anytoken.training.config import TrainConfig
from anytoken.training.ema import FILE, WeightAverage
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError
from tests.training.test_resume import log_of


def test_the_average_follows_its_formula_and_is_exchanged_with_the_weights(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, 0.5)
    average.on_train_begin(None, None, None)
    wanted, present = module.weight.detach().clone(), module.weight
    for step in range(1, 6):
        with torch.no_grad():
            present.add_(step)
        average.on_step_end(None, SimpleNamespace(global_step=step), None)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * present.detach()
    assert list(average.average) == ["weight"]
    assert torch.allclose(average.average["weight"], wanted, atol=1e-6)
    trained = present.detach().clone()
    with pytest.raises(ZeroDivisionError), average.applied():
        assert torch.allclose(present, wanted, atol=1e-6)
        raise ZeroDivisionError
    assert torch.equal(present, trained)
    average.save(tmp_path)
    other = WeightAverage(nn.Linear(3, 2, bias=False), 0.5)
    other.load(tmp_path)
    assert torch.equal(other.average["weight"], average.average["weight"])
    save_file({"weight": average.average["weight"].bfloat16()}, tmp_path / FILE)
    other.load(tmp_path)
    assert other.average["weight"].dtype == torch.float32
    assert torch.allclose(other.average["weight"], average.average["weight"], rtol=1e-2)


def test_the_average_is_exported_and_evaluated_and_does_not_change_training(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    source = {**recipe["data"][0], "split": None}
    recipe |= {"steps": 6, "eval": {"every": 3, "batches": 1, "data": [source]}}
    runs = {
        decay: train(
            TrainConfig.from_dict(
                copy.deepcopy(recipe) | {"output": str(tmp_path / f"{decay}"), "ema_decay": decay}
            )
        )
        for decay in (None, 1e-9, 0.99)
    }
    weights = {decay: load_file(folder / "model.safetensors") for decay, folder in runs.items()}
    logs = {decay: log_of(folder) for decay, folder in runs.items()}
    losses = {decay: [one["loss"] for one in log if "loss" in one] for decay, log in logs.items()}
    held_out = {decay: [one["eval"] for one in log if "eval" in one] for decay, log in logs.items()}
    assert losses[None] == losses[1e-9] == losses[0.99]
    name = next(name for name, one in weights[None].items() if one.ndim == 2)
    assert torch.allclose(weights[None][name], weights[1e-9][name], atol=1e-6)
    assert not torch.allclose(weights[None][name], weights[0.99][name], atol=1e-4)
    assert len(held_out[0.99]) == 2 and held_out[0.99] != held_out[None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": 0.9, "distributed": {"world_size": 2, "mesh": {"dp_shard": 2}}}, "whole weights"),
    ],
)
def test_what_it_cannot_average_is_an_error(
    recipe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(recipe | changes)
