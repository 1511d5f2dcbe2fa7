"""Settings of the language model: Qwen3-MoE's, and what AnyToken adds to them.

The additions default to "off", so that a plain configuration is a Qwen3-MoE and its weights are too.
"""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig


class ModelConfigError(ValueError):
    """Settings that contradict each other."""


@strict
class AnyTokenConfig(Qwen3MoeConfig):
    """Qwen3-MoE's settings with small defaults, and:

    shared_expert_intermediate_size: width of a dense expert every token passes (0: none).
    expert_groups: experts a group, such as {"common": 2, "image": 2}; a token may route to the common group and to
        its own modality's. Experts lie in the order common, then `modality_names`. None or {} lets every token
        route to every expert.
    modality_boundaries, modality_index: the token space's ranges; an id's modality is
        ``modality_index[bucketize(id, modality_boundaries, right=True)]``.
    modality_names: names by that index; 0 is text.
    router_z_loss_coef, output_z_loss_coef: weights of the z-losses (ST-MoE, arXiv 2202.08906) when labels are given.
    """

    model_type = "anytoken"

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    moe_intermediate_size: int = 384
    num_experts: int = 4
    num_experts_per_tok: int = 1
    router_aux_loss_coef: float = 0.01
    shared_expert_intermediate_size: int = 0
    expert_groups: dict[str, int] | None = None
    modality_boundaries: list[int] | None = None
    modality_index: list[int] | None = None
    modality_names: list[str] | None = None
    router_z_loss_coef: float = 1e-3
    output_z_loss_coef: float = 1e-4

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]
        super().__post_init__(**kwargs)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ModelConfigError(
                f"num_experts_per_tok must be from 1 to num_experts={self.num_experts}; got {self.num_experts_per_tok}."
            )
        if self.expert_groups:
            self._check_groups(self.expert_groups)

    def _check_groups(self, groups: dict[str, int]) -> None:
        if sum(groups.values()) != self.num_experts or min(groups.values()) < 1:
            raise ModelConfigError(f"expert_groups {groups} must add up to num_experts={self.num_experts}.")
        if not self.modality_names or not self.modality_boundaries or not self.modality_index:
            raise ModelConfigError(
                "expert_groups needs modality_names, modality_boundaries and modality_index."
            )
        unknown = set(groups) - {"common", *self.modality_names}
        if unknown:
            raise ModelConfigError(
                f"expert_groups names {', '.join(sorted(unknown))}; allowed: common, {', '.join(self.modality_names)}."
            )
        for name in self.modality_names:
            room = groups.get("common", 0) + groups.get(name, 0)
            if room < self.num_experts_per_tok:
                raise ModelConfigError(
                    f"{name} tokens may use {room} experts (common and their own group) "
                    f"but num_experts_per_tok={self.num_experts_per_tok}."
                )
