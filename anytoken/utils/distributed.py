"""Sums over the processes that train one model together, so that a loss is that of the global batch.

Every process computes its own rows. What a loss divides by, and what is a product of two means (load balance), is
of the global batch: such a sum is taken over all processes, and its gradient is this process's part of the whole
one. Engines average gradients over processes, so that part counts as many times as there are processes.
"""

import torch
from torch import Tensor
from torch import distributed as dist


def num_processes() -> int:
    """The number of processes: 1 if not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_processes() -> dist.ProcessGroup | None:
    """The group of all processes; None if there is only one."""
    return dist.group.WORLD if num_processes() > 1 else None


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, all of which must call this; with one process, the tensor itself.

    Gradients averaged over processes are those of the sum.
    """
    count = num_processes()
    if count == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return torch.add(total, value - value.detach(), alpha=count) if value.requires_grad else total
