"""The full model in vLLM: an out-of-tree plugin, found by the entry point `vllm.general_plugins`.

vLLM runs models of transformers by its Transformers modelling backend: it builds the decoder with AutoModel, puts its
own attention, experts and parallel layers in, and calls it with all running sequences packed in one row. The rules
that a model must follow are documented by vLLM (supported models, "Writing custom models"; design, "Plugin system");
tests/model/test_vllm_plugin.py holds the model to them. vLLM is imported only when it calls `register`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import AutoModel

from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenModel
from anytoken.model.moe import AnyTokenRouter
from anytoken.utils.errors import ConfigError

ARCHITECTURE = "AnyTokenForCausalLM"
BACKEND = "vllm.model_executor.models.transformers:TransformersMoEForCausalLM"


def register() -> None:
    """Tell vLLM how to run our checkpoints; nothing where vLLM is absent. vLLM calls it in each of its processes."""
    if find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    AutoModel.register(AnyTokenConfig, ServedModel, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, BACKEND)


class ServedModel(AnyTokenModel):
    """The decoder as vLLM builds it; ConfigError for settings that its kernels would get wrong."""

    def __init__(self, config: AnyTokenConfig) -> None:
        check_servable(config)
        super().__init__(config)
        for module in self.modules():
            if config.expert_groups and isinstance(module, AnyTokenRouter):
                # vLLM replaces a router that is a weight, softmax and
                # top-k; one that holds anything else it leaves alone.
                module.register_buffer("grouped", torch.ones(1), persistent=False)

    def forward(  # type: ignore[override]  # vLLM calls by name
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As AnyTokenModel's; vLLM asks for these arguments by name in the signature."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


def check_servable(config: AnyTokenConfig) -> None:
    """ConfigError naming the settings that cannot be served through vLLM's backend."""
    reasons = {
        "num_null_experts": (config.num_null_experts, "its expert kernels take no choice of none"),
        "grid_positions": (
            config.grid_positions,
            "they depend on all earlier ids, and it hands over new ones",
        ),
        "qk_norm": (
            config.qk_norm == "projection",
            "tensor parallelism splits the heads it normalises together",
        ),
    }
    blocking = [f"{name}={getattr(config, name)!r} ({why})" for name, (on, why) in reasons.items() if on]
    if blocking:
        raise ConfigError(f"vLLM cannot serve this model: {'; '.join(blocking)}.")
