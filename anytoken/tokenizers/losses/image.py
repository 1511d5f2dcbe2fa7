"""Reconstruction losses of images: pixels, features of the encoder, and a patch discriminator.

Pixel errors alone blur details whose position is uncertain. Feature losses capture edges and texture; they need no
downloaded network, since the encoder being trained provides the features (as in Larsen et al., arXiv 1512.09300). A
patch discriminator tells decoded images from real ones (PatchGAN, 1611.07004, in VQGAN, 2012.09841), with the hinge
loss. A recipe weights them: `loss: {pixel: 1, psnr: 0.1, feature: 0.1, adversarial: 0.05}`; terms that are not listed
have weight 0, and the default is pixel only.

Images are [B, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from anytoken import moved
from anytoken.utils.autocast import in_float32

TERMS = ("pixel", "psnr", "feature", "adversarial")


@in_float32
def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error for PSNR, absolute error for clean flat areas, and absolute error of gradients for edges.

    output, target: [..., H, W] in [-1, 1].
    """
    return 2.0 * F.mse_loss(output, target) + 0.5 * F.l1_loss(output, target) + 0.5 * _edges(output, target)


def _edges(output: Tensor, target: Tensor) -> Tensor:
    differences = [F.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (-1, -2)]
    return torch.stack(differences).sum()


@in_float32
def psnr_loss(output: Tensor, target: Tensor) -> Tensor:
    """The negative mean PSNR of images, in nats: images with small errors count as much as those with large ones."""
    return (output - target).square().flatten(1).mean(1).clamp_min(1e-5).log().mean()


def feature_loss(
    encoder: nn.Module, inputs: Callable[[Tensor], Tensor], output: Tensor, target: Tensor
) -> Tensor:
    """Squared distance of the encoder's features of both images; the gradient reaches the output, never the encoder.

    inputs: maps images to the encoder's input.
    """
    weights = {name: one.detach() for name, one in [*encoder.named_parameters(), *encoder.named_buffers()]}
    with torch.no_grad():
        wanted = encoder(inputs(target))
    return F.mse_loss(functional_call(encoder, weights, (inputs(output),)), wanted)


class PatchDiscriminator(nn.Sequential):
    """Scores [B, 1, H/4, W/4] of how real an image [B, 3, H, W] is around each position, over about 20 pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )

    def losses(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's loss, with the discriminator fixed; and the discriminator's loss, with the output fixed."""
        weights = {name: one.detach() for name, one in self.named_parameters()}
        generator_loss = -functional_call(self, weights, (output,)).mean()
        critic_loss = F.relu(1 - self(target)).mean() + F.relu(1 + self(output.detach())).mean()
        return generator_loss, critic_loss


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
