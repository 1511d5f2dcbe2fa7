"""The convolutional trunk the image, speech and video tokenizers share: ConvNeXt blocks in 1, 2 or 3 dimensions.

Depthwise convolution mixes positions, a two-layer MLP mixes channels (ConvNeXt, arXiv 2201.03545; in 1-D the
body of Vocos, 2306.00814). Being convolutional it takes any size, and moving an object by whole patches moves
its codes. Inputs are patchified first: convolutions at full resolution are what makes CPU training slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvNeXtBlock(nn.Module):
    """Residual block on x [B, D, *space]; same shape out.

    causal: along the first axis of space, which is time, a position sees itself and what came before.
    """

    def __init__(self, width: int, kernel: Sequence[int], expansion: int = 3, causal: bool = False) -> None:
        super().__init__()
        kernel = tuple(kernel)
        padding = tuple(k // 2 for k in kernel)
        self.before = kernel[0] - 1 if causal else 0
        if causal:
            padding = (0, *padding[1:])
        self.mix = _CONV[len(kernel)](width, width, kernel, padding=padding, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width * expansion)
        self.down = nn.Linear(width * expansion, width)
        self.scale = nn.Parameter(torch.full((width,), 0.2))

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """x [B, D, *space] to the same shape; past: of a causal block, the `before` positions in time before x."""
        if past is not None:
            seen = torch.cat([past, x], 2)
        else:
            seen = F.pad(x, [0, 0] * (x.ndim - 3) + [self.before, 0]) if self.before else x
        y = self.mix(seen).movedim(1, -1)
        y = self.down(F.gelu(self.up(self.norm(y)))) * self.scale
        return x + y.movedim(-1, 1)


class Trunk(nn.Sequential):
    """`depth` ConvNeXt blocks of one width and kernel."""

    def __init__(
        self, width: int, depth: int, kernel: Sequence[int], expansion: int = 3, causal: bool = False
    ) -> None:
        super().__init__(*(ConvNeXtBlock(width, kernel, expansion, causal) for _ in range(depth)))

    def step(self, x: Tensor, past: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The next positions in time x [B, D, *space] of a causal trunk, and what to give as `past` with those after.

        Pieces in turn give what the whole gives at once. past: None at the start.
        """
        kept, blocks = [], list[Any](self)
        for row, block in enumerate(blocks):
            before = x.new_zeros(*x.shape[:2], block.before, *x.shape[3:]) if past is None else past[row]
            kept.append(torch.cat([before, x], 2)[:, :, -block.before :])
            x = block(x, before)
        return x, kept


class ChannelLinear(nn.Linear):
    """A linear layer over the channel axis of x [B, D, *space]."""

    def forward(self, input: Tensor) -> Tensor:
        """x [B, in, *space] to [B, out, *space]."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channel axis of x [B, D, *space]."""

    def forward(self, input: Tensor) -> Tensor:
        """x [B, D, *space] to the same shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Fold x [B, C, *space] into [B, C * prod(patch), *space / patch]; space must divide by patch."""
    b, c, *space = x.shape
    n = len(patch)
    shape = [b, c]
    for size, p in zip(space, patch, strict=True):
        shape += [size // p, p]
    cells, inner = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    grid = [size // p for size, p in zip(space, patch, strict=True)]
    return x.reshape(shape).permute(0, 1, *inner, *cells).reshape(b, -1, *grid)


def unpatchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: [B, C * prod(patch), *grid] to [B, C, *grid * patch]."""
    b, _, *grid = x.shape
    n = len(patch)
    y = x.reshape(b, -1, *patch, *grid)
    order = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
    return y.permute(0, 1, *order).reshape(b, y.shape[1], *(g * p for g, p in zip(grid, patch, strict=True)))


class Fold(nn.Module):
    """`patchify` as a layer."""

    def __init__(self, patch: Sequence[int]) -> None:
        super().__init__()
        self.patch = tuple(patch)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *space] to [B, C * prod(patch), *space / patch]."""
        return patchify(x, self.patch)


class Unfold(Fold):
    """`unpatchify` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C * prod(patch), *grid] to [B, C, *grid * patch]."""
        return unpatchify(x, self.patch)


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of one width, for x [B, inputs]."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    )
