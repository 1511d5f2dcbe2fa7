"""Settings of the language model: those of Qwen3-MoE and AnyToken's additions.

The additions are off by default, so a plain configuration and its weights are a Qwen3-MoE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from anytoken.model.grid_positions import AXES, code_layout
from anytoken.utils.errors import ConfigError

if TYPE_CHECKING:
    from anytoken.token_space import TokenSpace


@strict
class AnyTokenConfig(Qwen3MoeConfig):
    """Qwen3-MoE's settings with small defaults, and:

    qk_norm: "head" normalizes queries and keys per head (Qwen3), "projection" all heads together (OLMoE), "none"
        not at all (Llama, Mistral).
    shared_expert_intermediate_size: width of a dense expert that every token uses (0: none).
    num_null_experts: experts that compute nothing, so that a token may use fewer than num_experts_per_tok
        (AdaMoE, arXiv 2406.13233).
    expert_groups: experts per group, such as {"common": 2, "image": 2}; a token may route to the common group and to
        its own modality's. The order of experts is common, then `modality_names`. With None or {} every token may
        route to every expert.
    modality_boundaries, modality_index: the token space's ranges; an id's modality is
        ``modality_index[bucketize(id, modality_boundaries, right=True)]``.
    modality_names: the name for each index; 0 is text.
    expert_bias: choose experts by probability plus a bias that `update_expert_bias` changes in training, to balance the
        load without a loss (arXiv 2408.15664).
    router_jitter_noise: in training, the router's input is multiplied by random numbers from 1 - noise to 1 + noise
        (Switch, arXiv 2101.03961).
    grid_positions: rows of the embeddings that say where the next code lies, such as {"row": 32, "column": 32, "step":
        256, "codebook": 8}, or some of these axes; None for none. No stock architecture has them, so a model with them
        cannot be exported.
    code_layout: how codes are written, from the token space; for grid_positions (see `model/grid_positions.py`).
    router_aux_loss_coef, router_modality_aux_loss_coef: weights of the load-balance loss over all tokens and within
        each modality, if labels are given.
    router_z_loss_coef, output_z_loss_coef: weights of the z-losses (ST-MoE, arXiv 2202.08906), if labels are given.
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
    qk_norm: Literal["head", "projection", "none"] = "head"
    shared_expert_intermediate_size: int = 0
    num_null_experts: int = 0
    expert_groups: dict[str, int] | None = None
    expert_bias: bool = False
    router_jitter_noise: float = 0.0
    modality_boundaries: list[int] | None = None
    modality_index: list[int] | None = None
    modality_names: list[str] | None = None
    grid_positions: dict[str, int] | None = None
    code_layout: dict[str, Any] | None = None
    router_modality_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 1e-3
    output_z_loss_coef: float = 1e-4

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]
        super().__post_init__(**kwargs)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok must be from 1 to num_experts={self.num_experts}; got {self.num_experts_per_tok}."
            )
        if self.num_null_experts < 0 or not 0 <= self.router_jitter_noise < 1:
            raise ConfigError(
                "num_null_experts must be at least 0 and router_jitter_noise from 0 to below 1; "
                f"got {self.num_null_experts} and {self.router_jitter_noise}."
            )
        if self.expert_groups:
            self._check_groups(self.expert_groups)
        if self.grid_positions is not None:
            self._check_grid(self.grid_positions)

    @classmethod
    def from_token_space(cls, space: TokenSpace, **settings: Any) -> AnyTokenConfig:
        """The configuration of a model for a token space: its ids from the space, the rest from `settings`."""
        if settings.get("grid_positions") is not None:
            settings = {"code_layout": code_layout(space), **settings}
        return cls(
            vocab_size=space.vocab_size,
            modality_boundaries=space.bucket_boundaries(),
            modality_index=space.bucket_modalities(),
            modality_names=space.modality_names,
            bos_token_id=space.bos,
            eos_token_id=space.end,
            pad_token_id=space.pad,
            **settings,
        )

    def _check_grid(self, sizes: dict[str, int]) -> None:
        if not sizes or set(sizes) - set(AXES) or min(sizes.values()) < 1:
            raise ConfigError(
                f"grid_positions has a size of at least 1 for some of {', '.join(AXES)}; got {sizes}. None switches "
                "them off."
            )
        if not self.code_layout or not self.code_layout.get("modalities"):
            raise ConfigError(
                "grid_positions needs the code_layout of a token space with modalities: make the configuration with "
                "AnyTokenConfig.from_token_space."
            )

    def _check_groups(self, groups: dict[str, int]) -> None:
        if sum(groups.values()) != self.num_experts or min(groups.values()) < 1:
            raise ConfigError(f"expert_groups {groups} must add up to num_experts={self.num_experts}.")
        if not self.modality_names or not self.modality_boundaries or not self.modality_index:
            raise ConfigError("expert_groups needs modality_names, modality_boundaries and modality_index.")
        unknown = set(groups) - {"common", *self.modality_names}
        if unknown:
            raise ConfigError(
                f"expert_groups names {', '.join(sorted(unknown))}; allowed: common, {', '.join(self.modality_names)}."
            )
        for name in self.modality_names:
            room = groups.get("common", 0) + groups.get(name, 0)
            if room < self.num_experts_per_tok:
                raise ConfigError(
                    f"{name} tokens may use {room} experts (common and their own group) "
                    f"but num_experts_per_tok={self.num_experts_per_tok}."
                )
