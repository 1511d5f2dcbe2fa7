"""A training step against transformers' own: same weights, same packed batches; and what of a step is loading data.

Theirs is the model's `forward(labels=...)`: the softmax over the whole vocabulary at every position. Ours meets the
head only where something is learned and, within the grammar, only its rows. The losses differ by design; that both are
finite is checked, and the time of forward and backward is compared. "recipe" is ours in the precision, with the
attention and compiled as the recipe says; "ours" and "transformers" are in float32 and not compiled. Every
repeat has another batch, as training does: for new shapes of products some libraries generate code.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import cycle

import torch
from transformers import PreTrainedModel

from anytoken.benchmarks.harness import Figures, interleaved_timing
from anytoken.data.mixture import Mixture
from anytoken.data.packing import PackedStream
from anytoken.processor import Processor
from anytoken.training.config import TrainConfig
from anytoken.training.cost_estimate import count, flops_per_token
from anytoken.training.initialize import build_model, choose_attention
from anytoken.training.precision import choose_precision
from anytoken.training.prepare_data import prepare_sources
from anytoken.training.run_metadata import measure_peak_flops
from anytoken.training.step import ModelWithLoss, build_loss, compile_layers, with_layout, worth_compiling
from anytoken.utils.errors import EvaluationError

WARM_UP = 3  # batches
Batch = dict[str, torch.Tensor]


def bench_train(stage: TrainConfig, repeats: int) -> Figures:
    """Seconds of a step of all sides, and of loading one batch; EvaluationError if a loss is not finite."""
    processor, lm = build_model(stage)
    if stage.precision == "auto":
        stage = stage.model_copy(update={"precision": choose_precision(lm.device)})
    space, sources = processor.token_space, prepare_sources(stage, stage.data, processor)
    mixture = Mixture(sources, processor, stage.context, stage.seed, stage.cfg_dropout)
    batches = iter(PackedStream(mixture.sample, stage.batch_size, stage.context, space.pad))
    kept = [next(batches) for _ in range(repeats + WARM_UP)]
    recipe = _as_in_the_recipe(stage, copy.deepcopy(lm), processor)
    model = ModelWithLoss(lm, build_loss(stage, processor), stage.moe).train()

    def step(loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise EvaluationError(f"a loss is {loss.item()}: there is nothing to compare.")
        loss.backward()
        lm.zero_grad(set_to_none=True)

    def in_turn(loss_of: Callable[[Batch], torch.Tensor]) -> Callable[[], None]:
        turn = cycle(kept)
        return lambda: step(loss_of(next(turn)))

    sides = {
        "recipe": in_turn(recipe),
        "ours": in_turn(lambda batch: model(**batch)["loss"]),
        "transformers": in_turn(lambda batch: lm(**_labelled(batch), use_cache=False).loss),
    }
    for _ in range(WARM_UP):
        sides["recipe"]()  # what is compiled, is compiled now
    taken = interleaved_timing(sides, repeats)
    batch = kept[0]
    start = time.perf_counter()
    real = [float((next(batches)["input_ids"] != space.pad).float().mean()) for _ in range(repeats)]
    loading = (time.perf_counter() - start) / repeats
    ids = batch["input_ids"].numel()
    flops = flops_per_token(lm.config, count(lm), stage.context)
    row = {
        "ids": ids,
        "learnt": len(batch["targets"]),
        "precision": stage.precision,
        "recipe tokens/s": ids / taken["recipe"],
        "recipe to float32": taken["ours"] / taken["recipe"],
        "tokens/s": ids / taken["ours"],
        "transformers tokens/s": ids / taken["transformers"],
        "ratio": taken["transformers"] / taken["ours"],
        "share of peak": ids / taken["ours"] * flops / measure_peak_flops(lm.device, torch.float32),
        "loading, of a step": loading / (taken["ours"] + loading),
        "real ids": sum(real) / len(real),
    }
    return {"recipe": stage.output, "repeats": repeats, "rows": [row]}


def _as_in_the_recipe(
    stage: TrainConfig, lm: PreTrainedModel, processor: Processor
) -> Callable[[Batch], torch.Tensor]:
    """The loss of a batch by a model of its own, in the recipe's precision, attention and compiled as it says."""
    choose_attention(lm, stage, lm.device)
    if worth_compiling(stage.compile, stage.steps, lm.device):
        compile_layers(lm)
    model = ModelWithLoss(lm, build_loss(stage, processor), stage.moe).train()

    def loss(batch: Batch) -> torch.Tensor:
        lm.zero_grad(set_to_none=True)
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
            found: torch.Tensor = model(**with_layout(batch, processor.grammar))["loss"]
        return found

    return loss


def _labelled(batch: Batch) -> Batch:
    """A batch as transformers' models take it."""
    labels = torch.full_like(batch["input_ids"], -100).flatten()
    labels[batch["loss_index"] + 1] = batch["targets"]
    shape = batch["input_ids"].shape
    return {key: batch[key] for key in ("input_ids", "position_ids")} | {"labels": labels.view(shape)}
