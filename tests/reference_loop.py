"""The plain loop that every way of decoding is compared with, what an engine is asked in the same words, and a stand-in
for CUDA's recorder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anytoken.grammar import Grammar
from anytoken.inference.cuda_graphs import Recorded
from anytoken.inference.request import GenerationRequest
from anytoken.inference.sampling import Sampling


@torch.inference_mode()
def reference(
    lm: torch.nn.Module,
    grammar: Grammar,
    prompt: Sequence[int],
    plan: Sequence[str] | None,
    limit: int,
    null_prompt: Sequence[int] = (),
    cfg_scale: dict[str, float] | None = None,
) -> list[int]:
    """Greedy decoding with nothing clever: one row, no cache, every step reads all and masks all logits."""
    space = grammar.token_space
    kinds = {space.open_token(name): name for name in space.modalities}
    kinds |= {space.close_token(name): "text" for name in space.modalities}
    state, ids, kind = grammar.reply(plan), [], "text"

    def read(start: Sequence[int]) -> torch.Tensor:
        logits = lm(torch.tensor([[*start, *ids]]), use_cache=False).logits[0, -1]
        if exits := grammar.index(grammar.exits(state)).tolist():
            planned = grammar.allowed(state, limit - len(ids))[-1][1] - 1
            logits[planned] = logits[[planned, *exits]].max()
        return logits

    while not grammar.finished(state):
        logits = read(prompt)
        scale = (cfg_scale or {}).get(kind, 1)
        if scale != 1:
            free = read(null_prompt)
            logits = free + scale * (logits - free)
        allowed = grammar.mask(grammar.allowed(state, limit - len(ids)))
        masked = logits[: len(allowed)].masked_fill(~allowed, -torch.inf)
        ids.append(int(masked.softmax(-1).argmax()))
        state = grammar.advance(state, ids[-1])
        kind = kinds.get(ids[-1], kind)
    return ids


def asked(
    prompts: Sequence[Sequence[int]],
    plans: Sequence[Sequence[str] | None] | None = None,
    sampling: dict[str, Sampling] | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> list[GenerationRequest]:
    """A request for each prompt, with its plan; each draws by its number in `rows`, by default its place."""
    plans = [None] * len(prompts) if plans is None else plans
    rows = range(len(prompts)) if rows is None else rows
    return [
        GenerationRequest(prompt, plan, sampling or {}, max_new_tokens, seed, row, **options)
        for prompt, plan, row in zip(prompts, plans, rows, strict=True)
    ]


class Recorder:
    """Stands in for CUDA graph recording: replaying writes new results into the same tensor."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> Recorded:
        self.recorded += 1
        result = work().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())

        return replay, result
