"""stages/merge_shared_expert.py: the same where a routed expert's weight is its mean, near it elsewhere."""

import runpy
from pathlib import Path

import pytest
import torch

from anytoken.model import AnyTokenConfig, AnyTokenForCausalLM
from anytoken.model.moe import AnyTokenMoE
from anytoken.utils.errors import CheckpointError

PROGRAM = runpy.run_path(str(Path(__file__).parents[2] / "stages" / "merge_shared_expert.py"))
_split, without_shared_expert = PROGRAM["_split"], PROGRAM["without_shared_expert"]


def made(**settings: object) -> AnyTokenForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 1,
        "norm_topk_prob": False, "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    lm = AnyTokenForCausalLM(AnyTokenConfig(**config | settings)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(std=0.2)
    return lm


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 60, (50,), generator=torch.Generator().manual_seed(seed))


def test_a_layer_computes_the_same_where_weights_are_constant() -> None:
    """Tokens that differ in nothing that the router reads: every weight is its mean, so nothing is lost."""
    lm = made()
    new = without_shared_expert(lm, [ids(0)])
    for expert in range(4):
        before, after = lm.model.layers[0].mlp, new.model.layers[0].mlp
        states = torch.randn(20, 32)
        states[:, 0] = 1.0
        with torch.no_grad():
            before.gate.weight.zero_()
            before.gate.weight[expert, 0] = 2.0
            weight = before.gate(states)[1].mean()
            _split(before, after, torch.full((4,), float(weight)))
            torch.testing.assert_close(after(states[None]), before(states[None]), rtol=1e-4, atol=1e-5)
            assert (after.gate(states)[2].sort().values == torch.tensor([2 * expert, 2 * expert + 1])).all()


def test_a_model_computes_nearly_the_same_and_is_unchanged() -> None:
    lm = made()
    expected = lm(ids(1)[None]).logits
    new = without_shared_expert(lm, [ids(seed) for seed in range(8)])
    found = new(ids(1)[None]).logits
    assert (found - expected).norm() / expected.norm() < 0.3
    halved = without_shared_expert(lm, [ids(0)])
    with torch.no_grad():
        for module in halved.modules():
            if isinstance(module, AnyTokenMoE):
                module.experts.down_proj *= 0.5
    worse = halved(ids(1)[None]).logits
    assert (worse - expected).norm() > 1.5 * (found - expected).norm()
    assert torch.equal(lm(ids(1)[None]).logits, expected)
    assert new.config.num_experts == 8 and new.config.shared_expert_intermediate_size == 0
    assert sum(one.numel() for one in new.parameters()) > sum(one.numel() for one in lm.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"shared_expert_intermediate_size": 0}, {"num_experts_per_tok": 2}, {"norm_topk_prob": True},
        {"num_null_experts": 1}, {"shared_expert_intermediate_size": 15},
    ],
)  # fmt: skip
def test_other_models_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="shared expert of even width"):
        without_shared_expert(made(**settings), [ids(0)])
