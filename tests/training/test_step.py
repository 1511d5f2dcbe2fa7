"""The step of training: what a packed batch comes to."""

from types import SimpleNamespace

import pytest
import torch

from anytoken.grammar import Grammar
from anytoken.model import AnyTokenConfig, AnyTokenForCausalLM
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeSequence
from anytoken.training.config import MoeSpec
from anytoken.training.losses.balanced import BalancedLoss
from anytoken.training.step import ModelWithLoss


@pytest.fixture
def step() -> SimpleNamespace:
    """A tiny model with its loss and with routing losses that weigh as much as all else."""
    space = TokenSpace(40)
    space.append_modality("beep", [7], CodeSequence(1, 9))
    torch.manual_seed(0)
    config = AnyTokenConfig.from_token_space(
        space, hidden_size=16, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, expert_bias=True,
    )  # fmt: skip
    moe = MoeSpec(router_aux_loss=1, router_modality_aux_loss=1, router_z_loss=1)
    model = ModelWithLoss(AnyTokenForCausalLM(config), BalancedLoss(Grammar(space)), moe).train()
    return SimpleNamespace(model=model, pad=space.pad)


def test_the_padded_end_of_a_row_counts_in_nothing(step: SimpleNamespace) -> None:
    ids = torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for padding in (0, 50):
        for layer in step.model.lm.model.layers:
            layer.mlp.gate.load.zero_()
        padded = torch.nn.functional.pad(ids, (0, padding), value=step.pad)
        positions = torch.cat([torch.arange(12), torch.arange(padding)])[None]
        output = step.model(padded, positions, torch.arange(11), ids[0, 1:])
        loads = [layer.mlp.gate.load.clone() for layer in step.model.lm.model.layers]
        found.append((output["loss"].detach(), output["parts"].terms, output["load"], loads))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0][2].sum() == 12 * 2 * 2
