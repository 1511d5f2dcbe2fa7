"""Detect changes of a model's weights, for caches between calls.

The same parameter object can hold other values: `p.data = ...` (such as an exponential moving average for evaluation),
`lm.double()` and `lm.to(device)` give it other storage, and `p.data.copy_(...)` changes what is there without the
counter that autograd keeps. Views of weights are valid as long as the storage is the same one; results computed with
weights are valid as long as their bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

RECORDERS = (
    "transformers.utils.output_capturing"  # left in place by every forward pass that asked for router logits
)


def storage_key(model: nn.Module) -> tuple[list[object], list[object]]:
    """Dependencies of views of the weights: objects to compare by identity, and facts to compare by value."""
    objects: list[object] = []
    facts: list[object] = [getattr(getattr(model, "config", None), "_attn_implementation", None)]
    for module in model.modules():
        facts.append((type(module), has_hooks(module)))
    for tensor in chain(model.parameters(), model.buffers()):
        objects.append(tensor)
        facts.append((_plain(tensor) and tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape))
    return objects, facts


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its `forward`; hooks that only record outputs do not count."""
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != RECORDERS for hook in hooks)


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> int:
    """A number of the bits, types and places of tensors; it reads each once, about the cost of one decoded token."""
    sums = [
        (part.dtype, part.device, part.shape, part.contiguous().view(INTEGERS[part.element_size()]).sum())
        for tensor in tensors
        for part in _parts(tensor.detach())
    ]
    return hash(tuple((*facts, int(total)) for *facts, total in sums))


def fingerprint(model: nn.Module) -> object:
    """What tells a state of the weights from any other, for what was computed with it."""
    return storage_key(model)[1], checksum(chain(model.parameters(), model.buffers()))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: a quantised one is several."""
    for name in getattr(tensor, "tensor_data_names", None) or [None]:
        yield tensor if name is None else getattr(tensor, name)


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
