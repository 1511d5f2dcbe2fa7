"""AnyTokenForCausalLM: one decoder-only language model over text ids and codes alike.

Qwen3-MoE (pre-norm RMSNorm, RoPE, grouped-query attention, QK-norm, SwiGLU experts; arXiv 2505.09388) with the
layers of `moe.py`. QK-norm and the z-losses are what keeps early-fusion training from diverging (Chameleon,
2405.09818). Packed samples are given as restarting `position_ids` without a mask; anything that would let them
attend to each other is an error. Shapes: B batch, T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.initialization import normal_
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.moe import AnyTokenExperts, AnyTokenMoE, AnyTokenRouter, group_mask, router_losses

# Experts are saved one by one under Qwen3-MoE's names, which serving engines and converters expect.
register_checkpoint_conversion_mapping(
    "anytoken", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


class PackingError(ValueError):
    """Packed samples that would attend to each other."""


class AnyTokenDecoderLayer(Qwen3MoeDecoderLayer):
    """Diff with Qwen3-MoE: the MLP is told which experts are open to each token."""

    def __init__(self, config: AnyTokenConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = AnyTokenMoE(config)

    def forward(self, hidden_states: Tensor, open_experts: Tensor | None = None, **kwargs: Any) -> Tensor:
        """hidden_states [B, T, H] to the same shape."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), open_experts)


class AnyTokenPreTrainedModel(Qwen3MoePreTrainedModel):
    """Diff with Qwen3-MoE: its own configuration and layer classes."""

    config: AnyTokenConfig
    config_class = AnyTokenConfig
    _no_split_modules = ["AnyTokenDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(AnyTokenRouter, index=0),
        "hidden_states": AnyTokenDecoderLayer,
        "attentions": Qwen3MoeAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in this module; it is in moe.py

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AnyTokenExperts):
            normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, AnyTokenRouter):
            normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class AnyTokenModel(AnyTokenPreTrainedModel, Qwen3MoeModel):
    """The decoder: ids to hidden states."""

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(AnyTokenDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """input_ids [B, T] to last_hidden_state [B, T, H].

        Restarting `position_ids` mark packed samples, which never attend to each other. PackingError if a mask
        or a cache is given with them: either would silently let them.
        """
        if (
            position_ids is not None
            and kwargs.get("past_key_values") is None
            and is_packed(position_ids, attention_mask)
        ):
            if attention_mask is not None or use_cache:
                raise PackingError(
                    "position_ids restart, so the batch is packed: give no attention_mask and use_cache=False "
                    "(with either, samples would attend across their borders)."
                )
            use_cache = False
        if self.config.expert_groups:
            if input_ids is None:
                raise ValueError("Expert groups route by token id: give input_ids, not inputs_embeds.")
            mask = group_mask(self.config)
            assert mask is not None
            kwargs["open_experts"] = mask.to(input_ids.device)[self.modality_of(input_ids).flatten()]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )

    def modality_of(self, input_ids: Tensor) -> Tensor:
        """Index of each id's modality, same shape as `input_ids`; 0 is text and control ids."""
        boundaries = torch.tensor(self.config.modality_boundaries or [], device=input_ids.device)
        index = torch.tensor(self.config.modality_index or [0], device=input_ids.device)
        return index[torch.bucketize(input_ids, boundaries, right=True)]


class AnyTokenForCausalLM(AnyTokenPreTrainedModel, Qwen3MoeForCausalLM):
    """The decoder with a head over the whole token space."""

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__(config)
        self.model = AnyTokenModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """input_ids [B, T] to logits [B, T, V]; with labels, the loss: cross-entropy, load balance, z-losses.

        Other arguments as in transformers' causal language models.
        """
        routed = labels is not None or bool(output_router_logits)
        # labels are handled here: the parent would add its own load-balance loss to them
        output = super().forward(input_ids=input_ids, output_router_logits=routed, **kwargs)
        if labels is not None:
            config = self.config
            balance, router_z = router_losses(output.router_logits, config.num_experts_per_tok)
            output_z = torch.logsumexp(output.logits.float(), -1).square().mean()
            output.aux_loss = balance
            output.loss = (
                self.loss_function(output.logits, labels, config.vocab_size)
                + config.router_aux_loss_coef * balance
                + config.router_z_loss_coef * router_z
                + config.output_z_loss_coef * output_z
            )
        return output

    @torch.no_grad()
    def grow_vocabulary(self, new_size: int, init: Tensor | None = None) -> None:
        """Append rows to the embedding and the head; old rows stay bit-equal and a tied head stays tied.

        init: rows [new_size - old_size, H]; by default they are drawn like any other embedding row.
        ValueError if the vocabulary would shrink or `init` has another shape.
        """
        old_size = self.config.vocab_size
        shape = (new_size - old_size, self.config.hidden_size)
        if new_size < old_size:
            raise ValueError(f"The vocabulary has {old_size} rows and cannot shrink to {new_size}.")
        if init is not None and tuple(init.shape) != shape:
            raise ValueError(f"init must be rows of shape {shape}; received {tuple(init.shape)}.")
        if new_size == old_size:
            return
        self.resize_token_embeddings(new_size, mean_resizing=False)
        rows = init if init is not None else torch.randn(shape) * self.config.initializer_range
        for table in (self.get_input_embeddings().weight, self.get_output_embeddings().weight):
            table[old_size:] = rows.to(table)
        self.vocab_size = self.model.vocab_size = new_size

    @torch.no_grad()
    def expert_load(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Share of each modality's routings that each expert gets, over all layers: {modality: [E]}."""
        self.eval()
        output = self.model(input_ids=input_ids, use_cache=False, output_router_logits=True)
        modality = self.model.modality_of(input_ids).flatten()
        names = self.config.modality_names or [str(i) for i in range(int(modality.max()) + 1)]
        load = {}
        for index, name in enumerate(names):
            rows = modality == index
            if rows.any():
                top_k = self.config.num_experts_per_tok
                picked = torch.cat(
                    [logits[rows].topk(top_k).indices.flatten() for logits in output.router_logits]
                )
                load[name] = torch.bincount(picked, minlength=self.config.num_experts) / len(picked)
        return load

    def num_active_parameters(self) -> int:
        """Parameters that one token passes: all but the routed experts that it does not choose."""
        total = sum(parameter.numel() for parameter in self.parameters())
        routed = sum(
            p.numel()
            for m in self.modules()
            if isinstance(m, AnyTokenExperts)
            for p in m.parameters(recurse=False)
        )
        return (
            total
            - routed * (self.config.num_experts - self.config.num_experts_per_tok) // self.config.num_experts
        )


def is_packed(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether positions [B, T] restart within a row (left padding is not a restart)."""
    if position_ids.shape[-1] < 2 or torch.compiler.is_compiling() or position_ids.ndim != 2:
        return False
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[-1] != position_ids.shape[-1]:
            return False
        real = attention_mask.bool().expand_as(position_ids)
        restarts = restarts & real[:, 1:] & real[:, :-1]
    return bool(restarts.any())
