"""Experts on a CPU: the products of each expert's rows against a loop over tokens, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anytoken.model import cpu_experts
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.moe import AnyTokenExperts

EXPERTS, HIDDEN, WIDTH, TOKENS = 4, 32, 24, 30


def one_by_one(hidden: Tensor, gate_up: Tensor, down: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
    rows = []
    for token, chosen in enumerate(choices.tolist()):
        row = 0 * hidden[token]
        for rank, expert in enumerate(chosen):
            if expert < len(down):
                gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
                row = row + weights[token, rank] * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def arguments(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (TOKENS, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    return [torch.randn(shape, dtype=dtype).mul_(0.3).requires_grad_() for shape in shapes]


def routes(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weights, choices = torch.rand(TOKENS, EXPERTS, dtype=dtype).softmax(-1).topk(2)
    if case == "null choices":
        choices[:5, 1] = EXPERTS
    elif case == "an idle expert":
        choices = choices.clamp(max=EXPERTS - 2)
    elif case == "null choices only":
        choices[:] = EXPERTS
    return choices, weights.requires_grad_()


@pytest.mark.parametrize("case", ["all", "null choices", "an idle expert", "null choices only"])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_values_and_gradients_are_those_of_a_loop(
    case: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_experts, "ROWS", rows)
    given = arguments(torch.float64)
    choices, weights = routes(case, torch.float64)
    found = cpu_experts.cpu_experts(*given, choices, weights, torch.float64)
    expected = one_by_one(*given, choices, weights)
    slope = torch.randn_like(expected)
    inputs = [*given, weights]
    for one, other in zip(
        [found, *torch.autograd.grad((found * slope).sum(), inputs)],
        [
            expected,
            *torch.autograd.grad((expected * slope).sum(), inputs, allow_unused=True, materialize_grads=True),
        ],
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_products_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new shape costs more than the product itself, so that rows come in multiples of ROWS."""
    shapes, real = set(), torch.mm

    def watched(one: Tensor, other: Tensor, **options: Tensor) -> Tensor:
        shapes.add((tuple(one.shape), tuple(other.shape)))
        return real(one, other, **options)

    monkeypatch.setattr(torch, "mm", watched)
    given = arguments(torch.float32)
    for _ in range(20):
        choices, weights = routes("all", torch.float32)
        cpu_experts.cpu_experts(*given, choices, weights, torch.bfloat16).sum().backward()
    assert len(shapes) <= 6


def test_experts_follow_autocast_on_a_cpu() -> None:
    """bfloat16 within its rounding of float32; gradients are float32; without autocast nothing changes."""
    torch.manual_seed(0)
    experts = AnyTokenExperts(
        AnyTokenConfig(hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    )
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    states = torch.randn(12, 32)
    weights, choices = torch.rand(12, 4).softmax(-1).topk(2)
    exact = experts(states, choices, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(states, choices, weights)
    assert exact.dtype == torch.float32 and found.dtype == torch.bfloat16
    assert 0 < (found - exact).norm() / exact.norm() < 0.02
    found.float().sum().backward()
    assert all(one.grad.dtype == torch.float32 and one.grad.any() for one in experts.parameters())
