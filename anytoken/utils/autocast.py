"""Computations that stay in float32 under autocast."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
LOW = (torch.bfloat16, torch.float16)


def in_float32(function: Function) -> Function:
    """Switch autocast off within a function, and give it its 16-bit tensors in float32; wider ones are kept.

    Autocast casts the operands of matrix products, so calling ``.float()`` before one is not enough.
    """

    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        device = next(_tensors((*args, *kwargs.values()))).device.type
        with torch.autocast(device, enabled=False):
            return function(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})

    return cast(Function, inner)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value
