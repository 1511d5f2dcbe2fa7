"""The convolutional trunk of the image, speech and video tokenizers: ConvNeXt blocks in 1, 2 or 3 dimensions.

Depthwise convolution mixes positions, a two-layer MLP mixes channels (ConvNeXt, arXiv 2201.03545; in 1-D the
body of Vocos, 2306.00814). As a convolution it takes any size, and moving an object by whole patches moves its
codes. Inputs are patchified first, since convolutions at full resolution make training on CPUs slow.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anytoken import moved

AT_ONCE = 2048  # positions of a forward pass: with more, calls get no cheaper and activations leave the cache

# glibc returns the memory of every large activation to the system and allocates it again with page faults, which can
# take a fifth of the time. After one block of nearly 32 MB was allocated and freed, it keeps freed memory.
torch.empty(31 << 20, dtype=torch.uint8)


class Conv1dAsConv2d(nn.Conv1d):
    """A convolution along x [B, D, T], computed in 2-D with one row: only 2-D is fast with channels last."""

    def forward(self, input: Tensor) -> Tensor:
        """x [B, in, T] to [B, out, T]."""
        weight, padding = self.weight[:, :, None], (0, *map(int, self.padding))
        return F.conv2d(input[:, :, None], weight, self.bias, padding=padding, groups=self.groups)[:, :, 0]


_gelu_: Any = vars(torch._C._nn)["gelu_"]  # in place
_CONV: dict[int, Any] = {1: Conv1dAsConv2d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvNeXtBlock(nn.Module):
    """Residual block on x [B, D, *space]; same shape out.

    causal: along the first axis, which is time, a position depends only on itself and earlier ones.
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
        """x [B, D, *space] to the same shape; past: for a causal block, the `before` positions in time before x."""
        x = x.movedim(1, -1).contiguous()
        seen = x.movedim(-1, 1)
        if past is not None:
            seen = torch.cat([past, seen], 2)
        elif self.before:
            seen = F.pad(x, [0, 0] * (x.ndim - 2) + [self.before, 0]).movedim(-1, 1)
        y = self.up(self.norm(self.mix(seen).movedim(1, -1)))
        if torch.is_grad_enabled():
            return (x + self.down(F.gelu(y)) * self.scale).movedim(-1, 1)
        # Nothing that is still needed is overwritten.
        return (x + self.down(_gelu_(y)).mul_(self.scale)).movedim(-1, 1)


class ConvNeXtStack(nn.Sequential):
    """`depth` ConvNeXt blocks of one width and kernel."""

    def __init__(
        self, width: int, depth: int, kernel: Sequence[int], expansion: int = 3, causal: bool = False
    ) -> None:
        super().__init__(*(ConvNeXtBlock(width, kernel, expansion, causal) for _ in range(depth)))

    def step(self, x: Tensor, past: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Apply a causal trunk to the next positions in time x [B, D, *space]; also returns `past` for the next call.

        Successive pieces give the same result as one call for all. past: None at the start.
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
    """Fold x [B, C, *space] into [B, C * prod(patch), *space / patch]; space must divide by patch.

    In memory the channels of a position are contiguous, as the layers here expect.
    """
    b, c, *space = x.shape
    n = len(patch)
    shape = [b, c]
    for size, p in zip(space, patch, strict=True):
        shape += [size // p, p]
    cells, inner = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return x.reshape(shape).permute(0, *cells, 1, *inner).flatten(n + 1).movedim(-1, 1)


def unpatchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: [B, C * prod(patch), *grid] to [B, C, *grid * patch], channels together in memory."""
    b, _, *grid = x.shape
    n = len(patch)
    y = x.reshape(b, -1, *patch, *grid)
    order = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
    space = [g * p for g, p in zip(grid, patch, strict=True)]
    return y.permute(0, *order, 1).reshape(b, *space, y.shape[1]).movedim(-1, 1)


class Patchify(nn.Module):
    """`patchify` as a layer."""

    def __init__(self, patch: Sequence[int]) -> None:
        super().__init__()
        self.patch = tuple(patch)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *space] to [B, C * prod(patch), *space / patch]."""
        return patchify(x, self.patch)


class Unpatchify(Patchify):
    """`unpatchify` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C * prod(patch), *grid] to [B, C, *grid * patch]."""
        return unpatchify(x, self.patch)


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of one width, for x [B, inputs]."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    )


def group_by_shape(
    keys: Sequence[Hashable], positions: Sequence[int], device: torch.device
) -> list[list[int]]:
    """Yield the indices of items with equal keys, to share a forward pass; on a CPU in batches of an efficient size.

    positions: the size of each item, such as its number of codes.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    batches = []
    for rows in groups.values():
        most = max(1, AT_ONCE // positions[rows[0]]) if device.type == "cpu" else len(rows)
        batches += [rows[i : i + most] for i in range(0, len(rows), most)]
    return batches


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
