"""Training steps on one GPU: tokens per second, MFU and peak memory against stock Qwen3, Qwen3-MoE and plain torch.

A step is forward, backward and fused AdamW over packed rows, float32 weights under bf16 autocast, as in
`training/trainer.py`. The stock models of transformers have the same shape, ids and sample borders, and take the
fastest attention that they run here; they compute all logits, so where those do not fit they get fewer rows. What is
cheap to measure comes first: cases that compile come last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from anytoken.benchmarks.gpu_part import Part, Shape, Sizes, Skip
from anytoken.benchmarks.gpu_plain import PlainModel
from anytoken.benchmarks.harness import Figures
from anytoken.grammar import Grammar
from anytoken.model.attention import FLASH, flash_obstacle
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.token_space import TokenSpace
from anytoken.training.config import MoeSpec
from anytoken.training.cost_estimate import count, flops_per_token
from anytoken.training.losses.balanced import BalancedLoss
from anytoken.training.step import ModelWithLoss, compile_layers, with_layout

ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
PLAIN, COMPILED = 12.0, 45.0  # seconds that a case takes, at a guess: it is skipped where fewer are left
Batch = dict[str, Any]  # tensors, and what `with_layout` adds


def packed_batch(sizes: Sizes, space: TokenSpace, rows: int, device: torch.device) -> Batch:
    """Random packed rows as `data/packing.py` makes them: samples of half text, half codes of one modality."""
    generator = torch.Generator().manual_seed(0)
    ids, positions = [], []
    spans = [space.code_range(name) for name in space.modalities]
    for _ in range(rows):
        row: list[Tensor] = []
        place: list[Tensor] = []
        room = sizes.context
        while room:
            length = min(room, int(torch.randint(*sizes.samples, (), generator=generator)))
            text = torch.randint(space.text_size, (length // 2,), generator=generator)
            span = spans[len(row) % len(spans)]
            codes = torch.randint(span.start, span.stop, (length - len(text),), generator=generator)
            row.append(torch.cat([text, codes]))
            place.append(torch.arange(length))
            room -= length
        ids.append(torch.cat(row))
        positions.append(torch.cat(place))
    input_ids, position_ids = torch.stack(ids), torch.stack(positions)
    following = torch.zeros_like(position_ids, dtype=torch.bool)
    following[:, :-1] = position_ids[:, 1:] > 0  # the next id is of the same sample
    index = following.flatten().nonzero().squeeze(1)
    batch = {
        "input_ids": input_ids, "position_ids": position_ids, "loss_index": index,
        "targets": input_ids.flatten()[index + 1],
    }  # fmt: skip
    laid_out = with_layout(batch, Grammar(space))  # as in training: the host waits for nothing
    moved: Batch = send_to_device(laid_out, device)
    return moved


def our_config(shape: Shape, space: TokenSpace, context: int) -> AnyTokenConfig:
    """AnyToken in a shape; a shape without experts is dense in every layer."""
    dense = {} if "num_experts" in shape else {"mlp_only_layers": list(range(shape["num_hidden_layers"]))}
    return AnyTokenConfig.from_token_space(space, **shape, **dense, max_position_embeddings=context)


def stock_model(shape: Shape, vocabulary: int, context: int, experts: str = "grouped_mm") -> PreTrainedModel:
    """transformers' Qwen3, or Qwen3-MoE with an implementation of its experts, in a shape."""
    settings = {**shape, "vocab_size": vocabulary, "max_position_embeddings": context}
    if "num_experts" not in shape:
        return Qwen3ForCausalLM(Qwen3Config(**settings))
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    model.set_experts_implementation(experts)
    return model


def usable(model: PreTrainedModel, attention: str, device: torch.device) -> None:
    """Switch to an attention implementation; Skip says why it cannot train here."""
    if attention in FLASH and (obstacle := flash_obstacle(attention, model, device, torch.bfloat16)):
        raise Skip(obstacle)
    if attention == "flex_attention" and device.type == "cpu":
        raise Skip("flex_attention has no backward pass on a CPU")
    model.set_attn_implementation(attention)


def our_step(
    part: Part, sizes: Sizes, shape: Shape, attention: str, compiled: bool, restricted: bool
) -> tuple[PreTrainedModel, Callable[[Batch], Tensor]]:
    """Our model, and its loss over a packed batch."""
    space = sizes.space()
    torch.manual_seed(0)
    with part.device:
        lm = AnyTokenForCausalLM(our_config(shape, space, sizes.context))
    lm.set_experts_implementation("grouped_mm")
    usable(lm, attention, part.device)
    loss = BalancedLoss(Grammar(space), "tokens", grammar_restricted=restricted)
    model = ModelWithLoss(lm, loss, MoeSpec()).to(part.device).train()
    if compiled:
        compile_layers(lm, **({"backend": "eager"} if sizes.is_tiny else {}))
    return lm, lambda batch: model(**batch)["loss"]


def stock_step(
    part: Part, sizes: Sizes, shape: Shape, attention: str, experts: str
) -> tuple[PreTrainedModel, Callable[[Batch], Tensor]]:
    """The stock model, and its own loss over the same batch."""
    torch.manual_seed(0)
    with part.device:
        lm = stock_model(shape, sizes.space().vocab_size, sizes.context, experts).train()
    usable(lm, attention, part.device)
    routed = {"output_router_logits": True} if "num_experts" in shape else {}

    def loss(batch: Batch) -> Tensor:
        labels = torch.full_like(batch["input_ids"], -100).flatten()
        labels[batch["loss_index"] + 1] = batch["targets"]
        labels = labels.view_as(batch["input_ids"])
        ids, positions = batch["input_ids"], batch["position_ids"]
        return lm(ids, position_ids=positions, labels=labels, use_cache=False, **routed).loss

    return lm, loss


def plain_step(
    part: Part, sizes: Sizes, shape: Shape, compiled: bool
) -> tuple[PlainModel, Callable[[Batch], Tensor]]:
    """The same shape in plain torch, and its loss over the same batch."""
    if "num_experts" in shape:
        raise Skip("plain torch is dense")
    torch.manual_seed(0)
    with part.device:
        lm = PlainModel(Qwen3Config(**shape, vocab_size=sizes.space().vocab_size)).train()
    if compiled:
        for layer in lm.layers:
            layer.compile(**({"backend": "eager"} if sizes.is_tiny else {}))
    return lm, lambda batch: lm(batch["input_ids"], batch["loss_index"], batch["targets"])


def step(part: Part, lm: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch) -> Callable[[], Tensor]:
    """One optimizer step as the trainer takes it; the loss stays on the device."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=True)

    def run() -> Tensor:
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.device.type == "cuda"):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return run


def useful_flops(lm: PreTrainedModel, batch: Batch, head_rows: float) -> float:
    """FLOPs per token of a training step by the formula of `benchmarks/gpu.py`; head_rows: logits per token."""
    counted, config = count(lm), lm.config
    body = counted.active - lm.get_output_embeddings().weight.numel() - counted.lookup
    # Of a sample of n ids, whose mean is (n - 1) / 2.
    context = float(2 * batch["position_ids"].double().mean() + 1)
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    return 6.0 * body + attention + 6.0 * config.hidden_size * head_rows


def logits_per_token(batch: Batch, grammar: Grammar | None, vocabulary: int) -> float:
    """How many logits a step needs for each token: of the ids that its target competes with, or of all."""
    if grammar is None:
        return vocabulary * len(batch["targets"]) / batch["input_ids"].numel()
    widths = torch.tensor([sum(stop - start for start, stop in one) for one in grammar.class_ranges])
    found = widths[grammar.loss_rows(batch["targets"].cpu())]
    return float(found.sum()) / batch["input_ids"].numel()


def measured(part: Part, sizes: Sizes, make: Callable[[], Any], head: Callable[[Batch], float]) -> Figures:
    """Figures of a step, with as many rows as fit: half of them after each time that memory runs out."""
    rows = sizes.rows
    while True:
        try:
            return _measured(part, sizes, make, head, rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        part.tidy()  # here, where the frames of the failure are gone


def _measured(
    part: Part, sizes: Sizes, make: Callable[[], Any], head: Callable[[Batch], float], rows: int
) -> Figures:
    batch = packed_batch(sizes, sizes.space(), rows, part.device)
    lm, loss = make()
    run = step(part, lm, loss, batch)
    first = float(run())
    seconds = part.time(run, sizes.seconds)
    last = float(run())
    tokens = batch["input_ids"].numel()
    counted, flops = count(lm), useful_flops(lm, batch, head(batch))
    planned = flops_per_token(lm.config, counted, sizes.context)
    return {
        "tokens/s": tokens / seconds, "mfu": flops * tokens / seconds / part.peak, "rows": rows,
        "context": sizes.context, "M parameters": counted.total / 1e6, "M active": counted.active / 1e6,
        "GFLOP/token": flops / 1e9, "plan_share": planned * tokens / seconds / part.peak,
        "first loss": first, "last loss": last,
    }  # fmt: skip


def bench_train(part: Part, sizes: Sizes) -> None:
    """All cases: ours by attention and loss, stock by attention, then ours compiled."""
    grammar = Grammar(sizes.space())
    vocabulary = sizes.space().vocab_size
    fastest: dict[str, tuple[float, str]] = {}

    def ours(name: str, attention: str, compiled: bool, restricted: bool = True) -> None:
        shape = sizes.shapes[name]
        words = [name, attention, *(["compiled"] if compiled else []), *([] if restricted else ["full loss"])]
        make = partial(our_step, part, sizes, shape, attention, compiled, restricted)
        head = partial(logits_per_token, grammar=grammar if restricted else None, vocabulary=vocabulary)
        measure = partial(measured, part, sizes, make, head)
        facts = {"side": "ours", "shape": name, "attention": attention, "compiled": compiled}
        needs = 0.0 if sizes.is_tiny else COMPILED if compiled else PLAIN
        found = part.case(", ".join(words), needs, measure, **facts, loss="grammar" if restricted else "full")
        if found and not compiled and restricted:
            fastest[name] = max(fastest.get(name, (0.0, "")), (found["tokens/s"], attention))

    def stock(name: str, attention: str, experts: str = "grouped_mm") -> None:
        shape = sizes.shapes[name]
        make = partial(stock_step, part, sizes, shape, attention, experts)
        every = partial(logits_per_token, grammar=None, vocabulary=vocabulary)
        measure = partial(measured, part, sizes, make, every)
        facts = {"side": "stock", "shape": name, "attention": attention, "compiled": False, "loss": "full"}
        looped = ", experts in a loop" if experts == "eager" else ""
        part.case(f"{name}, stock, {attention}{looped}", 0.0 if sizes.is_tiny else PLAIN, measure, **facts)

    def plain(name: str, compiled: bool) -> None:
        make = partial(plain_step, part, sizes, sizes.shapes[name], compiled)
        every = partial(logits_per_token, grammar=None, vocabulary=vocabulary)
        measure = partial(measured, part, sizes, make, every)
        facts = {
            "side": "plain torch",
            "shape": name,
            "attention": "sdpa",
            "compiled": compiled,
            "loss": "full",
        }
        needs = 0.0 if sizes.is_tiny else COMPILED if compiled else PLAIN
        part.case(f"{name}, plain torch{', compiled' if compiled else ''}", needs, measure, **facts)

    for name in sizes.shapes:
        for attention in ATTENTION:
            ours(name, attention, compiled=False)
        for attention in ATTENTION:
            stock(name, attention)
        # A loop follows autocast, grouped products of float32 weights do not.
        if "num_experts" in sizes.shapes[name]:
            stock(name, "sdpa", experts="eager")
        if "num_experts" not in sizes.shapes[name]:
            plain(name, compiled=False)
        ours(name, "sdpa", compiled=False, restricted=False)
    if sizes.is_tiny:  # a compiler takes longer than all else
        plain(next(iter(sizes.shapes)), compiled=True)
        return ours(next(reversed(sizes.shapes)), "sdpa", compiled=True)
    for name in sizes.shapes:  # what is fastest is what will be trained with
        if name in fastest:
            ours(name, fastest[name][1], compiled=True)
    plain(next(iter(sizes.shapes)), compiled=True)
    for name in sizes.shapes:
        for attention in ATTENTION:
            if attention != fastest.get(name, (0.0, ""))[1]:
                ours(name, attention, compiled=True)
    return None
