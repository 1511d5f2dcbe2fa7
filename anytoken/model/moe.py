"""Mixture-of-experts layers that know what kind of token they read.

Qwen3-MoE's routed experts with a float32 router, an optional shared expert every token passes (DeepSeekMoE,
arXiv 2401.06066), and optional expert groups: a token may route only to the common group and to its own
modality's group (one expert a group and no common one are the modality FFNs of mPLUG-2, 2302.00402, and
ONE-PEACE, 2305.11172). Null experts compute nothing: choosing one is how a token takes fewer (AdaMoE, 2406.13233).
The load is kept even by a loss, over all tokens or within each modality, or by a bias without one (2408.15664).

Shapes: T tokens, H hidden, E experts, C choices (experts, then null experts), K choices a token, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP, Qwen3MoeTopKRouter

from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.cpu_experts import cpu_experts
from anytoken.utils.autocast import in_float32
from anytoken.utils.device import constant
from anytoken.utils.distributed import sum_over_processes


class AnyTokenRouter(Qwen3MoeTopKRouter):
    """Diff with Qwen3-MoE: float32, jitter, experts closed by modality, null experts, and the balancing bias."""

    expert_bias: Tensor | None
    load: Tensor | None

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__(config)
        self.jitter = config.router_jitter_noise
        self.num_choices = config.num_experts + config.num_null_experts
        self.weight = nn.Parameter(torch.zeros(self.num_choices, config.hidden_size))
        self.register_buffer("expert_bias", None)
        self.register_buffer("load", None, persistent=False)
        if config.expert_bias:
            self.add_bias()

    def add_bias(self) -> None:
        """Choose by probability plus bias from now on; the bias starts at zero, and the load is counted."""
        self.expert_bias = self.weight.new_zeros(self.num_choices, dtype=torch.float32)
        self.load = self.weight.new_zeros(self.num_choices, dtype=torch.long)

    def forward(
        self, hidden_states: Tensor, expert_mask: Tensor | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [T, H], expert_mask bool [T, C] to logits [T, C], weights [T, K], choices [T, K].

        A closed expert has the logit minus infinity, a null expert the weight zero. real: bool [T], which tokens count
        for the load; the others are padding.
        """
        states = hidden_states.float()
        if self.training and self.jitter:
            states = states * torch.empty_like(states).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(states.device.type, enabled=False):  # or it would cast both to bfloat16 again
            logits = F.linear(states, self.weight.float())
        if expert_mask is not None:
            logits = logits.masked_fill(~expert_mask, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.expert_bias is None:
            weights, choices = torch.topk(probabilities, self.top_k, dim=-1)
        else:
            choices = self._biased_choices(probabilities, expert_mask, real)
            weights = probabilities.gather(-1, choices)
        if self.num_choices > self.num_experts:
            weights = weights * (choices < self.num_experts)
        if self.norm_topk_prob:
            # All null: nothing to share out.
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        return logits, weights.to(hidden_states.dtype), choices

    @torch.no_grad()
    def _biased_choices(
        self, probabilities: Tensor, expert_mask: Tensor | None, real: Tensor | None
    ) -> Tensor:
        """The bias decides who is chosen, never how much they count; choices [T, K], counted in training."""
        assert self.expert_bias is not None and self.load is not None
        scores = probabilities + self.expert_bias
        if expert_mask is not None:
            scores = scores.masked_fill(~expert_mask, float("-inf"))
        choices = torch.topk(scores, self.top_k, dim=-1).indices
        if self.training:
            ones = torch.ones_like(choices) if real is None else real[:, None].expand_as(choices).long()
            self.load.index_add_(0, choices.flatten(), ones.flatten())
        return choices

    @torch.no_grad()
    def update_bias(self, rate: float, groups: Tensor, num_groups: int | None = None) -> None:
        """Raise the bias of the less and lower that of the more loaded experts by `rate`, within each group.

        groups: int64 [C]; num_groups: how many there are, so that the device need not be asked. Counts of all processes
        are summed; then counting starts over.
        """
        assert self.expert_bias is not None and self.load is not None
        load, member = (sum_over_processes(self.load).float(), _one_hot(groups, num_groups))  # [C], [C, G]
        mean = member @ ((load @ member) / member.sum(0))
        self.expert_bias += rate * torch.sign(mean - load)
        self.load.zero_()


@use_experts_implementation
class _Experts(Qwen3MoeExperts):
    """Qwen3-MoE's experts; decorated again because transformers looks for the decorator next to the model.

    Diff with Qwen3-MoE: `load_state_dict` also takes the one-by-one names experts are saved under. transformers'
    Trainer loads a checkpoint that way when it resumes or takes the best model, and would leave the experts out.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        width = self.intermediate_dim
        for fused, name, rows in (
            ("gate_up_proj", "gate_proj", slice(0, width)),
            ("gate_up_proj", "up_proj", slice(width, 2 * width)),
            ("down_proj", "down_proj", slice(None)),
        ):
            keys = [f"{prefix}{expert}.{name}.weight" for expert in range(self.num_experts)]
            given = {expert: state_dict.pop(key) for expert, key in enumerate(keys) if key in state_dict}
            if not given:
                continue
            # A shard may hold some of the experts only: the others keep the values they have.
            whole = state_dict.setdefault(prefix + fused, getattr(self, fused).detach().clone())
            for expert, weight in given.items():
                part = whole[expert, rows]
                if part.shape == weight.shape:
                    part.copy_(weight)
                else:
                    error_msgs.append(
                        f"size mismatch for {keys[expert]}: {tuple(weight.shape)} in the checkpoint, "
                        f"{tuple(part.shape)} in the model."
                    )
            missing_keys += [key for expert, key in enumerate(keys) if expert not in given]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _InDtype:
    """Experts with their weights in another dtype, as autocast gives them to a linear layer; the rest is theirs."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self.experts = experts
        self.gate_up_proj, self.down_proj = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


class AnyTokenExperts(_Experts):
    """Diff with Qwen3-MoE: autocast reaches the experts' products too.

    PyTorch has grouped products not among what autocast casts, so float32 weights would be multiplied in float32; on a
    GPU by a loop over the experts that waits for the device.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], choices and weights [T, K] to [T, H]."""
        device = hidden_states.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        dtype = torch.get_autocast_dtype(device)
        if device == "cpu" and self.config.hidden_act == "silu":
            return self._on_cpu(hidden_states, top_k_index, top_k_weights, dtype)
        experts: Any = _InDtype(self, dtype)
        return _Experts.forward(experts, hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))

    @torch.compiler.disable  # the sizes of its products are only known when it runs
    def _on_cpu(self, states: Tensor, choices: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        return cpu_experts(states, self.gate_up_proj, self.down_proj, choices, weights, dtype)


PLAIN_LOOP = unwrap(_Experts.forward)


def run_experts(experts: AnyTokenExperts, hidden_states: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
    """The chosen experts' weighted sum [T, H] by the implementation in use; float64, which grouped products lack, by
    the plain loop."""
    if hidden_states.dtype == torch.float64:
        return PLAIN_LOOP(experts, hidden_states, choices, weights)
    return experts(hidden_states, choices, weights)


class AnyTokenMoE(nn.Module):
    """Routed experts, plus the shared expert if the configuration has one."""

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__()
        self.gate = AnyTokenRouter(config)
        self.experts = AnyTokenExperts(config)
        # Null choices are given to the experts as index E, which transformers then skips, as for experts that live on
        # another device.
        self.experts._is_expert_parallel = config.num_null_experts > 0
        width = config.shared_expert_intermediate_size
        self.shared_expert = Qwen3MoeMLP(config, intermediate_size=width) if width else None

    def route(
        self, flat: Tensor, expert_mask: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the router says; apart, so that compiled layers can leave it out (`training/step.py`)."""
        return self.gate(flat, expert_mask, real)

    def forward(
        self, hidden_states: Tensor, expert_mask: Tensor | None = None, real: Tensor | None = None
    ) -> Tensor:
        """hidden_states [B, T, H] to the same shape; expert_mask and real as for the router."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, choices = self.route(flat, expert_mask, real)
        routed = run_experts(self.experts, flat, choices.clamp(max=self.gate.num_experts), weights)
        routed = routed.view_as(hidden_states)
        return routed if self.shared_expert is None else routed + self.shared_expert(hidden_states)


def choice_groups(config: AnyTokenConfig) -> list[str]:
    """The group of every choice [C]: the experts in the order common, then modalities; null experts are common."""
    groups = config.expert_groups or {"common": config.num_experts}
    names = ["common", *(config.modality_names or [])]  # not the dict's order: config.json sorts its keys
    owner = [name for name in names for _ in range(groups.get(name, 0))]
    return owner + ["common"] * config.num_null_experts


def group_mask(config: AnyTokenConfig, device: torch.device | None = None) -> Tensor | None:
    """Which choices are open to which modality: bool [M, C] on a device (the CPU), or None without groups."""
    if not config.expert_groups:
        return None
    assert config.modality_names
    groups = choice_groups(config)
    table = [[group in ("common", name) for group in groups] for name in config.modality_names]
    return constant(table, device or torch.device("cpu"), torch.bool)


@dataclass
class RouterLosses:
    """Scalars, each the mean over layers; `modality_balance` is the mean over the modalities there are."""

    balance: Tensor
    modality_balance: Tensor
    z: Tensor


@in_float32
def router_losses(
    router_logits: Sequence[Tensor],
    choices: Sequence[Tensor],
    modality: Tensor | None = None,
    num_modalities: int | None = None,
    across: bool = False,
    real: Tensor | None = None,
) -> RouterLosses:
    """Load-balance losses (Switch, arXiv 2101.03961) and router z-loss (ST-MoE, 2202.08906).

    router_logits: per layer [T, C], minus infinity where closed; choices: per layer [T, K]; modality: int64 [T], all
    zero by default; real: bool [T], which tokens count (the others are padding). A balance is 1 when tokens and
    probability spread evenly over the experts that are open. across: of the tokens of all processes, which must all
    call this, with num_modalities (default: those seen).
    """
    reduce = sum_over_processes if across else lambda value: value
    if modality is None:
        modality = torch.zeros(len(router_logits[0]), dtype=torch.long, device=router_logits[0].device)
        num_modalities = num_modalities or 1
    members = _one_hot(modality, num_modalities)
    members = members if real is None else members * real[:, None]
    sums, z_sums = [], []
    for logits, chosen in zip(router_logits, choices, strict=True):
        probabilities = logits.float().softmax(-1)
        share = torch.zeros_like(probabilities).scatter(-1, chosen, 1 / chosen.shape[-1])
        sums.append(torch.stack([members.T @ probabilities, members.T @ share]))
        z = torch.logsumexp(logits.float(), -1).square()
        z_sums.append((z if real is None else z * real).sum())
    count, each, z_loss = reduce(members.sum(0)), reduce(torch.stack(sums)), reduce(torch.stack(z_sums))
    return RouterLosses(
        _balance(each.sum(2, keepdim=True), count.sum()[None]),
        _balance(each, count),
        z_loss.mean() / count.sum(),
    )


def _one_hot(index: Tensor, count: int | None) -> Tensor:
    """Indices [T] as rows of one 1, float32 [T, count]; without a count, the device is asked for it."""
    if count is None:
        count = int(index.max()) + 1
    return (index[:, None] == torch.arange(count, device=index.device)).float()


def _balance(sums: Tensor, count: Tensor) -> Tensor:
    """Sums of probability and of share per layer [L, 2, M, C], over this many tokens [M], to the mean balance.

    The mean is over layers and the groups that have tokens.
    """
    mean, share = (sums / count.clamp(min=1)[:, None]).unbind(1)
    each = (mean > 0).sum(-1) * (mean * share).sum(-1)  # [L, M]
    return each.sum(-1).mean() / (count > 0).sum()


@dataclass
class ExpertUse:
    """How a group of tokens uses the experts.

    load: share of its routings that each expert gets, float32 [E]. entropy: of the load among the routings that
    reach an expert, from 0 (one expert) to 1 (all alike). dropped: share of its routings that reach no expert, but
    a null one.
    """

    load: Tensor
    entropy: float
    dropped: float


def expert_counts(
    choices: Sequence[Tensor], groups: Tensor, num_groups: int, num_experts: int, real: Tensor | None = None
) -> Tensor:
    """How often the tokens of each group chose each expert, and in the last column a null one: float32 [G, E + 1].

    choices: per layer [T, K], summed over; groups: int64 [T], the group of each token; real: bool [T], which tokens
    count. The host waits for nothing here, as it would for `bincount`.
    """
    width = num_experts + 1
    counts = torch.zeros(num_groups * width, dtype=torch.long, device=groups.device)
    for chosen in choices:
        cell = chosen.clamp(max=num_experts) + groups[:, None] * width
        ones = torch.ones_like(cell) if real is None else real[:, None].expand_as(cell).long()
        counts.index_add_(0, cell.flatten(), ones.flatten())
    return counts.float().reshape(num_groups, width)


def expert_use(counts: Tensor, names: Sequence[str]) -> dict[str, ExpertUse]:
    """`expert_counts` [G, E + 1] by the names of the groups that have tokens."""
    found = {}
    for name, row in zip(names, counts.cpu(), strict=True):
        if row.any():
            shares = row / row.sum()
            reached = shares[:-1] / shares[:-1].sum().clamp(min=1e-9)
            entropy = torch.special.entr(reached).sum() / math.log(max(len(reached), 2))
            found[name] = ExpertUse(shares[:-1], entropy.item(), shares[-1].item())
    return found
