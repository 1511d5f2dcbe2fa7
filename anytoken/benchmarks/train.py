"""A training step beside transformers' own: same weights, same packed batch; and what of a step is loading data.

Theirs is the model's `forward(labels=...)`: the softmax over the whole vocabulary at every position. Ours meets the
head only where something is learnt and, within the grammar, only its rows. The losses differ by design; that both are
finite is checked, and the time of forward and backward is compared.
"""

from __future__ import annotations

import time

import torch

from anytoken.benchmarks.harness import (
    Figures,
    interleaved_timing,
)
from anytoken.data.mixture import Mixture
from anytoken.data.packing import PackedStream
from anytoken.training.config import TrainConfig
from anytoken.training.cost_estimate import count, flops_per_token
from anytoken.training.initialize import build_model
from anytoken.training.prepare_data import prepare_sources
from anytoken.training.run_metadata import measure_peak_flops
from anytoken.training.step import ModelWithLoss
from anytoken.training.trainer import build_loss
from anytoken.utils.errors import EvaluationError


def bench_train(stage: TrainConfig, repeats: int) -> Figures:
    """Seconds of a step of both sides, and of loading one batch; EvaluationError if a loss is not finite."""
    processor, lm = build_model(stage)
    space, sources = processor.token_space, prepare_sources(stage, stage.data, processor)
    mixture = Mixture(sources, processor, stage.context, stage.seed, stage.cfg_dropout)
    batches = iter(PackedStream(mixture.sample, stage.batch_size, stage.context, space.pad))
    batch = next(batches)
    model = ModelWithLoss(lm, build_loss(stage, processor), stage.moe).train()
    labels = torch.full_like(batch["input_ids"], -100).flatten()
    labels[batch["loss_index"] + 1] = batch["targets"]
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")} | {
        "labels": labels.view_as(batch["input_ids"])
    }

    def step(loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise EvaluationError(f"a loss is {loss.item()}: there is nothing to compare.")
        loss.backward()
        lm.zero_grad(set_to_none=True)

    sides = {
        "ours": lambda: step(model(**batch)["loss"]),
        "transformers": lambda: step(lm(**inputs, use_cache=False).loss),
    }
    taken = interleaved_timing(sides, repeats)
    start = time.perf_counter()
    real = [float((next(batches)["input_ids"] != space.pad).float().mean()) for _ in range(repeats)]
    loading = (time.perf_counter() - start) / repeats
    ids = batch["input_ids"].numel()
    flops = flops_per_token(lm.config, count(lm), stage.context)
    row = {
        "ids": ids,
        "learnt": len(batch["targets"]),
        "tokens/s": ids / taken["ours"],
        "transformers tokens/s": ids / taken["transformers"],
        "ratio": taken["transformers"] / taken["ours"],
        "share of peak": ids / taken["ours"] * flops / measure_peak_flops(lm.device, torch.float32),
        "loading, of a step": loading / (taken["ours"] + loading),
        "real ids": sum(real) / len(real),
    }
    return {"recipe": stage.output, "repeats": repeats, "rows": [row]}
