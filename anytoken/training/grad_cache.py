"""Exact gradients of batches larger than memory: GradCache (arXiv 2101.06983), also over several processes.

A contrastive loss needs all items of a batch at once, but only their features. These are computed first, chunk by chunk
and without a graph; the loss gives their gradients; each chunk is then recomputed with its graph to backpropagate them
to the weights. Dropout uses the same random numbers both times. Several processes gather all features, compute the same
loss, and sum the gradients of their own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from anytoken.utils.distributed import num_processes

Chunk = TypeVar("Chunk")
Columns = tuple[Tensor, ...]  # each [N, ...], N items


class RandomState:
    """The random state of CPU and GPUs; as a context, it is restored."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._fork: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng()
        self._fork.__enter__()
        torch.set_rng_state(self.cpu)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)

    def __exit__(self, *error: object) -> None:
        self._fork.__exit__(*error)  # type: ignore[arg-type]


def backward_in_chunks(
    encode: Callable[[Chunk], Columns],
    groups: Sequence[Sequence[Chunk]],
    loss: Callable[..., Tensor],
    frozen: bool = False,
) -> Tensor:
    """Backward of loss(*features of the groups' items), whose chunks `encode` maps to features; the loss, detached.

    groups: of chunks, whose features are put together, such as the left and right sides of pairs. frozen: `encode`
    has nothing to train, and is called once. Features of all processes meet in the loss, in order of rank.
    """
    states: list[list[RandomState]] = []
    leaves: list[Columns] = []
    with torch.no_grad():
        for chunks in groups:
            states.append([])
            parts = []
            for chunk in chunks:
                states[-1].append(RandomState())
                parts.append(encode(chunk))
            own = (torch.cat(column) for column in zip(*parts, strict=True))
            leaves.append(
                tuple(one.detach().requires_grad_(one.is_floating_point() and not frozen) for one in own)
            )
    value = loss(*(tuple(gather_rows(one) for one in columns) for columns in leaves))
    value.backward()
    if not frozen:
        for chunks, before, columns in zip(groups, states, leaves, strict=True):
            start = 0
            for chunk, state in zip(chunks, before, strict=True):
                with state:
                    found = encode(chunk)
                stop = start + len(found[0])
                learnt = [
                    (one, leaf.grad[start:stop])
                    for one, leaf in zip(found, columns, strict=True)
                    if one.requires_grad and leaf.grad is not None
                ]
                torch.autograd.backward([one for one, _ in learnt], [gradient for _, gradient in learnt])
                start = stop
    return value.detach()


def gather_rows(own: Tensor) -> Tensor:
    """A tensor's rows of all processes, in order of rank; gradients reach this process's own. All must call it."""
    count = num_processes()
    if count == 1:
        return own
    value = own.detach().contiguous()
    everyone = [torch.empty_like(value) for _ in range(count)]
    dist.all_gather(everyone, value)
    everyone[dist.get_rank()] = own
    return torch.cat(everyone)


def add_up_gradients(parameters: Iterable[nn.Parameter], share: float = 1.0) -> None:
    """Sum every gradient over all processes, times `share` (1 / processes if all have the same gradient)."""
    if num_processes() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.mul_(share)
