"""What is documented as float32 is float32 under autocast too: the same numbers as without it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.moe import AnyTokenRouter, router_losses
from anytoken.tokenizers.losses.audio import (
    cepstral_loss,
    envelope_loss,
    log_mel,
    perceptual_distance,
    spectral_loss,
)
from anytoken.tokenizers.losses.image import pixel_loss, psnr_loss

LOSSES = {
    "pixel": (pixel_loss, (2, 3, 16, 16)),
    "psnr": (psnr_loss, (2, 3, 16, 16)),
    "spectral": (spectral_loss, (2, 16_000)),
    "envelope": (envelope_loss, (2, 16_000)),
    "cepstral": (cepstral_loss, (2, 16_000)),
    "apart": (perceptual_distance, (2, 40, 30)),
    "bands": (lambda one, other: log_mel(one), (2, 16_000)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loss: Callable[[Tensor, Tensor], Tensor]
    loss, shape = LOSSES[name]
    values = [torch.randn(shape).mul(0.1).to(dtype).requires_grad_() for _ in range(2)]
    plain = [value.detach().float().requires_grad_() for value in values]
    wanted = loss(*plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*values)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    assert plain[0].grad is not None and plain[0].grad.any()
    assert torch.equal(values[0].grad, plain[0].grad.to(dtype))


def test_the_router_chooses_as_in_float32() -> None:
    torch.manual_seed(0)
    router = AnyTokenRouter(AnyTokenConfig(hidden_size=32, num_experts=8, num_experts_per_tok=2))
    torch.nn.init.normal_(router.weight)
    states, modality = torch.randn(500, 32), torch.arange(500) % 3
    logits, weights, choices = router(states)
    losses = router_losses([logits], [choices], modality)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(states)
        balance = router_losses([logits], [choices], modality)
    assert torch.equal(found[0], logits) and torch.equal(found[1], weights) and torch.equal(found[2], choices)
    assert balance == losses
