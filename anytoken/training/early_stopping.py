"""End a run early, by transformers' EarlyStoppingCallback, and say what its best held-out loss was."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from anytoken.training.config import TrainConfig
from anytoken.training.optim.lr_schedule import Schedule
from anytoken.utils.errors import ConfigError


def best_metric(stage: TrainConfig) -> str | None:
    """The held-out metric that a stage's evaluations are compared by; None if they are not."""
    if stage.early_stopping is not None:
        return stage.early_stopping.metric
    return "bits" if stage.keep_best else None


def check_metric(metric: str | None, names: Sequence[str]) -> None:
    """ConfigError for the metric of a modality (or view) that the model does not have."""
    _, _, name = (metric or "").partition("/")
    if name and name not in names:
        raise ConfigError(
            f"early_stopping.metric {metric!r}: there is no {name!r}; take bits, or bits/ and one of {', '.join(names)}"
        )


def check_measured(metric: str | None, metrics: Mapping[str, float]) -> None:
    """ConfigError if the held-out sources have nothing to compute the metric from."""
    if metric is not None and f"eval_{metric}" not in metrics:
        found = [name.removeprefix("eval_") for name in metrics if name.startswith("eval_bits")]
        raise ConfigError(
            f"early_stopping.metric {metric!r}: eval.data has no targets of it; it gives {', '.join(found)}"
        )


class EarlyStopping(TrainerCallback):
    """transformers' EarlyStoppingCallback on held-out bits; it also sets the last step of the run's schedule."""

    def __init__(self, stage: TrainConfig, schedule: Schedule) -> None:
        spec = stage.early_stopping
        assert spec is not None
        self.schedule, self.steps, self.metric = schedule, stage.steps, spec.metric
        self.inner = EarlyStoppingCallback(spec.patience, spec.min_delta)

    @property
    def count(self) -> int:
        """Evaluations since the last improvement; it is saved with a state."""
        return self.inner.early_stopping_patience_counter

    @count.setter
    def count(self, value: int) -> None:
        self.inner.early_stopping_patience_counter = value

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self.inner.on_evaluate(args, state, control, metrics)
        if self.count < self.inner.early_stopping_patience or state.global_step >= self.schedule.total:
            return
        self.schedule.total = state.global_step
        control.should_save = True
        if state.is_world_process_zero:
            tqdm.write(
                f"held-out {self.metric} did not improve on {state.best_metric:.4g} in {self.count} evaluations: the "
                f"run ends here, at step {state.global_step} of {self.steps}, and is saved as finished",
                sys.stderr,
            )
