"""One training step's forward pass: a packed batch to its loss, and what the log says of it.

The host never waits for the device here: what it has to know (where samples begin, the classes of targets) is computed
before the batch is sent to the device (`with_layout`).
"""

import logging
import os
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from anytoken.data.packing import flash_lengths
from anytoken.grammar import Grammar
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import AnyTokenMoE, expert_counts, router_losses
from anytoken.processor import Processor
from anytoken.training.config import MoeSpec, TrainConfig
from anytoken.training.context_noise import ContextNoise
from anytoken.training.lora import LanguageModel, base_model, head_weight
from anytoken.training.losses.balanced import BalancedLoss, LossParts, TargetClasses
from anytoken.utils.distributed import sum_over_processes

WORTH_COMPILING = 1000  # steps; a minute of compilation, and a step is up to twice as fast
log = logging.getLogger(__name__)


def build_loss(stage: TrainConfig, processor: Processor) -> BalancedLoss:
    """The loss of a recipe over a processor's token space."""
    spec = stage.loss
    return BalancedLoss(
        processor.grammar, spec.modality_weights, spec.control_weight, spec.grammar_restricted, spec.z_loss
    )


class ModelWithLoss(nn.Module):
    """A causal LM and its loss as one module, so that wrappers for many devices see the whole step."""

    is_distributed_loading_by_transformers = (
        False  # what the Trainer asks: whether the weights lie apart, see `distributed/fsdp.py`
    )

    def __init__(
        self,
        lm: LanguageModel,
        loss: BalancedLoss,
        moe: MoeSpec,
        by_group: bool = False,
        noise: ContextNoise | None = None,
    ) -> None:
        super().__init__()
        self.lm, self.loss, self.moe, self.by_group, self.noise = lm, loss, moe, by_group, noise
        self.routed = isinstance(base_model(lm), AnyTokenForCausalLM)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        loss_index: Tensor,
        targets: Tensor,
        layout: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One packed batch (see ``packing.pack``) to {"loss", "parts", "load", "shares"}.

        layout: what ``with_layout`` adds to a batch; without it the device is asked.
        The batch is this process's rows of the global one, and the results are those of the global one.
        shares: by group of targets, what it adds to the loss, z-losses and router left out; empty unless asked for.
        """
        base = base_model(self.lm)
        flat = input_ids.flatten()
        real = flat != self.loss.grammar.token_space.pad  # the end of a row counts in no routing loss
        wanted = {"output_router_logits": True, "real": real} if self.routed else {}
        inputs = packed_inputs(base, position_ids, layout)
        read = input_ids if self.noise is None else self.noise(input_ids)
        outputs = base.base_model(input_ids=read, **inputs, **wanted)
        hidden = outputs.last_hidden_state.flatten(0, 1)[loss_index]
        learnt = hidden, head_weight(base), targets, flat[loss_index]
        classes = None if layout is None else TargetClasses(layout["order"], layout["counts"])
        parts: LossParts = self.loss(*learnt, classes)
        shares = self.loss.shares(*learnt) if self.by_group else []
        load = None
        if self.routed and outputs.router_choices:
            routed = outputs.router_logits, outputs.router_choices, outputs.modality
            modalities = None if outputs.modality is None else len(self.loss.names)
            router = router_losses(*routed, modalities, across=True, real=real)
            weight = self.moe
            parts.loss = (
                parts.loss
                + weight.router_aux_loss * router.balance
                + weight.router_modality_aux_loss * router.modality_balance
                + weight.router_z_loss * router.z
            )
            parts.terms |= {
                "load_balance": router.balance.detach(),
                "modality_load_balance": router.modality_balance.detach(),
                "router_z": router.z.detach(),
            }
            groups = self.loss.table[flat]
            sizes = len(self.loss.names), base.config.num_experts
            counts = [expert_counts([one], groups, *sizes, real) for one in outputs.router_choices]
            load = sum_over_processes(torch.stack(counts))
        return {"loss": parts.loss, "parts": parts, "load": load, "shares": shares}


def packed_inputs(
    model: PreTrainedModel, position_ids: Tensor, layout: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What any causal LM is given besides ids so that packed samples stay apart: see `model/packed_attention.py`."""
    inputs: dict[str, Any] = {"position_ids": position_ids, "use_cache": False}
    if is_flash_attention_requested(model.config):
        inputs |= flash_lengths(position_ids) if layout is None else _flash_lengths(layout)
    if layout is not None and isinstance(model, AnyTokenForCausalLM):
        inputs["packed"] = layout["packed"]
    return inputs


def _flash_lengths(layout: dict[str, Any]) -> dict[str, Any]:
    starts, longest = layout["starts"], layout["longest"]
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def with_layout(batch: dict[str, Tensor], grammar: Grammar) -> dict[str, Any]:
    """A packed batch on the CPU with ``layout``, what the host has to know of it before it is on the device.

    starts: where samples begin and the last one ends, int32 [S + 1]; longest: ids of the longest; packed: whether a row
    holds more than one; order and counts: of ``TargetClasses``.
    """
    lengths = flash_lengths(batch["position_ids"])
    starts = lengths["cu_seq_lens_q"]
    classes = TargetClasses.of(batch["targets"], grammar)
    layout = {
        "starts": starts, "longest": lengths["max_length_q"], "packed": len(starts) - 1 > len(batch["input_ids"]),
        "order": classes.order, "counts": classes.counts,
    }  # fmt: skip
    return {**batch, "layout": layout}


def worth_compiling(wanted: bool | str, steps: int, device: torch.device) -> bool:
    """What ``compile`` of a recipe means: "auto" compiles long runs where TorchInductor finds what it needs."""
    if wanted != "auto":
        return bool(wanted)
    if device.type == "cuda":
        available = find_spec("triton") is not None
    else:
        available = any(which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    chosen = available and steps >= WORTH_COMPILING
    log.info(
        "compile: %s; %d steps, %s", chosen, steps, "compiler found" if available else "no compiler found"
    )
    return chosen


def compile_layers(model: PreTrainedModel, **options: Any) -> None:
    """Compile each decoder layer in place with torch.compile, whose options these are.

    One graph serves all layers of a kind, so this takes a fraction of the time that the whole model would, and the
    loss, which branches on counts, stays outside. So do routers: transformers collects what they say in a list, and
    code compiled with that list would fit one layer only. Parameters and their names stay as they are.
    """
    for module in model.modules():
        if isinstance(module, AnyTokenMoE):
            module.route = torch.compiler.disable(module.route)  # type: ignore[method-assign]
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == model.config.num_hidden_layers:
            for layer in stack:
                layer.compile(**options)
