"""Ways that a run ends early: a signal, or a non-finite loss.

Ctrl-C (or SIGTERM, which schedulers send before they reclaim a machine) finishes the current step and saves it; a
second one stops at once. A non-finite loss or gradient stops the run before it reaches the weights, and its batch is
saved for inspection.
"""

import json
import math
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anytoken.training.checkpoint import begin_from, saved_states
from anytoken.training.config import TrainConfig
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DivergenceError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved its state."""


class GracefulStop:
    """A context in which the first signal only sets ``asked``; the second has its usual effect."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for known, handler in self._before.items():
            signal.signal(known, handler)
        print("\nstopping after this step; once more to stop at once, unsaved", file=sys.stderr, flush=True)

    def any_rank_requested(self, device: torch.device, world_size: int) -> bool:
        """Whether any process was asked to stop: all must save the same step."""
        if world_size == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        torch.distributed.all_reduce(asked)
        return bool(asked)


@dataclass(frozen=True)
class Noted:
    """A value of a step, still on its device: loss or gradient norm, 0-d, and the learning rate of that step."""

    step: int
    what: str
    value: Tensor
    learning_rate: float


class FiniteCheck:
    """Losses and gradient norms of the last `steps` steps, checked together, with their batches.

    On a CPU every value is checked immediately, so a non-finite one never reaches the weights. On a GPU checking
    synchronizes, so it happens every `steps` steps, before each line of the log and before each saved state: weights
    may be broken by then, but saved states are not.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._noted: list[Noted] = []
        self._batches: list[tuple[int, dict[str, Any]]] = []

    def keep(self, step: int, batch: dict[str, Any]) -> None:
        """Record a batch of a step."""
        self._batches.append((step, batch))

    def note(self, one: Noted) -> None:
        """Record a value to check."""
        self._noted.append(one)

    @property
    def due(self) -> bool:
        """Whether it is time to check."""
        return self._noted[-1].step - self._noted[0].step >= self.steps - 1

    def end_step(self) -> None:
        """Drop batches whose values were all checked."""
        waiting = {one.step for one in self._noted}
        self._batches = [pair for pair in self._batches if pair[0] in waiting]

    def first_bad(self) -> Noted | None:
        """Check all recorded values; returns the first non-finite one."""
        noted, self._noted = self._noted, []
        if not noted:
            return None
        values = torch.stack([one.value.float() for one in noted]).tolist()
        return next((one for one, value in zip(noted, values, strict=True) if not math.isfinite(value)), None)

    def batches_of(self, step: int) -> list[dict[str, Any]]:
        """The batches of a step."""
        return [batch for one, batch in self._batches if one == step]


def dump_divergence(
    what: str, stage: TrainConfig, model: nn.Module, batches: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> DivergenceError:
    """Save the packed batches of a step whose loss or gradient is not finite, and say what to do.

    what: "loss" or "gradient norm". facts: for the JSON next to the batches; ``step``, ``micro_batch`` (the number of
    micro-batches so far, the last one with the loss), ``process`` and ``what``.
    """
    suffix = f"-{facts['process']}" if facts["process"] else ""
    path = Path(stage.output) / "diverged" / f"step-{facts['step']}{suffix}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{n}.{key}": one.cpu()
        for n, batch in enumerate(batches)
        for key, one in batch.items()
        if isinstance(one, Tensor)
    }
    save_file(tensors, path)
    broken = [name for name, one in model.named_parameters() if not torch.isfinite(one).all()]
    about = {**facts, "seed": stage.seed, "weights_not_finite": broken}
    write_file(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    where = f"step {facts['step']}"
    if what == "loss" and stage.gradient_accumulation_steps > 1:
        where += f", micro-batch {facts['micro_batch']} of {stage.gradient_accumulation_steps}"
    return DivergenceError(_advice(f"the {what} is {facts[what]} at {where}", stage, path, bool(broken)))


def _advice(happened: str, stage: TrainConfig, batch: Path, broken: bool) -> str:
    where = (
        "weights are no longer finite, so an earlier step broke them"
        if broken
        else "weights are still finite"
    )
    return (
        f"{happened}; the {where}. Its batch is in {batch} and what is known of it in {batch.with_suffix('.json')}. "
        f"The same recipe would meet it again: take a lower optimizer.lr (now {stage.optimizer.lr}), a longer "
        "schedule.warmup_steps or another seed, and begin another run"
        f"{begin_from(stage, saved_states(Path(stage.output)))}"
    )
