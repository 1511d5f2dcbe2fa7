"""Scoring many answers to one prompt: the prompt read once, against a plain forward for every answer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from anytoken.benchmarks.harness import (
    Figures,
    interleaved_timing,
)
from anytoken.inference.api import AnyToken
from anytoken.inference.score import score_ids
from anytoken.training.losses.balanced import grammar_groups
from anytoken.utils.errors import EvaluationError


def bench_score(model: AnyToken, prompt: Sequence[object], answers: Sequence[str], repeats: int) -> Figures:
    """One row per side, with the largest difference of log-likelihoods; EvaluationError if it exceeds 1e-3."""
    start = model.encode_prompt(list(prompt))
    replies = [model.processor.encode_reply(one) for one in answers]
    sides = {
        "prompt read once": lambda: [one.total for one in score_ids(model.engine, start, replies)],
        "one by one": lambda: [plain_score(model, start, ids) for ids in replies],
    }
    found = {name: run() for name, run in sides.items()}
    worst = max(abs(a - b) for a, b in zip(*found.values(), strict=True))
    if worst > 1e-3:
        raise EvaluationError(
            f"The two ways of scoring differ by up to {worst:.2g} nats: speeds say nothing."
        )
    taken = interleaved_timing(sides, repeats)
    rows = [
        {
            "side": name,
            "seconds": seconds,
            "answers/s": len(answers) / seconds,
            "speed": taken["one by one"] / seconds,
        }
        for name, seconds in taken.items()
    ]
    lengths = {"prompt_tokens": len(start), "answer_tokens": fmean(map(len, replies))}
    return {"answers": len(answers), **lengths, "largest_difference": worst, "repeats": repeats, "rows": rows}


@torch.inference_mode()
def plain_score(model: AnyToken, start: Sequence[int], ids: Sequence[int]) -> float:
    """Log-likelihood of a reply's ids by one forward over prompt and reply, in float64 after the logits."""
    logits = model.lm(input_ids=torch.tensor([[*start, *ids]], device=model.lm.device)).logits[0]
    logits, targets = logits[len(start) - 1 : -1].double().cpu(), torch.tensor(ids)
    total = 0.0
    for where, ranges in grammar_groups(targets, model.processor.grammar):
        competing = torch.cat([logits[where, a:b] for a, b in ranges], 1)
        chosen = logits[where].gather(1, targets[where, None])[:, 0]
        total += float((chosen - competing.logsumexp(1)).sum())
    return total
