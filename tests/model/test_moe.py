"""Router losses on cases whose value is known."""

import pytest
import torch

from anytoken.model.moe import router_losses


def test_even_routing_costs_one_and_collapse_costs_the_number_of_experts() -> None:
    even = torch.eye(4).repeat(5, 1) * 1e-3
    collapsed = torch.tensor([[9.0, 0, 0, 0]]).repeat(20, 1)
    balance, z_loss = router_losses([even, even], top_k=1)
    assert balance.item() == pytest.approx(1.0, abs=1e-3)
    assert z_loss.item() == pytest.approx(torch.logsumexp(even, 1).square().mean().item())
    assert router_losses([collapsed], top_k=1)[0].item() == pytest.approx(4.0, abs=0.01)
