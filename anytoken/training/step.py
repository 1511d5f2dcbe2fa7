"""One training step's forward pass: a packed batch to its loss, and what the log says of it."""

from typing import Any

import torch
from torch import Tensor, nn

from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import expert_counts, router_losses
from anytoken.training.lora import LanguageModel, base_model, head_weight
from anytoken.training.losses import BalancedLoss, LossParts, full_log_probs, grammar_log_probs
from anytoken.training.stage import Stage


class ModelWithLoss(nn.Module):
    """A causal LM and its loss as one module, so that wrappers for many devices see the whole step."""

    def __init__(self, lm: LanguageModel, loss: BalancedLoss, stage: Stage) -> None:
        super().__init__()
        self.lm, self.loss, self.moe = lm, loss, stage.moe
        self.by_group = stage.harmonise_gradients
        self.routed = isinstance(base_model(lm), AnyTokenForCausalLM)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, loss_index: Tensor, targets: Tensor
    ) -> dict[str, Any]:
        """One packed batch (see ``packing.pack``) to {"loss", "parts", "load", "shares"}: see ``_shares``."""
        base = base_model(self.lm)
        asked = {"output_router_logits": True} if self.routed else {}
        outputs = base.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **asked)
        hidden = outputs.last_hidden_state.flatten(0, 1)[loss_index]
        flat = input_ids.flatten()
        parts: LossParts = self.loss(hidden, head_weight(base), targets, flat[loss_index])
        shares = self._shares(hidden, targets, flat[loss_index]) if self.by_group else []
        load = None
        if self.routed and outputs.router_choices:
            router = router_losses(outputs.router_logits, outputs.router_choices, outputs.modality)
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
            load = torch.stack([expert_counts([one], groups, *sizes) for one in outputs.router_choices])
        return {"loss": parts.loss, "parts": parts, "load": load, "shares": shares}

    def _shares(self, hidden: Tensor, targets: Tensor, previous: Tensor) -> list[Tensor]:
        """What each group of targets that is there adds to the loss, z-losses and router left out."""
        groups, head = self.loss.groups(targets, previous), head_weight(base_model(self.lm))
        present = torch.unique(groups)
        weights = torch.stack([(groups == one).sum() for one in present]).float()
        if self.loss.weights is not None:
            weights = self.loss.weights[present]
        shares = []
        for group, weight in zip(present, weights / weights.sum(), strict=True):
            where = groups == group
            score = grammar_log_probs if self.loss.grammar_restricted else full_log_probs
            rest = (self.loss.grammar,) if self.loss.grammar_restricted else ()
            shares.append(weight * score(hidden[where], head, targets[where], *rest)[0].mean())
        return shares
