"""Noise on the codes that a model reads in training, so that it does not rely on every code of an input being exact.

Two recordings of one word share only some of their codes, and a model that generates reads its own mistakes. With
``context_noise`` a share of a modality's codes is replaced by random codes of the same codebook before the model reads
them. Targets stay as they are. The noise is that of reAR (arXiv 2510.04450), without its second loss.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anytoken.token_space import TokenSpace
from anytoken.utils.errors import ConfigError


class ContextNoise(nn.Module):
    """Replaces codes at random, each with the probability of its modality.

    shares: modality -> probability; ConfigError for a name that the token space lacks. Text, control ids and global
    codes are never replaced. A replacement is drawn uniformly from the code's own codebook, so the ids stay valid.
    """

    share: Tensor  # float32 [V]
    first: Tensor  # int64 [V], the first id of each code's codebook
    size: Tensor  # float32 [V]

    def __init__(self, space: TokenSpace, shares: Mapping[str, float]) -> None:
        super().__init__()
        unknown = set(shares) - set(space.modalities)
        if unknown:
            known = ", ".join(space.modalities)
            raise ConfigError(
                f"context_noise names {', '.join(sorted(unknown))}; the model's modalities are {known}"
            )
        share, size = torch.zeros(space.vocab_size), torch.ones(space.vocab_size)
        first = torch.arange(space.vocab_size)
        for name, probability in shares.items():
            for book in range(len(space.codebook_sizes(name))):
                span = space.code_range(name, book)
                ids = slice(span.start, span.stop)
                share[ids], first[ids], size[ids] = probability, span.start, len(span)
        for name, table in {"share": share, "first": first, "size": size}.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids, int64 [...], to ids of the same shape; unchanged outside training."""
        if not self.training:
            return ids
        other = self.first[ids] + (torch.rand(ids.shape, device=ids.device) * self.size[ids]).long()
        return torch.where(torch.rand(ids.shape, device=ids.device) < self.share[ids], other, ids)
