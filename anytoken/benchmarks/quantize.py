"""Weights in int8 against the same in float32, on the CPU: memory, decoding speed, quality on held-out files."""

from __future__ import annotations

import math
from functools import partial

import torch

from anytoken import recipes
from anytoken.benchmarks.harness import Figures, interleaved_timing
from anytoken.emoji_world.demo import exhibits
from anytoken.inference.api import AnyToken, load
from anytoken.model.quantize import KINDS, weight_bytes

PROMPT, OUTPUT = "a fox, 3d, blue background", "image"


def bench_quantize(name: str, repeats: int, each: int) -> Figures:
    """One row per side: megabytes of parameters, tokens/s of one reply, bits per token of `each` answers a kind."""
    models = {"float32": load(name, "cpu"), **{kind: load(name, "cpu", quantize=kind) for kind in KINDS}}
    sequences = held_out(models["float32"], each)
    taken = interleaved_timing({side: partial(_reply, model) for side, model in models.items()}, repeats)
    rows = [
        {
            "weights": side,
            "MB": weight_bytes(model.lm) / 1e6,
            "tokens/s": len(_reply(model)) / taken[side],
            "speed": taken["float32"] / taken[side],
            "bits/token": bits_per_token(model, sequences),
        }
        for side, model in models.items()
    ]
    return {"model": name, "prompt": PROMPT, "output": OUTPUT, "repeats": repeats, "each": each, "rows": rows}


def held_out(model: AnyToken, each: int) -> list[tuple[list[int], list[bool]]]:
    """The held-out questions of the demo with their true answers, as ids and what of them is to be predicted."""
    return [
        model.processor.encode_training(
            [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": [one.truth]}]
        )
        for one in exhibits(recipes.assets(), each)
        if one.truth.kind == one.target
    ]


@torch.inference_mode()
def bits_per_token(model: AnyToken, sequences: list[tuple[list[int], list[bool]]]) -> float:
    """Mean cross-entropy of the answers' ids, over the whole vocabulary."""
    total, count = 0.0, 0
    for ids, learn in sequences:
        row = torch.tensor([ids])
        chosen = torch.tensor(learn[1:])
        logits = model.lm(input_ids=row, use_cache=False).logits[0, :-1][chosen]
        loss = torch.nn.functional.cross_entropy(logits.float(), row[0, 1:][chosen], reduction="sum")
        total, count = total + loss.item(), count + int(chosen.sum())
    return total / count / math.log(2)


def _reply(model: AnyToken) -> list[int]:
    return model.generate(PROMPT, OUTPUT, seed=0).ids
