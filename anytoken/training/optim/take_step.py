"""One optimizer step, for the loops that do not use transformers' Trainer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def take_step(
    loss: Tensor, optimizer: torch.optim.Optimizer, lr: float, clipped: Iterable[nn.Parameter] = ()
) -> None:
    """Take one step on a loss at a learning rate; the gradient of ``clipped`` is clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clipped:
        nn.utils.clip_grad_norm_(clipped, 1.0)
    optimizer.step()
