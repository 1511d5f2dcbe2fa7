"""A training step against stock Qwen3-MoE of the same shape, and the chunked loss against full logits.

Both sides see the same ids, predict every next id and take an AdamW step; the stock model uses its fastest expert
implementation. Half of the ids are text, half are codes. Peak memory is the high-water mark of a process that does
nothing but two steps, less that of a process that only imports what both need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from anytoken.benchmarks.harness import Figures, interleaved_timing
from anytoken.grammar import Grammar, Phase
from anytoken.inference.model_runner import ModelRunner
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.token_space import TokenSpace
from anytoken.training.config import MoeSpec
from anytoken.training.losses.balanced import BalancedLoss
from anytoken.training.step import ModelWithLoss

STOCK_EXPERTS = ("grouped_mm", "eager")  # batched_mm copies the weights for every token
HEAD_REPEATS = 100
Step = Callable[[], float]


@dataclass(frozen=True)
class Sizes:
    """What one comparison runs on: a checkpoint's shape and modalities, and a batch of rows x context ids.

    text_size: text ids, where not as many as the checkpoint has.
    """

    folder: Path
    rows: int
    context: int
    text_size: int | None = None

    def __str__(self) -> str:
        return f"vocabulary {self.space.vocab_size}, {self.rows * self.context} tokens"

    @property
    def space(self) -> TokenSpace:
        """The checkpoint's token space, with another number of text ids if one is given."""
        space = TokenSpace.load(self.folder / "token_space.json")
        if self.text_size is None:
            return space
        grown = TokenSpace(self.text_size)
        for name, shape in space.shapes.items():
            grown.append_modality(name, space.codebook_sizes(name), shape, space.global_codebook_size(name))
        return grown

    def config(self) -> AnyTokenConfig:
        """The checkpoint's shape in the settings that stock Qwen3-MoE has too."""
        config = AnyTokenConfig.from_pretrained(self.folder)
        config.update(
            {"vocab_size": self.space.vocab_size, "shared_expert_intermediate_size": 0, "expert_groups": None}
        )
        return config

    def ids(self) -> Tensor:
        """Random ids int64 [rows, context]: half of a row is text, the rest is shared by the other modalities."""
        space, generator = self.space, torch.Generator().manual_seed(0)
        codes = [space.code_range(name) for name in space.modalities]
        spans = [(0, space.text_size), *((code.start, code.stop) for code in codes)]
        half = self.context // 2
        share, rest = divmod(self.context - half, len(codes))
        lengths = [half + rest, *[share] * len(codes)]
        drawn = [
            torch.randint(*span, (self.rows, length), generator=generator)
            for span, length in zip(spans, lengths, strict=True)
        ]
        return torch.cat(drawn, dim=1)


def our_step(sizes: Sizes, restricted: bool) -> Step:
    """A step of AnyToken: full or grammar-restricted loss, in chunks."""
    torch.manual_seed(0)
    ids = sizes.ids()
    loss = BalancedLoss(Grammar(sizes.space), "tokens", grammar_restricted=restricted)
    model = ModelWithLoss(AnyTokenForCausalLM(sizes.config()), loss, MoeSpec()).train()
    learnt = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    positions = torch.arange(sizes.context).expand_as(ids)
    batch = {
        "input_ids": ids,
        "position_ids": positions,
        "loss_index": learnt,
        "targets": ids[:, 1:].flatten(),
    }
    return _step(model, lambda: model(**batch)["loss"])


def stock_model(sizes: Sizes, experts: str) -> Qwen3MoeForCausalLM:
    """transformers' Qwen3-MoE of the same shape."""
    known = Qwen3MoeConfig().to_dict().keys() - {"model_type", "architectures"}
    config = Qwen3MoeConfig(**{key: value for key, value in sizes.config().to_dict().items() if key in known})
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def stock_step(sizes: Sizes, experts: str) -> Step:
    """A step of transformers' Qwen3-MoE with its own losses."""
    torch.manual_seed(0)
    model, ids = stock_model(sizes, experts).train(), sizes.ids()
    return _step(model, lambda: model(ids, labels=ids, output_router_logits=True, use_cache=False).loss)


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def run() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return run


def best_experts(sizes: Sizes) -> str:
    """The expert implementation the stock model is fastest with."""
    taken = interleaved_timing({name: stock_step(sizes, name) for name in STOCK_EXPERTS}, repeats=2)
    return min(taken, key=lambda name: taken[name])


def peak_mebibytes(make_step: Callable[[], Step] | None) -> float:
    """High-water mark of a new process that takes two steps (None: that imports and no more)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_own_peak, make_step, torch.get_num_threads()).result()


def _own_peak(make_step: Callable[[], Step] | None, threads: int) -> float:
    torch.set_num_threads(threads)
    if make_step is not None:
        step = make_step()
        step()
        step()
    # not getrusage: its ru_maxrss also counts the process that this one was forked from
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


@torch.inference_mode()
def head_seconds(sizes: Sizes, kind: str) -> dict[str, float]:
    """Seconds of the head for one id inside a segment: of the allowed ids' rows, and of all rows."""
    lm, grammar = AnyTokenForCausalLM(sizes.config()).eval(), Grammar(sizes.space)
    state = grammar.reply([kind])
    while state.phase is not Phase.CODES:
        state = grammar.advance(state, grammar.allowed(state)[0][0])
    head, ranges = ModelRunner(lm), grammar.allowed(state)
    features = torch.randn(1, lm.config.hidden_size)
    weight = lm.get_output_embeddings().weight
    sides = {"ours": lambda: head(features, ranges), "full": lambda: F.linear(features, weight)}
    return interleaved_timing(sides, HEAD_REPEATS)


def bench_model(own: Sizes, large: Sizes, repeats: int) -> Figures:
    """Rows {what, unit, ours, peer, ratio, bar}: steps at both vocabularies; memory and head at the large one."""
    experts = best_experts(own)
    rows = _steps(own, experts, repeats, {"full loss": (False, 1.0), "grammar loss": (True, 1.3)})
    rows += _steps(large, experts, repeats, {"grammar loss": (True, 2.0)})
    if Path("/proc/self/status").exists():
        rows.append(_memory(large, experts))
    head = head_seconds(large, kind="image")
    name = f"head for one id of an image, vocabulary {large.space.vocab_size}"
    rows.append(_row(name, "ms", head["ours"] * 1000, head["full"] * 1000, 10.0))
    return {"rows": rows, "shape": own.folder.name, "stock experts": experts, "repeats": repeats}


def _steps(
    sizes: Sizes, experts: str, repeats: int, losses: Mapping[str, tuple[bool, float]]
) -> list[Figures]:
    """A row for each of our losses (restricted or not, and its bar), all taking turns with the stock model."""
    sides = {name: our_step(sizes, restricted) for name, (restricted, _) in losses.items()}
    taken = interleaved_timing(sides | {"stock": stock_step(sizes, experts)}, repeats)
    stock = 1000 * taken["stock"]
    return [
        _row(f"step, {name}, {sizes}", "ms", 1000 * taken[name], stock, bar)
        for name, (_, bar) in losses.items()
    ]


def _memory(sizes: Sizes, experts: str) -> Figures:
    imports = peak_mebibytes(None)
    ours = peak_mebibytes(partial(our_step, sizes, True)) - imports
    stock = peak_mebibytes(partial(stock_step, sizes, experts)) - imports
    return _row(f"peak memory, grammar loss, {sizes}", "MiB", ours, stock, 2.0)


def _row(what: str, unit: str, ours: float, peer: float, bar: float) -> Figures:
    return {"what": what, "unit": unit, "ours": ours, "peer": peer, "ratio": peer / ours, "bar": bar}
