"""Mixture-of-experts layers that know what kind of token they read.

Qwen3-MoE's routed experts with a float32 router, an optional shared expert every token passes (DeepSeekMoE,
arXiv 2401.06066), and optional expert groups: a token may route only to the common group and to its own
modality's group (one expert a group and no common one are the modality FFNs of mPLUG-2, 2302.00402, and
ONE-PEACE, 2305.11172). Shapes: T tokens, H hidden, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP, Qwen3MoeTopKRouter

from anytoken.model.configuration import AnyTokenConfig


class AnyTokenRouter(Qwen3MoeTopKRouter):
    """Qwen3-MoE's router, computed in float32, with experts closed to a token by its modality."""

    def forward(
        self, hidden_states: Tensor, open_experts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [T, H], open_experts bool [T, E] to logits [T, E], weights [T, K], experts [T, K]."""
        logits = F.linear(hidden_states.float(), self.weight.float())
        if open_experts is not None:
            logits = logits.masked_fill(~open_experts, float("-inf"))
        weights, experts = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), experts


@use_experts_implementation
class AnyTokenExperts(Qwen3MoeExperts):
    """Qwen3-MoE's experts; decorated anew because transformers looks for the decorator beside the model."""


class AnyTokenMoE(nn.Module):
    """Routed experts, plus the shared expert if the configuration has one."""

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__()
        self.gate = AnyTokenRouter(config)
        self.experts = AnyTokenExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = Qwen3MoeMLP(config, intermediate_size=width) if width else None

    def forward(self, hidden_states: Tensor, open_experts: Tensor | None = None) -> Tensor:
        """hidden_states [B, T, H] to the same shape."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.gate(flat, open_experts)
        routed = self.experts(flat, experts, weights).view_as(hidden_states)
        return routed if self.shared_expert is None else routed + self.shared_expert(hidden_states)


def group_mask(config: AnyTokenConfig) -> Tensor | None:
    """Which experts are open to which modality: bool [modalities, E], or None without groups."""
    if not config.expert_groups:
        return None
    assert config.modality_names
    groups = ["common", *config.modality_names]  # not the dict's order: config.json is saved with sorted keys
    owner = [name for name in groups for _ in range(config.expert_groups.get(name, 0))]
    return torch.tensor([[group in ("common", name) for group in owner] for name in config.modality_names])


def router_losses(router_logits: Sequence[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """Load-balance loss (Switch, arXiv 2101.03961) and router z-loss (2202.08906), each the mean over layers.

    router_logits: per layer [T, E], minus infinity where an expert is closed to a token. The load-balance loss
    is 1 when tokens and probability spread evenly over the experts.
    """
    balance, z_loss = [], []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = (
            F.one_hot(logits.topk(top_k, dim=-1).indices, logits.shape[-1]).float().sum(1).mean(0) / top_k
        )
        balance.append(logits.shape[-1] * (chosen * probabilities.mean(0)).sum())
        z_loss.append(torch.logsumexp(logits.float(), -1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z_loss).mean()
