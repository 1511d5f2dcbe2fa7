"""Exponential moving average of the trained weights (Polyak and Juditsky 1992), for evaluation and export.

Training continues with the weights themselves. Early in a run the average forgets faster, as in TensorFlow's
ExponentialMovingAverage, so that it does not remember the initial weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """The average of a module's trainable parameters, updated after every step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.average:
            self.average = {name: one.detach().clone() for name, one in self.parameters.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        present = [one.detach() for one in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), present, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with its average weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, folder: Path) -> None:
        """Write the average into a state's folder."""
        save_file({name: one.contiguous() for name, one in self.average.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, or a copy of it in a shorter data type (`portable_state.py`)."""
        saved = load_file(folder / FILE)
        self.average = {name: saved[name].to(one) for name, one in self.parameters.items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.average.items():
            parameter = self.parameters[name]
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)
