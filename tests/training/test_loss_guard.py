"""A loss that explodes and stays finite ends the run and leaves a good state; noise and short runs end nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anytoken.training.checkpoint import saved_states, step_of
from anytoken.training.config import TrainConfig
from anytoken.training.loss_guard import LossGuard
from anytoken.training.trainer import StageTrainer, train
from anytoken.utils.errors import DivergenceError


def run(stage: TrainConfig, losses: Any, every: int = 1) -> None:
    """Give a guard the mean loss of each ``every`` steps."""
    guard = LossGuard(stage)
    for step in range(every, len(losses) + 1, every):
        state = guard.state()
        guard = LossGuard(stage)
        guard.restore(state)  # a run may be resumed anywhere
        mean = float(np.mean(losses[step - every : step]))
        guard.on_log(None, SimpleNamespace(global_step=step), None, {"loss": mean})


@pytest.fixture
def stage(recipe: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict(recipe)


@pytest.mark.parametrize("every", [1, 20])
def test_an_explosion_stops_the_run(stage: TrainConfig, every: int) -> None:
    losses = np.concatenate([np.linspace(10, 2, 600), np.full(400, 2.0), np.full(1000, 9.0)])
    with pytest.raises(
        DivergenceError, match=r"loss exploded.* at step 12[2-4]\d and has been above 3.8\d since step 10\d\d"
    ):
        run(stage, losses + np.random.default_rng(0).normal(0, 0.5, 2000), every)


@pytest.mark.parametrize("every", [1, 20])
def test_noise_does_not(stage: TrainConfig, every: int) -> None:
    rng = np.random.default_rng(0)
    views = rng.choice([0.3, 4.0], 20_000)  # one easy and one hard view a batch
    tails = 1 + rng.pareto(2.0, 20_000)
    small = 0.01 * rng.lognormal(0, 1.5, 20_000)  # of one image learnt by heart
    spikes = np.where(np.arange(20_000) % 700 < 60, 12.0, 2.0)  # that are recovered from
    drift = 2 + np.linspace(0, 1.5, 20_000)
    for losses in (views, tails, small, spikes, drift):
        run(stage, losses, every)


def test_short_runs_are_never_judged(stage: TrainConfig) -> None:
    run(stage, np.concatenate([np.full(20, 0.1), np.full(230, 50.0)]))


def explode(self: StageTrainer) -> None:
    for one in self.lm.parameters():
        one.data.mul_(30)


def test_the_state_from_before_is_kept_and_named(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = StageTrainer.compute_loss

    def acting(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 13:
            explode(self)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", acting)
    recipe |= {"steps": 40, "save_every": 2, "optimizer": {"lr": 1e-4}}
    guarded = recipe | {"loss_guard": {"factor": 1.5, "steps": 8}}
    said = r"from before is (\S*/state/checkpoint-12)\. Take a lower optimizer.lr .*init_from=\1 .*loss_guard=null"
    with pytest.raises(DivergenceError, match=said):
        train(TrainConfig.from_dict(guarded))
    assert step_of(saved_states(Path(recipe["output"]))[0]) == 12
    off = recipe | {"loss_guard": None, "output": str(tmp_path / "off")}
    assert (train(TrainConfig.from_dict(off)) / "model.safetensors").is_file()
