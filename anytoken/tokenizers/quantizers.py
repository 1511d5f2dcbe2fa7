"""Vector quantisers behind one result type; the quantising itself is vector-quantize-pytorch's.

The library's classes differ in what they return and in the names of their lookups. Everything here sees
`Quantized(vectors, codes, loss)` and `lookup(codes)`, so the quantiser is one line of a recipe.
Sources: finite scalar quantisation (arXiv 2309.15505), VQ-VAE (1711.00937) with exponential moving averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, VectorQuantize

from anytoken.tokenizers.base import TokenizerError

KINDS = ("fsq", "vq")


@dataclass
class Quantized:
    """`vectors` [B, N, D] with straight-through gradients, `codes` int64 [B, N], `loss` a scalar."""

    vectors: Tensor
    codes: Tensor
    loss: Tensor


class Quantizer(nn.Module):
    """One codebook over vectors of width `dim`.

    kind "fsq": `levels` per latent dimension, codebook size their product, no auxiliary loss, no dead codes by
    collapse. kind "vq": `codebook_size` learned vectors (k-means start, EMA updates, dead codes replaced).
    """

    def __init__(
        self,
        dim: int,
        kind: str = "fsq",
        levels: Sequence[int] = (8, 5, 5, 5),
        codebook_size: int = 1024,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise TokenizerError(f"Unknown quantizer {kind!r}; allowed: {', '.join(KINDS)}.")
        self.kind = kind
        if kind == "fsq":
            self.inner: Any = FSQ(levels=list(levels), dim=dim)
            self.codebook_size = int(self.inner.codebook_size)
        else:
            # Without k-means and dead-code replacement most codes are never used (measured: 296 of 1,024).
            self.inner = VectorQuantize(
                dim, codebook_size=codebook_size, kmeans_init=True, threshold_ema_dead_code=2, decay=0.95
            )
            self.codebook_size = codebook_size

    def forward(self, x: Tensor) -> Quantized:
        """Quantise x [B, N, D]."""
        if self.kind == "fsq":
            vectors, codes = self.inner(x)
            return Quantized(vectors, codes.long(), x.new_zeros(()))
        vectors, codes, loss = self.inner(x)
        return Quantized(vectors, codes.long(), loss.sum())

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of codes [...]."""
        if self.kind == "fsq":
            return self.inner.indices_to_codes(codes)
        return self.inner.get_output_from_indices(codes)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """All vectors [K, D]."""
        device = next(self.parameters(), torch.empty(0)).device
        return self.lookup(torch.arange(self.codebook_size, device=device)[None])[0]
