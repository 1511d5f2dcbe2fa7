"""Packed samples that cannot see each other, whichever attention runs; anything that would let them is an error.

Samples that lie in one row are marked by positions that restart. transformers keeps them apart only where it gets
no mask and no cache; with either, tokens silently attend across samples. Flash attention keeps them apart in a
single row, or with the `cu_seq_lens_*` of all rows. Valid input is let through, the rest is a DataError before
a number is computed. Compiled code cannot branch on values: there the same condition is an assertion of the graph,
a RuntimeError. Shapes: B batch, T tokens, S samples, C cached tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from anytoken.data.packing import flash_lengths, sample_starts
from anytoken.utils.errors import DataError

LEAK = (
    "position_ids restart, so samples are packed, and with an attention_mask or a cache they would attend to each "
    "other: give neither, and use_cache=False."
)


def keep_samples_apart(
    config: PretrainedConfig,
    rows: int,
    position_ids: Tensor | None,
    attention_mask: Any,
    use_cache: bool | None,
    kwargs: dict[str, Any],
) -> bool | None:
    """The `use_cache` to continue with; adds to `kwargs` the lengths that flash attention needs.

    rows: B. position_ids: [B, T] or [1, T]. attention_mask: [B, C + T], [B, 1, T, C + T], or None. Raises DataError
    if samples would attend to each other.
    """
    lengths = kwargs.get("cu_seq_lens_q")
    if position_ids is None:
        if lengths is not None:
            raise DataError(
                "cu_seq_lens_q without position_ids: only flash attention reads it. Give position_ids that restart."
            )
        return use_cache
    past = kwargs.get("past_key_values")
    if position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return use_cache  # a single token is no pack
    if getattr(past, "one_sample_a_row", False):
        return use_cache  # such a cache writes by position, and so cannot hold a pack
    positions = position_ids.expand(rows, -1)
    flash = is_flash_attention_requested(config)
    if attention_mask is not None or past is not None or use_cache:
        _refuse(_leaks(positions, attention_mask, past), LEAK)
    elif torch.compiler.is_compiling():
        use_cache = False  # no cache for a batch that may be packed
        if flash and lengths is None and rows > 1:
            _refuse(_restarts(positions), "Give cu_seq_lens_q/k and max_length_q/k with packed rows.")
    elif bool(_restarts(positions)):
        use_cache = False
        if flash and lengths is None:
            kwargs |= flash_lengths(positions)
    if lengths is not None:
        _refuse(
            ~_same_samples(positions, lengths), "cu_seq_lens_q and position_ids describe different samples."
        )
    return use_cache


def packed_mask(positions: Tensor, implementation: str = "sdpa") -> Tensor | None:
    """What may be attended to in packed rows, from their positions [B, T]: a mask [B, 1, T, T], bool for sdpa.

    For eager attention it is what is added to the scores, in the dtype they are computed in. None for other
    implementations, which find the samples themselves.
    """
    if implementation not in ("sdpa", "eager"):
        return None
    sample = sample_starts(positions).cumsum(1)
    same = (sample[:, :, None] == sample[:, None, :]).tril()[:, None]
    if implementation == "sdpa":
        return same
    device = positions.device.type
    low = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if low else torch.get_default_dtype()
    return torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill(~same, torch.finfo(dtype).min)


def _refuse(wrong: Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong, message)
    elif bool(wrong):
        raise DataError(message)


def _restarts(positions: Tensor) -> Tensor:
    """Whether any row [B, T] holds more than one sample, a 0-d bool."""
    return (positions[:, 1:] != positions[:, :-1] + 1).any()


def _leaks(positions: Tensor, mask: Any, past: Any) -> Tensor:
    """Whether a token would attend to another sample, given a mask or a cache; a 0-d bool."""
    if mask is not None and not isinstance(mask, Tensor):
        return _restarts(positions)  # a mask that cannot be read
    cached = 0 if past is None else past.get_seq_length()
    columns = cached + torch.arange(positions.shape[1], device=positions.device)
    if mask is None:
        real, earlier = torch.ones_like(positions, dtype=torch.bool), torch.as_tensor(cached)
    elif mask.ndim == 4:
        return _mask_leaks(positions, mask, columns)
    else:
        mask = mask.to(positions.device).bool()
        real = mask[:, columns.clamp(max=mask.shape[1] - 1)].expand_as(positions)
        earlier = (mask & (torch.arange(mask.shape[1], device=mask.device) < cached)).sum(1)
    anew = (positions == 0) & real & (real.cumsum(1) == 1)
    return _begins(positions, real).any() | (anew.any(1) & (earlier > 0)).any()


def _mask_leaks(positions: Tensor, mask: Tensor, columns: Tensor) -> Tensor:
    """The same among the new tokens, for a mask [B, 1, T, C + T], bool or additive, that says what attends to what."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    allowed = allowed.any(1)[..., columns.clamp(max=mask.shape[-1] - 1)].expand(len(positions), -1, -1)
    real = allowed.diagonal(dim1=1, dim2=2)
    sample = _begins(positions, real).cumsum(1)
    other = sample[:, :, None] != sample[:, None, :]
    return (allowed & other & real[:, :, None] & real[:, None, :]).any()


def _begins(positions: Tensor, real: Tensor) -> Tensor:
    """Which real tokens begin a sample that is not their row's first; all [B, T], tokens that are not real are padding.

    Within a sample, positions count real tokens or, padding too, columns; both are in use.
    """
    columns = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    last = columns.where(real, -1).cummax(1).values
    # The column of the real token before.
    before = torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], 1)
    step = positions - positions.gather(1, before.clamp(min=0))
    return real & (before >= 0) & (step != 1) & (step != columns - before)


def _same_samples(positions: Tensor, lengths: Tensor) -> Tensor:
    """Whether cumulative lengths [S + 1] cut the rows [B, T], laid end to end, where the positions restart."""
    starts = sample_starts(positions).flatten()
    cuts = torch.zeros_like(starts).index_fill(0, lengths[:-1].long().clamp(max=len(starts) - 1), True)
    return (cuts == starts).all() & (lengths[-1] == len(starts))
