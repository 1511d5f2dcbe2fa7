"""Devices and threads: choosing a device, limiting threads, and constants cached on a device."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch

from anytoken.utils.errors import TokenizerError
from anytoken.utils.hints import nearest


def usable_device(device: str | torch.device) -> torch.device:
    """A device by name; "auto" uses CUDA if available. TokenizerError for one that cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        names = ("auto", "cpu", "cuda", "mps")
        hint = "" if str(device).split(":")[0] in names else nearest(device, names)
        reason = "" if hint else f": {str(error).splitlines()[0]}"
        raise TokenizerError(
            f"device {str(device)!r} is not usable here{hint}{reason}. Use 'auto' or 'cpu'."
        ) from error
    return chosen


def constant(
    values: Sequence[int] | Sequence[Sequence[bool]], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Constant values as a tensor on a device, created once; do not write to it.

    Copying them again would synchronize with the device.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, device=device, dtype=dtype)
    return _constant(tuple(tuple(one) if isinstance(one, Sequence) else one for one in values), device, dtype)


@lru_cache(maxsize=256)
def _constant(values: tuple[object, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # one that is made for inference would be refused in training
        return torch.tensor(values, device=device, dtype=dtype)


def sent(values: Sequence[object], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as a new tensor on a device; for a GPU through pinned memory, without synchronization."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


def device_name(device: torch.device) -> str:
    """The make of a GPU, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


@contextmanager
def math_threads(count: int) -> Iterator[None]:
    """A context in which torch uses this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
