"""AnyTokenForCausalLM: one decoder-only language model over text ids and codes.

Qwen3-MoE (pre-norm RMSNorm, RoPE, grouped-query attention, QK-norm, SwiGLU experts; arXiv 2505.09388) with the
layers of `moe.py`. QK-norm and the z-losses prevent early-fusion training from diverging (Chameleon, 2405.09818).
Packed samples are passed as restarting `position_ids` without a mask; anything that would let them attend to each
other is an error. Shapes: B batch, T tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.initialization import normal_, zeros_
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.grid_positions import GridPositions, PlaceEmbedding, code_places
from anytoken.model.moe import (
    AnyTokenExperts,
    AnyTokenMoE,
    AnyTokenRouter,
    ExpertUse,
    choice_groups,
    expert_counts,
    expert_use,
    group_mask,
    router_losses,
)
from anytoken.model.packed_attention import keep_samples_apart, packed_mask
from anytoken.utils.device import constant

# Experts are saved one by one under Qwen3-MoE's names, which serving engines and converters expect.
register_checkpoint_conversion_mapping(
    "anytoken", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


IGNORED = -100  # a label that is ignored in the loss


def real_tokens(attention_mask: Any, length: int) -> Tensor | None:
    """Which of the last `length` columns of a mask [B, C + T] are not padding, bool [B * T]; None without a mask."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:].bool().flatten()


@dataclass
class AnyTokenModelOutput(MoeModelOutputWithPast):
    """With `output_router_logits`, also the experts of each token, per layer [B * T, K], and its modality [B * T]."""

    router_choices: tuple[Tensor, ...] | None = None
    modality: Tensor | None = None


@dataclass
class AnyTokenOutput(MoeCausalLMOutputWithPast):
    """With `output_expert_use`, also the expert use of each modality in the batch."""

    expert_use: dict[str, ExpertUse] | None = None


class ProjectionNorm(Qwen3MoeRMSNorm):
    """RMSNorm over all heads together, as in OLMoE (arXiv 2409.02060): [..., heads, D] to the same shape."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last two dimensions together."""
        return super().forward(hidden_states.flatten(-2)).view_as(hidden_states)


class AnyTokenDecoderLayer(Qwen3MoeDecoderLayer):
    """Diff with Qwen3-MoE: QK-norm is a setting, and experts may be restricted per token."""

    mlp: nn.Module

    def __init__(self, config: AnyTokenConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        attention = self.self_attn
        if config.qk_norm == "none":
            attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
        elif config.qk_norm == "projection":
            attention.q_norm = ProjectionNorm(attention.q_proj.out_features, config.rms_norm_eps)
            attention.k_norm = ProjectionNorm(attention.k_proj.out_features, config.rms_norm_eps)
        if not isinstance(self.mlp, Qwen3MoeMLP):
            self.mlp = AnyTokenMoE(config)

    def forward(
        self,
        hidden_states: Tensor,
        expert_mask: Tensor | None = None,
        real: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, T, H] to the same shape."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        extra = {"expert_mask": expert_mask, "real": real} if isinstance(self.mlp, AnyTokenMoE) else {}
        return hidden_states + self.mlp(
            normed, **{name: one for name, one in extra.items() if one is not None}
        )


class AnyTokenPreTrainedModel(Qwen3MoePreTrainedModel):
    """Diff with Qwen3-MoE: its own configuration and layer classes."""

    config: AnyTokenConfig
    config_class = AnyTokenConfig
    _no_split_modules = ["AnyTokenDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(AnyTokenRouter, index=0),
        "router_choices": OutputRecorder(AnyTokenRouter, index=2),
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
            if module.expert_bias is not None:
                zeros_(module.expert_bias)
                zeros_(module.load)
        elif isinstance(module, PlaceEmbedding):
            zeros_(module.weight)


class AnyTokenModel(AnyTokenPreTrainedModel, Qwen3MoeModel):
    """The decoder: ids to hidden states."""

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(AnyTokenDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.grid_positions = GridPositions(config) if config.grid_positions else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        packed: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """input_ids [B, T] to last_hidden_state [B, T, H].

        packed: whether `position_ids` restart within a row, if known; otherwise this is computed, which synchronizes
        the device. real: bool [B * T], tokens that are not padding, without a mask; the balancing bias counts only
        these. code_places: int64 [B, T, 4], where next codes lie (see `grid_positions.py`); needed with grid positions
        and a cache that holds earlier ids, otherwise found. Restarting `position_ids` mark packed samples, which never
        attend to each other. DataError (compiled: a RuntimeError) if a mask or a cache is given with them, since either
        would silently allow it.
        """
        ids = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        rows = 1 if ids is None else len(ids)
        if (
            packed is not None
            and attention_mask is None
            and not use_cache
            and "past_key_values" not in kwargs
        ):
            use_cache = False
            if packed and position_ids is not None:  # the mask that transformers would make after asking
                attention_mask = packed_mask(position_ids, self.config._attn_implementation)
        else:
            use_cache = keep_samples_apart(self.config, rows, position_ids, attention_mask, use_cache, kwargs)
        modality = None
        if self.config.expert_groups or (output_router_logits and self.config.modality_boundaries):
            if input_ids is not None:
                modality = self.modality_of(input_ids).flatten()
            elif self.config.expert_groups:
                raise ValueError(
                    "Expert groups tell modalities by token id: give input_ids, not inputs_embeds."
                )
        mask = None if modality is None else group_mask(self.config, modality.device)
        if mask is not None:
            kwargs["expert_mask"] = mask[modality]
        if self.grid_positions is not None:
            kwargs["inputs_embeds"] = self._placed(input_ids, position_ids, kwargs)
            input_ids = None
        real = kwargs.pop("real", None)
        if self.training and self.config.expert_bias and ids is not None:
            kwargs["real"] = real_tokens(attention_mask, ids.shape[1]) if real is None else real
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_router_choices=output_router_logits,
            **kwargs,
        )
        return AnyTokenModelOutput(**output, modality=modality) if output_router_logits else output

    def _placed(
        self, input_ids: Tensor | None, position_ids: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Embeddings [B, T, H] of ids with those of where the next codes lie; takes `code_places` out of `kwargs`."""
        places, past = kwargs.pop("code_places", None), kwargs.get("past_key_values")
        if input_ids is None:
            raise ValueError("Grid positions are found by token id: give input_ids, not inputs_embeds.")
        if places is None:
            if past is not None and past.get_seq_length() > 0:
                raise ValueError(
                    "Grid positions depend on all earlier ids, and a cache does not hold them: give code_places, those "
                    "of the new ids (model.grid_positions.code_places of the whole sequence), or decode with generate."
                )
            places = code_places(self.config, input_ids, position_ids)
        assert self.grid_positions is not None
        return self.embed_tokens(input_ids) + self.grid_positions(places)

    def modality_of(self, input_ids: Tensor) -> Tensor:
        """Index of each id's modality, same shape as `input_ids`; 0 is text and control ids."""
        device = input_ids.device
        boundaries = constant(self.config.modality_boundaries or [], device, torch.long)
        index = constant(self.config.modality_index or [0], device, torch.long)
        return index[torch.bucketize(input_ids, boundaries, right=True)]


class AnyTokenForCausalLM(AnyTokenPreTrainedModel, Qwen3MoeForCausalLM):
    """The decoder with a head over the whole token space."""

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__(config)
        self.model = AnyTokenModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        output_expert_use: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> AnyTokenOutput:
        """input_ids [B, T] to logits [B, T, V]; with labels, the loss: cross-entropy, load balance, z-losses.

        num_items_in_batch: the number of targets in all micro-batches of a step, as in transformers' Trainer. The loss
        is then this micro-batch's part of their mean, so that the parts add up to the same value for any accumulation.
        Padding (0 in a 2-D attention_mask, -100 in labels) does not count in any term. output_expert_use: also return
        the expert use of each modality. Other arguments as in transformers' causal language models. ValueError for
        inputs_embeds if modalities must be known: expert groups, router_modality_aux_loss_coef, output_expert_use.
        """
        config = self.config
        # Not in the signature: transformers' Trainer takes every argument with "label" in its name for one that a
        # batch must hold, and evaluates without a loss where one is missing.
        shift_labels = kwargs.pop("shift_labels", None)
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        routed = labels is not None or output_router_logits or output_expert_use
        needs_ids = output_expert_use or (labels is not None and config.router_modality_aux_loss_coef > 0)
        if input_ids is None and config.modality_boundaries and needs_ids:
            raise ValueError(
                "Modalities are found by token id: give input_ids, not inputs_embeds, or leave output_expert_use out "
                "and set router_modality_aux_loss_coef to 0."
            )
        decoded = self.model(input_ids=input_ids, output_router_logits=routed, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(decoded.last_hidden_state[:, keep])
        output = AnyTokenOutput(
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            router_logits=decoded.router_logits,
        )
        real = real_tokens(kwargs.get("attention_mask"), decoded.last_hidden_state.shape[1])
        if labels is not None:
            shown = None if real is None else real.view(len(logits), -1)[:, keep]
            z = self._output_z(logits, shown)
            self._add_loss(output, decoded, labels, shift_labels, num_items_in_batch, real, z)
        if output_expert_use:
            output.expert_use = self._expert_use(decoded, real)
        return output

    @wraps(Qwen3MoeForCausalLM.prepare_inputs_for_generation, assigned=())  # generate checks the signature
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, with the places of the new ids' next codes where the model has grid positions."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self.config.grid_positions and inputs.get("input_ids") is not None:
            places = code_places(self.config, input_ids)
            inputs["code_places"] = places[:, -inputs["input_ids"].shape[1] :]
        return inputs

    def _add_loss(
        self,
        output: AnyTokenOutput,
        decoded: AnyTokenModelOutput,
        labels: Tensor,
        shift_labels: Tensor | None,
        num_items: Tensor | int | None,
        real: Tensor | None,
        output_z: Tensor,
    ) -> None:
        """Set `loss` and `aux_loss` of an output; arguments as for `forward`, real: bool [B * T]."""
        config, logits = self.config, output.logits
        targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shift_labels is None else shift_labels
        loss = self.loss_function(
            logits, labels, config.vocab_size, num_items_in_batch=num_items, shift_labels=targets.contiguous()
        )
        terms = config.output_z_loss_coef * output_z
        if decoded.router_logits:
            router = router_losses(
                decoded.router_logits, decoded.router_choices or (), decoded.modality, real=real
            )
            output.aux_loss = router.balance
            terms = (
                terms
                + config.router_aux_loss_coef * router.balance
                + config.router_modality_aux_loss_coef * router.modality_balance
                + config.router_z_loss_coef * router.z
            )
        if num_items is not None:
            terms = terms * ((targets != IGNORED).sum() / num_items).to(terms.device)
        output.loss = loss + terms

    @staticmethod
    def _output_z(logits: Tensor, real: Tensor | None) -> Tensor:
        """Mean square of the log-normaliser of logits [B, T, V] over real tokens [B, T]."""
        squares = torch.logsumexp(logits.float(), -1).square()
        return squares.mean() if real is None else (squares * real).sum() / real.sum().clamp(min=1)

    def _expert_use(self, decoded: AnyTokenModelOutput, real: Tensor | None) -> dict[str, ExpertUse]:
        """Expert use by modality name, without padding; only "text" without a token space."""
        names = self.config.modality_names or [
            "text" if index == 0 else f"modality {index}"
            for index in range(max(self.config.modality_index or [0]) + 1)
        ]
        choices = decoded.router_choices
        if not choices:
            return {}
        groups = decoded.modality if decoded.modality is not None else torch.zeros_like(choices[0][:, 0])
        counts = expert_counts(choices, groups, len(names), self.config.num_experts, real)
        return expert_use(counts, names)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts; routing losses and biases need them."""
        return bool(self._routers())

    def add_expert_bias(self) -> None:
        """Enable the balancing bias of the experts (`expert_bias` in the configuration)."""
        self.config.expert_bias = True
        for router in self._routers():
            if router.expert_bias is None:
                router.add_bias()

    def update_expert_bias(self, rate: float) -> None:
        """Update every router's bias against the load of the training forward passes since the last call.

        Call it after each optimizer step, in all processes; 0.001 is the paper's rate (arXiv 2408.15664).
        """
        names = choice_groups(self.config)
        order = sorted(set(names))
        groups = constant([order.index(name) for name in names], self.device, torch.long)
        for router in self._routers():
            router.update_bias(rate, groups, len(order))

    def _routers(self) -> list[AnyTokenRouter]:
        return [module for module in self.modules() if isinstance(module, AnyTokenRouter)]

    @torch.no_grad()
    def extend_vocabulary(self, new_size: int, init: Tensor | None = None) -> None:
        """Append rows to the embedding and the head; existing rows stay bit-identical and a tied head stays tied.

        init: rows [new_size - old_size, H]; by default initialized like any other embedding row.
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

    def num_active_parameters(self) -> int:
        """Parameters used per token: all except the routed experts that it does not choose."""
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
