"""A decoder in plain torch, in the style of nanochat: the cost of a dense step without library overhead.

The shape is that of Qwen3 in `gpu_train.py`. Rows are single causal sequences, whose sample borders are ignored, so
PyTorch's fastest attention kernel takes them; the loss is over the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config

ROPE_BASE = 10_000.0


class Layer(nn.Module):
    """Attention with rotary positions and normed queries and keys, then a gated MLP."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.head, self.inner = head, config.num_attention_heads * head
        kv = config.num_key_value_heads * head
        self.sizes = [self.inner, kv, kv]
        self.grouped = kv != self.inner
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.inner, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for size in (width, width, head, head))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """States [B, T, H] of the next layer."""
        first, second, norm_q, norm_k = self.norms
        parts = self.qkv(first(x)).split(self.sizes, -1)
        q, k, v = (one.unflatten(-1, (-1, self.head)).transpose(1, 2) for one in parts)
        q, k = rotated(norm_q(q), cos, sin), rotated(norm_k(k), cos, sin)
        mixed = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), is_causal=True, enable_gqa=self.grouped
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(second(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainModel(nn.Module):
    """A dense decoder with tied or separate embeddings; it returns the mean loss of the given targets."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        """As in transformers."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """As in transformers."""
        return self.head

    def forward(self, ids: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        """ids [B, T]; index: places of the flat rows whose next ids are `targets`."""
        x = self.embed(ids)
        half = self.config.head_dim // 2
        rates = ROPE_BASE ** (-torch.arange(half, device=ids.device) / half)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * rates
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x).flatten(0, 1)[index])
        return F.cross_entropy(logits.float(), targets)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, heads, T, D] at their places, of angles [T, D / 2]."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1).type_as(x)
