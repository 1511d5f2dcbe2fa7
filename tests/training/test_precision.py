"""precision: auto takes what is quicker on the machine, says so, and keeps to it when a run goes on."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from anytoken.training import precision
from anytoken.training.config import TrainConfig
from anytoken.training.interrupts import Interrupted
from anytoken.training.trainer import StageTrainer, train


def measured(speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda device: speedup)


def test_products_are_timed_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 2.0, torch.bfloat16: 5.0}
    monkeypatch.setattr(precision, "measure_peak_flops", lambda device, dtype, *sizes: speeds[dtype])
    precision.bf16_speedup.cache_clear()
    assert precision.bf16_speedup(torch.device("cpu")) == 2.5
    precision.bf16_speedup.cache_clear()


@pytest.mark.parametrize(("speedup", "chosen"), [(3.0, "bf16"), (1.1, "fp32"), (0.05, "fp32")])
def test_the_quicker_one_is_chosen_and_logged(
    speedup: float, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(speedup, monkeypatch)
    with caplog.at_level(logging.INFO):
        assert precision.choose_precision(torch.device("cpu")) == chosen
    assert f"precision: {chosen}" in caplog.text


def test_a_run_keeps_the_precision_it_began_with(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    inner = StageTrainer.compute_loss

    def noting(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        used.append(self.args.bf16)
        self.stop.asked = self.state.global_step == 1
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", noting)
    recipe |= {"precision": "auto", "steps": 3}
    measured(3.0, monkeypatch)
    with pytest.raises(Interrupted):
        train(TrainConfig.from_dict(recipe))
    measured(0.1, monkeypatch)  # another machine
    folder = train(TrainConfig.from_dict(recipe))
    assert used == [True] * 3
    assert yaml.safe_load((folder / "stage.yaml").read_text())["precision"] == "auto"
    assert json.loads((folder / "run.json").read_text())["precision"] == "bfloat16"
    assert train(TrainConfig.from_dict(recipe)) == folder  # finished: the same recipe
