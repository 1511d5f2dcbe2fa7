"""Decoding beside `generate` of transformers: same weights, same grammar, both greedy, and the ids must agree."""

from __future__ import annotations

from functools import partial

import torch

from anytoken.evaluation.bench import BenchError, Figures, take_turns
from anytoken.inference.api import AnyToken
from anytoken.inference.logits_processor import GrammarLogitsProcessor

ROWS = (1, 8)


def bench_generate(model: AnyToken, kind: str, prompt: str, repeats: int) -> Figures:
    """Tokens per second of both sides for one row and for eight; BenchError if their ids differ."""
    ids, space = model.encode_prompt(prompt), model.token_space
    limit = len(model.generate_ids([ids], kind, temperature=0, cfg_scale=1)[0].ids)

    def ours(rows: int) -> list[list[int]]:
        return [one.ids for one in model.generate_ids([ids] * rows, kind, temperature=0, cfg_scale=1)]

    def transformers(rows: int) -> list[list[int]]:
        grammar = GrammarLogitsProcessor(model.processor.grammar, len(ids), [kind])
        batch = torch.tensor([ids] * rows)
        output = model.lm.generate(
            batch, attention_mask=torch.ones_like(batch), logits_processor=[grammar], do_sample=False,
            max_new_tokens=2 * limit, pad_token_id=space.pad, eos_token_id=space.end,
        )  # fmt: skip
        return [row[: row.index(space.end) + 1] for row in output[:, len(ids) :].tolist()]

    figures: Figures = {"kind": kind, "prompt": prompt, "repeats": repeats, "rows": []}
    for rows in ROWS:
        if ours(rows) != transformers(rows):
            raise BenchError("The two sides give different ids: there is nothing to compare.")
        sides = {"ours": partial(ours, rows), "transformers": partial(transformers, rows)}
        taken = take_turns(sides, repeats)
        tokens = rows * limit
        figures["rows"].append(
            {
                "batch": rows,
                "tokens/s": tokens / taken["ours"],
                "transformers tokens/s": tokens / taken["transformers"],
                "ratio": taken["transformers"] / taken["ours"],
            }
        )
    return figures
