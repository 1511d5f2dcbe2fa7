"""Experts on a CPU in 16 bits: one product per expert, in place of PyTorch's grouped product.

On CPUs with bfloat16 instructions (AVX512-BF16, AMX) a product runs several times as fast as in float32, but PyTorch's
grouped product loses that advantage to casts and copies. Here the tokens of an expert lie next to each
other, each product writes into its part of one buffer, and the backward pass is written out, so that no tensor is
computed twice. oneDNN generates code for every new shape, which takes longer than the product itself: each expert's
rows are therefore padded with zeros to a multiple of ``ROWS``.

Shapes: T tokens, K choices per token, N routed tokens, P of them and of padding, E experts, H hidden, W width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS = 64


def cpu_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, choices: Tensor, weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """The chosen SwiGLU experts' weighted sum [T, H] in ``dtype``, with gradients in the dtypes of the arguments.

    hidden [T, H], gate_up [E, 2W, H], down [E, H, W], choices int64 [T, K], weights [T, K]. A choice of E is no expert
    and adds nothing.
    """
    flat = choices.flatten()
    counts = flat.bincount(minlength=len(down))[: len(down)]
    order = flat.argsort(stable=True)[: int(counts.sum())]
    padded = (counts + ROWS - 1) // ROWS * ROWS
    # Of each expert's rows, by the padding before.
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    slots = torch.arange(len(order), device=order.device) + shift[flat[order]]
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = _Experts.apply(hidden, gate_up, down, weights, order, slots, padded.tolist(), dtype)
    return result


class _Experts(torch.autograd.Function):
    """Forward saves the inputs of each product; backward computes the transposed products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        order: Tensor,
        slots: Tensor,
        counts: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        token, ctx.dtypes = order // weights.shape[1], (hidden.dtype, gate_up.dtype, weights.dtype)
        routed = hidden.new_zeros(sum(counts), hidden.shape[1], dtype=dtype)  # [P, H]
        routed[slots] = hidden.to(dtype)[token]
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        both = _product(routed, gate_up.mT, counts)  # [P, 2W]
        gate, up = both.chunk(2, -1)
        outputs = _product(F.silu(gate).mul_(up), down.mT, counts)[slots]  # [N, H]
        share = weights.flatten()[order].to(dtype)[:, None]
        ctx.save_for_backward(routed, both, outputs, gate_up, down, share, order, slots)
        ctx.counts, ctx.shape = counts, weights.shape
        return _sum(outputs * share, token, len(hidden)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        routed, both, outputs, gate_up, down, share, order, slots = ctx.saved_tensors
        (tokens, choices), counts = ctx.shape, ctx.counts
        of_hidden, of_experts, of_weights = ctx.dtypes
        token = order // choices
        slope = slope.to(routed.dtype)[token]  # [N, H]
        weights_grad = slope.new_zeros(tokens * choices, dtype=of_weights)
        weights_grad[order] = (slope * outputs).sum(-1, dtype=of_weights)
        slopes = torch.zeros_like(routed)
        slopes[slots] = slope.mul_(share)
        gate, up = both.chunk(2, -1)
        closed = torch.sigmoid(gate)
        opened = gate * closed  # silu(gate)
        down_grad = _outer(slopes, opened * up, counts)
        inner = _product(slopes, down, counts)  # of silu(gate) * up
        both_grad = torch.cat(
            [closed.addcmul_(opened, 1 - closed).mul_(up).mul_(inner), inner.mul_(opened)], -1
        )
        gate_up_grad = _outer(both_grad, routed, counts)
        hidden_grad = _sum(_product(both_grad, gate_up, counts)[slots], token, tokens)
        return (
            hidden_grad.to(of_hidden), gate_up_grad.to(of_experts), down_grad.to(of_experts),
            weights_grad.view(ctx.shape), None, None, None, None,
        )  # fmt: skip


def _product(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """Rows [P, A], sorted by expert, each times its expert's matrix of [E, A, B]: [P, B]."""
    result = rows.new_empty(len(rows), matrices.shape[-1])
    for part, matrix, out in zip(rows.split(counts), matrices, result.split(counts), strict=True):
        torch.mm(part, matrix, out=out)
    return result


def _outer(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """The sum over each expert's rows of the outer products of left [P, A] and right [P, B]: [E, A, B]."""
    result = left.new_empty(len(counts), left.shape[-1], right.shape[-1])
    for one, other, out in zip(left.split(counts), right.split(counts), result, strict=True):
        torch.mm(one.T, other, out=out)  # zeros for an expert without rows
    return result


def _sum(rows: Tensor, token: Tensor, tokens: int) -> Tensor:
    """Rows [N, H] added up by token, in float32 at least: [T, H]."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.new_zeros(tokens, rows.shape[-1]).index_add_(0, token, wide)
