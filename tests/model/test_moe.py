"""Router losses and reports on cases whose value is known."""

import copy

import pytest
import torch

from anytoken.model import moe
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.moe import expert_counts, expert_use, router_losses

EVEN = torch.eye(4).repeat(5, 1) * 1e-3
COLLAPSED = torch.tensor([[9.0, 0, 0, 0]]).repeat(20, 1)


def test_even_routing_costs_one_and_collapse_costs_the_number_of_experts() -> None:
    losses = router_losses([EVEN, EVEN], [EVEN.topk(1).indices] * 2)
    assert losses.balance.item() == losses.modality_balance.item() == pytest.approx(1.0, abs=1e-3)
    assert losses.z.item() == pytest.approx(torch.logsumexp(EVEN, 1).square().mean().item())
    collapsed = router_losses([COLLAPSED], [COLLAPSED.topk(1).indices])
    assert collapsed.balance.item() == pytest.approx(4.0, abs=0.01)


def test_the_balance_within_modalities_sees_what_the_overall_one_does_not() -> None:
    """Each modality on an expert of its own is even overall, and collapsed within every modality."""
    logits = torch.eye(4).repeat_interleave(5, 0) * 9
    modality = torch.arange(4).repeat_interleave(5)
    losses = router_losses([logits], [logits.topk(1).indices], modality)
    assert losses.balance.item() == pytest.approx(1.0, abs=1e-3)
    assert losses.modality_balance.item() == pytest.approx(4.0, abs=0.02)


def test_closed_experts_are_no_part_of_an_even_load() -> None:
    """Two modalities that each use the two experts open to them evenly: as even as can be."""
    closed = float("-inf")
    logits = torch.tensor([[1e-3, 0, closed, closed], [0, 1e-3, closed, closed]]).repeat(3, 1)
    logits = torch.cat([logits, logits.flip(1)])
    modality = torch.tensor([0] * 6 + [2] * 6)  # nothing of modality 1
    losses = router_losses([logits], [logits.topk(1).indices], modality)
    assert losses.modality_balance.item() == pytest.approx(1.0, abs=1e-3)
    assert losses.z.isfinite()


def test_expert_use_counts_by_group() -> None:
    choices = [torch.tensor([[0], [1], [2], [2], [3]]), torch.tensor([[0], [1], [2], [4], [2]])]
    groups = torch.tensor([0, 0, 2, 2, 2])
    use = expert_use(expert_counts(choices, groups, 3, num_experts=3), ["text", "image", "dna"])
    assert list(use) == ["text", "dna"]
    assert use["text"].load.tolist() == [0.5, 0.5, 0] and use["text"].dropped == 0
    assert use["text"].entropy == pytest.approx(0.6309, abs=1e-4)  # log 2 / log 3
    assert use["dna"].entropy == 0 and use["dna"].dropped == pytest.approx(1 / 3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast_reaches_the_experts_of_a_gpu(implementation: str) -> None:
    """As it reaches a linear layer: the weights in bfloat16 give the same, and gradients are float32."""
    torch.manual_seed(0)
    config = AnyTokenConfig(
        hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        hidden_act="gelu",  # a CPU has another way for silu, see test_cpu_experts.py
    )  # fmt: skip
    config._experts_implementation = implementation
    experts = moe.AnyTokenExperts(config)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    low = copy.deepcopy(experts).to(torch.bfloat16)
    states = torch.randn(12, 32)
    weights, choices = torch.rand(12, 4).softmax(-1).topk(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(states, choices, weights)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, low(states.bfloat16(), choices, weights.bfloat16()), rtol=0, atol=0)
    found.float().sum().backward()
    assert all(one.grad.dtype == torch.float32 and one.grad.any() for one in experts.parameters())
    assert experts(states, choices, weights).dtype == torch.float32
