"""Cross-entropy from hidden states in chunks, without the full logits [N, V].

Targets that compete with the same ids form a group, and a chunk is some rows of a group by the group's ids. The
gradients of hidden states and head are computed with the chunk's probabilities, so nothing is recomputed and only
gradients are kept: three matrix products per chunk, as for the plain softmax. The idea of Cut Cross-Entropy (arXiv
2411.09009) and of Liger Kernel's fused linear cross-entropy (2410.10989), with a softmax over a few ranges of rows. It
requires a loss that is a weighted sum with known weights.

Shapes: N targets, V vocabulary, D model width, R rows of a chunk, K ids of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]
ALIGNMENT = (
    16  # rows of logits start at multiples of 64 bytes: products into unaligned rows take twice as long
)
CPU_ROWS, SMALLEST = 1024, 16  # of a chunk on a CPU
MIN_BUFFER = 2**23  # logits; below that, a chunk's overhead outweighs what memory it spares


class Group(NamedTuple):
    """Targets that compete with the same ids: `where` int64, which of the N; `ranges`, the ids, half-open."""

    where: Tensor
    ranges: Ranges


class Scores(NamedTuple):
    """The loss (0-d, differentiable) and, for each target, what the log shows; all [N], without gradient.

    nll: negative log-likelihood, float32. log_z: logarithm of the softmax normalizer, float32. right: whether the
    target was the most probable id.
    """

    loss: Tensor
    nll: Tensor
    log_z: Tensor
    right: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_weight: float | Tensor = 0.0,
    groups: Sequence[Group] | None = None,
    buffer: int | None = None,
) -> Scores:
    """sum(weights * nll + z_weight * log_z ** 2), each target under the softmax over its group's rows of the head.

    hidden [N, D], head [V, D], targets int64 [N], weights float32 [N]. groups: every target in one of them, by
    default all in one group of all V ids; a group of one id costs nothing. buffer: how many logits may exist at
    once (a single row always may); by default as many as the head has elements, so that the buffer is no larger
    than the head's gradient. Products run in the autocast dtype or else the wider one of the arguments', softmax
    and sums in float32 at least.
    """
    if groups is None:
        groups = [Group(torch.arange(len(targets), device=targets.device), ((0, len(head)),))]
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    buffer = buffer or max(head.numel(), MIN_BUFFER)
    graded = torch.is_grad_enabled()  # within forward it is always off
    with torch.autocast(device, enabled=False):
        return Scores(
            *_LinearCrossEntropy.apply(
                hidden, head, targets, weights, z_weight, groups, buffer, dtype, graded
            )
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients; backward returns them, once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_weight: float | Tensor,
        groups: Sequence[Group],
        buffer: int,
        dtype: torch.dtype,
        graded: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        work = _Work(hidden, head, targets, weights, z_weight, dtype)
        if graded and ctx.needs_input_grad[0]:
            work.hidden_grad = torch.zeros_like(hidden)
        if graded and ctx.needs_input_grad[1]:
            work.head_grad = torch.zeros_like(head, dtype=work.nll.dtype)
        for group in groups:
            work.add(group, buffer)
        loss = (weights * work.nll).sum() + z_weight * work.log_z.square().sum()
        ctx.grads = work.hidden_grad, work.head_grad
        ctx.dtype = head.dtype
        ctx.mark_non_differentiable(work.nll, work.log_z, work.right)
        return loss, work.nll, work.log_z, work.right

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The gradient of linear_cross_entropy is made once; call backward once.")
        hidden_grad, head_grad = ctx.grads
        ctx.grads = None  # no second reference: the parameter takes the tensor over instead of copying it
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(slope)
        if head_grad is not None:
            head_grad = head_grad.mul_(slope).to(ctx.dtype)
        return hidden_grad, head_grad, *[None] * 7


class _Work:
    """One pass over the targets, chunk by chunk: its inputs and the results so far."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_weight: float | Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.head, self.targets, self.weights = hidden, head.to(dtype), targets, weights
        self.z_weight, self.dtype = z_weight, dtype
        self.nll = hidden.new_zeros(len(targets), dtype=torch.promote_types(dtype, torch.float32))
        self.log_z = torch.zeros_like(self.nll)
        self.right = torch.ones_like(targets, dtype=torch.bool)
        self.hidden_grad: Tensor | None = None
        self.head_grad: Tensor | None = None

    def add(self, group: Group, buffer: int) -> None:
        """Score a group's targets with at most `buffer` logits at a time."""
        width = sum(stop - start for start, stop in group.ranges)
        if width == 1:
            return
        stride = -(-width // ALIGNMENT) * ALIGNMENT
        chunks = _chunks(group.where, max(1, buffer // stride))
        logits = self.hidden.new_empty(len(chunks[0]), stride, dtype=self.dtype)[:, :width]
        for where in chunks:
            self._add_chunk(where, group.ranges, logits[: len(where)])

    def _add_chunk(self, where: Tensor, ranges: Ranges, raw: Tensor) -> None:
        """Score targets `where` [R]; raw [R, K] is written over."""
        rows = [self.head[start:stop] for start, stop in ranges]
        sizes = [len(part) for part in rows]
        states = self.hidden[where].to(self.dtype)
        place = _place(self.targets[where], ranges)[:, None]
        for part, columns in zip(rows, raw.split(sizes, 1), strict=True):
            torch.mm(states, part.T, out=columns)
        logits = raw.to(self.nll.dtype)
        scored, highest = logits.gather(1, place), logits.amax(1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(1, keepdim=True)
        log_z = highest + total.log()
        self.log_z[where], self.nll[where] = log_z.squeeze(1), (log_z - scored).squeeze(1)
        self.right[where] = (scored >= highest).squeeze(1)
        if self.hidden_grad is None and self.head_grad is None:
            return
        # d loss / d logit: the probability times the weight of log_z, less the weight of nll at the target
        weight = self.weights[where, None].to(logits)
        logits.mul_((weight + 2 * self.z_weight * log_z) / total).scatter_add_(1, place, -weight)
        slopes = logits.to(self.dtype).split(sizes, 1)
        if self.hidden_grad is not None:
            first, *others = (slope @ part for slope, part in zip(slopes, rows, strict=True))
            self.hidden_grad[where] = sum(others, start=first).to(self.hidden.dtype)
        if self.head_grad is not None:
            for (start, stop), slope in zip(ranges, slopes, strict=True):
                _add_product(self.head_grad[start:stop], slope.T, states)


def _chunks(where: Tensor, most: int) -> tuple[Tensor, ...]:
    """Targets [N] in chunks of at most `most` rows.

    On a CPU chunks have few different sizes, since oneDNN generates code for every new shape of a product in 16 bits:
    ``CPU_ROWS``, halves of it, and what is left.
    """
    if where.device.type != "cpu":
        return where.split(most)
    sizes, size, left = [], min(most, CPU_ROWS), len(where)
    while left:
        size = size if left >= size else max(size // 2, min(left, SMALLEST))
        if left >= size:
            sizes.append(size)
            left -= size
    return where.split(sizes)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, the sum in the precision of `total`."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _place(targets: Tensor, ranges: Ranges) -> Tensor:
    """Index of each target among the concatenated ranges."""
    (first, stop), *others = ranges
    place, before = targets - first, stop - first
    for start, stop in others:  # numbers of the host: a table of them would have to be copied to the device
        place = torch.where(targets >= start, targets - (start - before), place)
        before += stop - start
    return place
