"""Choose codes by their reconstruction instead of by the nearest vector: analysis by synthesis.

A decoder sees each code in the context of its neighbors, so the nearest vector often does not give the best
reconstruction. As in speech coders (Schroeder and Atal, ICASSP 1985), the encoder decodes a few candidates for each
position and keeps the best one. This costs a few decodings, needs no training, and does not change the decoder.
Shapes: N positions, Q codebooks, C candidates for each position, the nearest first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anytoken import moved
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.modules.quantizer import LEARNED, Quantizer


def check_candidates(count: int, quantize: Quantizer) -> None:
    """TokenizerError unless this number of nearest codes can be tried when encoding."""
    learned = quantize.kind in LEARNED and quantize.groups == 1
    # Residual unit vectors are scaled before they are summed up.
    summed = quantize.residual == 1 or quantize.kind == "vq"
    most = quantize.codebook_size if learned and summed else 1
    if not isinstance(count, int) or not 1 <= count <= most:
        raise TokenizerError(
            f"num_candidates is 1, or up to the codebook's size with vq, or cosine of one codebook, without groups; "
            f"received {count!r} with a quantizer {quantize.kind} of {quantize.num_codebooks} codebooks of "
            f"{quantize.codebook_size}."
        )


def analysis_by_synthesis(
    choices: Tensor, turns: Tensor, error: Callable[[Tensor], Tensor], at_once: int = 1
) -> Tensor:
    """Select codes [B, N, Q] among choices [B, N, C, Q]: at each position the first, or one with a smaller error.

    turns [N]: positions with equal numbers are tried together, after those with smaller numbers are chosen; positions
    whose errors depend on each other need different numbers. error: maps trials [T, B, N, Q], at most `at_once` of
    them, to the error around each position [T, B, N].
    """
    codes = choices[:, :, 0]
    for turn in turns.unique():
        free = (turns == turn)[:, None]
        trials = torch.stack([torch.where(free, one, codes) for one in choices.unbind(2)])
        errors = torch.cat([error(some) for some in trials.split(at_once)])
        codes = trials.gather(0, errors.argmin(0)[None, ..., None].expand(1, *codes.shape))[0]
    return codes


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
