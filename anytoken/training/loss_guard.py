"""Stop a run whose loss explodes but stays finite (`interrupts.py` stops one whose loss is not finite).

The loss is smoothed, so that noise does not stop a run, and short runs are not checked: the minimum is tracked from
half of ``steps`` on, and the loss must stay above the limit for ``steps`` in a row.
"""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from anytoken.training.checkpoint import begin_from, saved_states, step_of
from anytoken.training.config import TrainConfig
from anytoken.utils.errors import DivergenceError

MARGIN = 0.5  # nats above the minimum that are too much at least: small losses vary by factors


class LossGuard(TrainerCallback):
    """Raises DivergenceError once the smoothed loss has been above its limit for ``loss_guard.steps`` steps."""

    def __init__(self, stage: TrainConfig) -> None:
        self.stage, self.spec = stage, stage.loss_guard
        self.step = 0  # of the last line of the log
        self.sum = self.weight = 0.0  # exponential moving average of the loss
        self.lowest: float | None = None
        self.calm = 0  # last step at which the average was below the limit
        self.sound = 0  # last step at which the loss itself was

    STATE = ("step", "sum", "weight", "lowest", "calm", "sound")

    def state(self) -> dict[str, Any]:
        """The state for resumption, as JSON."""
        return {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from ``state``."""
        for name, value in state.items():
            setattr(self, name, value)

    def last_good(self, folder: Path) -> Path | None:
        """The newest state from before the loss rose."""
        return next((one for one in reversed(saved_states(folder)) if step_of(one) <= self.sound), None)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.spec is None or not logs or "loss" not in logs:
            return
        kept = math.exp((self.step - state.global_step) / (self.spec.steps / 2))
        self.step = state.global_step
        self.sum = kept * self.sum + (1 - kept) * logs["loss"]
        self.weight = kept * self.weight + (1 - kept)
        mean = self.sum / self.weight
        low = math.inf if self.lowest is None else self.lowest
        limit = max(self.spec.factor * low, low + MARGIN)
        if logs["loss"] <= limit:
            self.sound = self.step
        if mean <= limit:
            self.calm = self.step
        if self.step >= self.spec.steps / 2:
            self.lowest = min(low, mean)
        if self.step - self.calm >= self.spec.steps:
            raise self._error(mean, limit)

    def _error(self, mean: float, limit: float) -> DivergenceError:
        good = self.last_good(Path(self.stage.output))
        return DivergenceError(
            f"the loss exploded: smoothed, it is {mean:.3g} at step {self.step} and has been above {limit:.3g} since "
            f"step {self.calm}, after a minimum of {self.lowest:.3g}. The last state from before is "
            f"{good or 'not saved: lower save_every'}. Take a lower optimizer.lr (now {self.stage.optimizer.lr}) or a "
            f"longer schedule.warmup_steps, and begin another run"
            f"{begin_from(self.stage, [good] if good else [])}. loss_guard=null trains on regardless"
        )
