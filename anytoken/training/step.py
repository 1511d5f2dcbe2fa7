"""One training step's forward pass: a packed batch to its loss, and what the log says of it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from anytoken.data.packing import flash_lengths
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import expert_counts, router_losses
from anytoken.training.config import MoeSpec
from anytoken.training.lora import LanguageModel, base_model, head_weight
from anytoken.training.losses.balanced import BalancedLoss, LossParts
from anytoken.utils.distributed import sum_over_processes


class ModelWithLoss(nn.Module):
    """A causal LM and its loss as one module, so that wrappers for many devices see the whole step."""

    is_distributed_loading_by_transformers = (
        False  # what the Trainer asks: whether the weights lie apart, see `distributed/fsdp.py`
    )

    def __init__(self, lm: LanguageModel, loss: BalancedLoss, moe: MoeSpec, by_group: bool = False) -> None:
        super().__init__()
        self.lm, self.loss, self.moe, self.by_group = lm, loss, moe, by_group
        self.routed = isinstance(base_model(lm), AnyTokenForCausalLM)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, loss_index: Tensor, targets: Tensor
    ) -> dict[str, Any]:
        """One packed batch (see ``packing.pack``) to {"loss", "parts", "load", "shares"}.

        The batch is this process's rows of the global one, and the results are those of the global one.
        shares: by group of targets, what it adds to the loss, z-losses and router left out; empty unless asked for.
        """
        base = base_model(self.lm)
        flat = input_ids.flatten()
        real = flat != self.loss.grammar.token_space.pad  # the end of a row counts in no routing loss
        asked = {"output_router_logits": True, "real": real} if self.routed else {}
        outputs = base.base_model(input_ids=input_ids, **packed_inputs(base, position_ids), **asked)
        hidden = outputs.last_hidden_state.flatten(0, 1)[loss_index]
        learnt = hidden, head_weight(base), targets, flat[loss_index]
        parts: LossParts = self.loss(*learnt)
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
            groups = self.loss.table[flat[real]]
            sizes = len(self.loss.names), base.config.num_experts
            counts = [expert_counts([one[real]], groups, *sizes) for one in outputs.router_choices]
            load = sum_over_processes(torch.stack(counts))
        return {"loss": parts.loss, "parts": parts, "load": load, "shares": shares}


def packed_inputs(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """What any causal LM is given besides ids so that packed samples stay apart: see `model/packed_attention.py`."""
    lengths = flash_lengths(position_ids) if is_flash_attention_requested(model.config) else {}
    return {"position_ids": position_ids, "use_cache": False, **lengths}
