"""Training cost of experts, against a dense decoder and against the machine's peak matrix product.

Both decoders have the same width, depth and attention, and the same active parameters: the dense feed-forward layer
is as wide as the experts that one token passes. The share of the peak counts useful arithmetic only: 6 operations per
active parameter and token (2 forward, 4 backward; arXiv 2001.08361) and the products of causal attention, divided by
what one large float32 matrix product reaches in the same rounds. Shapes: B rows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from anytoken.benchmarks.harness import Figures, interleaved_timing
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenForCausalLM

ROWS, CONTEXT = 4, 512
PEAK_SIZE = 2048
BARS = {"MoE / dense tokens/s": 0.8, "share of the fp32 peak": 0.55}
SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip


def decoders(hidden: int, experts: int, top_k: int) -> dict[str, AnyTokenForCausalLM]:
    """A mixture of experts and a dense decoder with the same active parameters, except for the router."""
    width = 4 * hidden // top_k
    settings: dict[str, dict[str, Any]] = {
        "moe": {
            "num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width,
            "norm_topk_prob": True,
        },
        "dense": {"mlp_only_layers": list(range(SHAPE["num_hidden_layers"])), "intermediate_size": 4 * hidden},
    }  # fmt: skip
    torch.manual_seed(0)
    return {
        name: AnyTokenForCausalLM(AnyTokenConfig(**SHAPE, hidden_size=hidden, **more)).train()
        for name, more in settings.items()
    }


def step_operations(lm: AnyTokenForCausalLM, rows: int, context: int) -> float:
    """Useful operations of one training step: of the active matrices, and of the causal half of attention."""
    config = lm.config
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * context / 2 * 2
    return 6.0 * rows * context * (lm.num_active_parameters() + attention)


def bench_experts(hidden: int, experts: int, top_k: int, repeats: int) -> Figures:
    """Seconds of a training step (forward, backward, AdamW) of both decoders, and of the matrix product."""
    models = decoders(hidden, experts, top_k)
    ids = torch.randint(SHAPE["vocab_size"], (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    factor = torch.randn(PEAK_SIZE, PEAK_SIZE)
    sides: dict[str, Callable[[], object]] = {name: partial(_step(lm), ids) for name, lm in models.items()}
    taken = interleaved_timing({**sides, "matmul": lambda: factor @ factor}, repeats)
    peak = 2 * PEAK_SIZE**3 / taken["matmul"]
    rows: list[Figures] = []
    for name, lm in models.items():
        rows.append(
            {
                "decoder": name,
                "M parameters": sum(p.numel() for p in lm.parameters()) / 1e6,
                "M active": lm.num_active_parameters() / 1e6,
                "tokens/s": ids.numel() / taken[name],
                "share of the fp32 peak": step_operations(lm, *ids.shape) / taken[name] / peak,
                "MoE / dense tokens/s": taken["dense"] / taken["moe"] if name == "moe" else "",
            }
        )
    return {
        "hidden": hidden,
        "experts": experts,
        "top_k": top_k,
        "tokens": list(ids.shape),
        "peak GFLOP/s": peak / 1e9,
        "bars": BARS,
        "repeats": repeats,
        "rows": rows,
    }


def _step(lm: AnyTokenForCausalLM) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> None:
        lm(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
