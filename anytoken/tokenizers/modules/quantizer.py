"""Vector quantizers with a common interface, around those of vector-quantize-pytorch.

That library's classes differ in what they return, in the names of their lookups and in where the codebooks are.
Here all of them have `Quantized(vectors, codes, loss)`, `lookup(codes)` and `codebook(n)`, so the quantizer is one line
of a recipe: `quantizer: vq`, or `quantizer: {kind: vq, residual: 4, groups: 2}`.

    fsq     finite scalar quantization (arXiv 2309.15505)       simvq   a linear map of frozen vectors (2411.02038)
    vq      VQ-VAE (1711.00937), exponential moving averages    lfq     signs, look-up free (2310.05737)
    cosine  unit vectors (2110.04627)                           both vq pass gradients by rotation (2410.06424)

Residual: each codebook quantizes the residual of the previous ones (SoundStream, 2107.03312); with `dropout` the
decoder also learns to use only the first ones, so that one set of weights serves several rates. Groups: the channels
are split into this number of parts, each with its own codebooks (HiFi-Codec, 2305.02765).
Shapes: N positions, Q codebooks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import (
    FSQ,
    LFQ,
    ResidualFSQ,
    ResidualLFQ,
    ResidualSimVQ,
    ResidualVQ,
    SimVQ,
    VectorQuantize,
)

from anytoken import moved
from anytoken.tokenizers.base import TokenizerError
from anytoken.utils.hints import choices

# Without k-means and dead-code replacement most codes are never used (measured: 296 of 1,024).
_EMA = {"kmeans_init": True, "threshold_ema_dead_code": 2, "decay": 0.95}
_OF_LEARNED = {"code_dim": "codebook_dim"} | {k: k for k in ("decay", "threshold_ema_dead_code")}
_CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # kind: class, residual form, arguments of both
    "fsq": (FSQ, ResidualFSQ, {}),
    "vq": (VectorQuantize, ResidualVQ, _EMA),
    "cosine": (VectorQuantize, ResidualVQ, {**_EMA, "use_cosine_sim": True, "rotation_trick": True}),
    "simvq": (SimVQ, ResidualSimVQ, {}),
    "lfq": (LFQ, ResidualLFQ, {}),
}
KINDS, LEARNED = tuple(_CLASSES), ("vq", "cosine")
BEAM = 8  # sums of residual codebooks that `nearest` follows up
QuantizerConfig = str | Mapping[str, Any]


def _counts(*values: Any, least: int = 1) -> bool:
    """Whether all are whole numbers and at least this large; a recipe may contain anything."""
    return all(isinstance(one, int) and one >= least for one in values)


@dataclass
class Quantized:
    """`vectors` [B, N, D] with straight-through gradients, `codes` int64 [B, N, Q], `loss` a scalar."""

    vectors: Tensor
    codes: Tensor
    loss: Tensor


class Quantizer(nn.Module):
    """Q codebooks of `codebook_size` codes over vectors of width `dim`; Q is 1 unless residual or groups say more.

    choice: a kind, or a mapping with its "kind" and any of
        residual, groups        number of codebooks; 1 each
        codebook_pattern        order of several codebooks in a sequence: "flatten" or "delay"
        dropout                 residual only: train at every depth
        num_active_codebooks    residual only: use only the first of the codebooks trained with dropout
        code_dim                vq, cosine: width of the codebook's own space (2110.04627); `dim`
        decay                   vq, cosine: decay of the moving averages
        threshold_ema_dead_code vq, cosine: mean count per step below which a code is replaced
    "fsq" has `levels` per latent dimension, its codebook size is their product and it has no loss; the others have
    `codebook_size` codes ("lfq": a power of two). A learned codebook is the same on all ranks of a data-parallel run if
    the tokenizer is built after the process group. TokenizerError for an invalid choice.
    """

    def __init__(
        self,
        dim: int,
        choice: QuantizerConfig = "fsq",
        levels: Sequence[int] = (8, 5, 5, 5),
        codebook_size: int = 1024,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = (
            {"kind": choice} if isinstance(choice, str) else moved.current_settings(choice or {})
        )
        self.kind: str = settings.pop("kind", "")
        self.residual: int = settings.pop("residual", 1)
        self.groups: int = settings.pop("groups", 1)
        self.order: str = settings.pop("codebook_pattern", "flatten")
        self.num_active: int = settings.pop("num_active_codebooks", self.residual)
        dropout = settings.pop("dropout", False)
        if self.kind not in KINDS:
            raise TokenizerError(f"Unknown quantizer {self.kind!r}{choices(self.kind, KINDS)}.")
        learned = {
            name: settings.pop(k) for k, name in _OF_LEARNED.items() if k in settings and self.kind in LEARNED
        }
        whole = [self.residual, self.groups, learned.get("codebook_dim", 1)]
        if settings or not _counts(*whole) or dim % self.groups:
            raise TokenizerError(
                "A quantizer is a kind, or {kind, residual, groups, codebook_pattern, dropout, num_active_codebooks} "
                f"with at least 1 each and groups that divide the width {dim}, and for "
                f"{' and '.join(LEARNED)} also {', '.join(_OF_LEARNED)}; received {choice!r}."
            )
        self._check(choice, dropout, levels, codebook_size)
        size = {"levels": list(levels)} if self.kind == "fsq" else {"codebook_size": codebook_size}
        if dropout and self.residual > 1:
            learned["quantize_dropout"] = True
        parts = [self._part(dim // self.groups, {**size, **learned}) for _ in range(self.groups)]
        self.inner: Any = parts[0] if self.groups == 1 else nn.ModuleList(parts)
        self.codebook_size = math.prod(levels) if self.kind == "fsq" else codebook_size
        self.num_codebooks = self.num_active * self.groups

    def _check(
        self, choice: QuantizerConfig, dropout: bool, levels: Sequence[int], codebook_size: int
    ) -> None:
        if not 1 <= self.num_active <= self.residual or (self.num_active < self.residual and not dropout):
            raise TokenizerError(
                f"num_active_codebooks is 1 to residual ({self.residual}), and less only with dropout; received "
                f"{choice!r}."
            )
        if self.kind == "fsq" and (not levels or not _counts(*levels, least=2)):
            raise TokenizerError(
                f"fsq needs levels of at least 2 each, such as [8, 5, 5, 5]; received {levels!r}."
            )
        if not _counts(codebook_size, least=2) or (self.kind == "lfq" and codebook_size.bit_count() != 1):
            raise TokenizerError(
                f"codebook_size is at least 2, and for lfq a power of two; received {codebook_size!r}."
            )

    def _part(self, dim: int, size: dict[str, Any]) -> Any:
        single, residual, settings = _CLASSES[self.kind]
        if self.residual == 1:
            return single(dim=dim, **{**settings, **size})
        return residual(dim=dim, num_quantizers=self.residual, **{**settings, **size})

    @property
    def codebook_sizes(self) -> list[int]:
        """The size of each codebook, as a tokenizer declares them."""
        return [self.codebook_size] * self.num_codebooks

    def _parts(self) -> list[Any]:
        return [self.inner] if self.groups == 1 else list(self.inner)

    def forward(self, x: Tensor) -> Quantized:
        """Quantize x [B, N, D], in float32: lower precision cannot resolve distances to near codes.

        When training with dropout, dropped codebooks have the code -1.
        """
        with torch.autocast(x.device.type, enabled=False):
            chunks = x.float().chunk(self.groups, -1)
            found = [part(one) for part, one in zip(self._parts(), chunks, strict=True)]
        codes = torch.cat(
            [one[1].reshape(*x.shape[:-1], self.residual)[..., : self._used] for one in found], -1
        )
        # A residual form has one loss a codebook, fsq none.
        losses = [one[2].sum() for one in found if len(one) > 2]
        loss = torch.stack(losses).sum() if losses else x.new_zeros(())
        vectors = (
            torch.cat([one[0] for one in found], -1) if self._used == self.residual else self.lookup(codes)
        )
        return Quantized(vectors, codes.long(), loss)

    @property
    def _used(self) -> int:
        """Codebooks of each group in use: all during training, so that all are trained."""
        return self.residual if self.training else self.num_active

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors [B, N, D] of codes [B, N, Q]."""
        chunks = codes.chunk(self.groups, -1)
        return torch.cat([self._lookup(*pair) for pair in zip(self._parts(), chunks, strict=True)], -1)

    def _lookup(self, part: Any, codes: Tensor) -> Tensor:
        if self.residual > 1:
            return part.get_output_from_indices(codes)
        find = part.get_output_from_indices if isinstance(part, VectorQuantize) else part.indices_to_codes
        return find(codes[..., 0])

    @torch.no_grad()
    def nearest(self, x: Tensor, count: int) -> Tensor:
        """The `count` choices [B, N, count, Q] whose vectors are nearest to x [B, N, D], nearest first.

        For a learned codebook, or residual ones of "vq": a beam search, which also finds better sums than choosing one
        code after the other.
        """
        left = self.inner.project_in(x.float())
        if self.kind == "cosine":
            left = torch.nn.functional.normalize(left, dim=-1)
        left = left[:, :, None]
        books = [self.inner.codebook] if self.residual == 1 else [*self.inner.codebooks[: self.num_active]]
        found = torch.empty(*left.shape[:3], 0, dtype=torch.long, device=x.device)
        for number, book in enumerate(books, 1):
            distance = torch.cdist(left.flatten(1, 2), book.expand(len(x), -1, -1)).unflatten(
                1, left.shape[1:3]
            )
            width = count if number == len(books) else min(max(count, BEAM), len(book))
            best = distance.flatten(2).topk(width, largest=False).indices
            row, code = (best // len(book))[..., None], best % len(book)
            found = torch.cat([found.gather(2, row.expand(-1, -1, -1, number - 1)), code[..., None]], -1)
            left = left.gather(2, row.expand(-1, -1, -1, left.shape[-1])) - book[code]
        return found

    @torch.no_grad()
    def codebook(self, number: int = 0) -> Tensor:
        """All vectors [K, D] of one codebook; those of a residual one are in the space in which they are summed."""
        part, depth = self._parts()[number // self.num_active], number % self.num_active
        device = next((one.device for one in [*self.parameters(), *self.buffers()]), None)
        codes = torch.arange(self.codebook_size, device=device)[None, :, None].expand(1, -1, self.residual)
        if self.residual == 1:
            return self._lookup(part, codes)[0]
        return part.get_codes_from_indices(codes)[depth, 0]
