"""A model without its shared expert: each routed expert takes it in, and is cut into two that are chosen together.

Stock engines run mixtures of experts without a shared one (Qwen3-MoE), so a model that has one cannot be exported to
them. Here a routed expert of width W and the shared one of width S become two experts of (S + W) / 2, whose rows in the
router are equal: where one is chosen, so is the other, and together they compute what both did. One thing differs: a
routed expert's weight varied with the token, and is now its mean. A short training mends that, and the two of a pair
grow apart. Sparse upcycling (arXiv 2212.05055) makes experts from a dense layer in the same spirit.
"""

import copy

import torch
from torch import Tensor, nn

from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import AnyTokenMoE
from anytoken.utils.errors import CheckpointError


@torch.no_grad()
def without_shared_expert(lm: AnyTokenForCausalLM, samples: list[Tensor]) -> AnyTokenForCausalLM:
    """A copy with twice as many experts, two chosen per token, none shared; `lm` is unchanged.

    samples: ids [T] of typical sequences, at least one: they tell the mean weight of each expert. CheckpointError for
    a model without a shared expert, with more than one choice per token, expert groups or null experts, or odd widths.
    """
    config = lm.config
    shared, width = config.shared_expert_intermediate_size, config.moe_intermediate_size
    plain = not config.expert_groups and not config.num_null_experts and not config.expert_bias
    if (
        not shared
        or config.num_experts_per_tok != 1
        or config.norm_topk_prob
        or not plain
        or (shared % 2 or width % 2)
    ):
        raise CheckpointError(
            "Only a model with a shared expert of even width and one routed expert per token, without groups, "
            f"null experts or bias, can do without the shared one; received {shared} shared units and "
            f"{config.num_experts_per_tok} experts per token."
        )
    weights = _mean_weights(lm, samples)
    made = copy.deepcopy(config)
    made.num_experts, made.num_experts_per_tok, made.norm_topk_prob = 2 * config.num_experts, 2, True
    made.moe_intermediate_size, made.shared_expert_intermediate_size = (shared + width) // 2, 0
    new = AnyTokenForCausalLM(made).to(lm.device, lm.dtype)
    kept = {name: one for name, one in lm.state_dict().items() if ".mlp." not in name}
    new.load_state_dict(kept, strict=False)
    for before, after, weight in zip(_mixtures(lm), _mixtures(new), weights, strict=True):
        _split(before, after, weight)
    return new.train(lm.training)


def _mean_weights(lm: AnyTokenForCausalLM, samples: list[Tensor]) -> list[Tensor]:
    """Mean weight of each expert over the tokens that chose it, by layer: float32 [E]; 1 / 2 where none did."""
    sums = [torch.zeros(2, lm.config.num_experts, device=lm.device) for _ in _mixtures(lm)]
    hooks = []
    for total, mixture in zip(sums, _mixtures(lm), strict=True):

        def add(
            _: nn.Module, __: object, routed: tuple[Tensor, Tensor, Tensor], total: Tensor = total
        ) -> None:
            weight, choice = routed[1:]
            total[0].index_add_(0, choice[:, 0], weight[:, 0].float())
            total[1].index_add_(0, choice[:, 0], torch.ones_like(weight[:, 0], dtype=torch.float32))

        hooks.append(mixture.gate.register_forward_hook(add))
    try:
        for ids in samples:
            lm.model(input_ids=ids[None].to(lm.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.where(total[1] > 0, total[0] / total[1].clamp(min=1), 0.5) for total in sums]


def _mixtures(lm: AnyTokenForCausalLM) -> list[AnyTokenMoE]:
    return [module for module in lm.modules() if isinstance(module, AnyTokenMoE)]


def _split(before: AnyTokenMoE, after: AnyTokenMoE, weights: Tensor) -> None:
    """Write a layer's experts into those of the new one, two for each."""
    shared = before.shared_expert
    assert shared is not None
    after.gate.weight.copy_(before.gate.weight.repeat_interleave(2, 0))
    for expert, weight in enumerate(weights.tolist()):
        gate, up = before.experts.gate_up_proj[expert].chunk(2)
        down = before.experts.down_proj[expert] * weight
        for half in range(2):
            place = 2 * expert + half
            rows = [_half(shared.gate_proj.weight, gate, half, 0), _half(shared.up_proj.weight, up, half, 0)]
            after.experts.gate_up_proj[place] = torch.cat(rows)
            # Each weighs 1 / 2.
            after.experts.down_proj[place] = 2 * _half(shared.down_proj.weight, down, half, 1)


def _half(shared: Tensor, own: Tensor, half: int, dim: int) -> Tensor:
    return torch.cat([shared.chunk(2, dim)[half], own.chunk(2, dim)[half]], dim)
