"""The model of contrastive training: a language model and an embedding head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anytoken.model.embedding_head import EmbeddingHead, Pooled, pool, read_states
from anytoken.training.contrastive import Side
from anytoken.training.feature_cache import FeatureCache
from anytoken.training.grad_cache import Columns
from anytoken.training.lora import LanguageModel

Chunk = tuple[Tensor, Tensor]  # ids [n, T], lengths [n]


class PairEncoder(nn.Module):
    """A language model and an embedding head: prompts to features, and features to vectors."""

    def __init__(
        self, lm: LanguageModel, head: EmbeddingHead, table: Tensor, tokenwise: bool = False
    ) -> None:
        super().__init__()
        self.lm, self.head, self.tokenwise = lm, head, tokenwise
        self.register_buffer("table", table, persistent=False)
        self.cache: FeatureCache | None = None
        # Whether the language model has nothing to train; asked often, and its parameters are many.
        self.frozen = not any(one.requires_grad for one in lm.parameters())

    table: Tensor

    def train(self, mode: bool = True) -> PairEncoder:
        """As for any module, but a frozen model stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.lm.eval()
        return self

    def forward(self, ids: Tensor, lengths: Tensor) -> Columns:
        """Features of ids [n, T]: `Pooled`, and for token-wise similarity states [n, T, H] and modality [n, T]."""
        states, modality = read_states(self.lm, ids), self.table[ids]
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        pooled = pool(states, modality, lengths, len(self.head.modalities))
        return (*pooled, states, modality.where(inside, -1)) if self.tokenwise else tuple(pooled)

    def features(self, chunk: Chunk) -> Columns:
        """`forward`, or the cached features of a frozen model."""
        if not self.frozen or self.cache is None:
            return self(*chunk)
        with torch.no_grad():
            return self.cache(self, *chunk)

    def feature_bytes(self, length: int) -> int:
        """Bytes of the features of a prompt with this number of ids."""
        hidden, kinds = self.head.hidden_size, len(self.head.modalities)
        pooled = 4 * (kinds * hidden + kinds + hidden)
        return pooled + length * (4 * hidden + 8) if self.tokenwise else pooled

    def side(self, columns: Columns) -> Side:
        """Vectors of features."""
        tokens = self.head.token_vectors(columns[3], columns[4]) if self.tokenwise else None
        return Side(self.head(Pooled(*columns[:3])), tokens)
