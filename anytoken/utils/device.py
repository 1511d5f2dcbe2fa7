"""What a tokenizer computes on: which device, and how many threads."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anytoken.utils.errors import TokenizerError
from anytoken.utils.hints import nearest


def usable_device(device: str | torch.device) -> torch.device:
    """A device by name; "auto" takes CUDA if it is there. TokenizerError for one that cannot be used."""
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


def device_name(device: torch.device) -> str:
    """The make of a GPU, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


@contextmanager
def math_threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads; after, on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
