"""Scoring many answers to one prompt: the prompt read once, against a plain forward for every answer.

And naming images: the most likely of given names against a generated one, in accuracy and time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from anytoken.benchmarks.harness import Figures, interleaved_timing
from anytoken.data.records import open_media
from anytoken.data.sources import read_records
from anytoken.evaluation.metrics import same_text
from anytoken.evaluation.suite.intervals import difference, figure
from anytoken.inference.api import AnyToken
from anytoken.inference.best_answers import best_answers
from anytoken.inference.score import score_ids
from anytoken.inference.zero_shot import ZeroShot
from anytoken.segments import KINDS
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
            f"The two ways of scoring differ by up to {worst:.2g} nats, so their speeds cannot be compared."
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


QUESTION = "What is this?"
BASE, READ = "generate the caption", "read the image alone"
TEMPLATES = 8  # number of prompt templates per class name, taken from the set's captions


def bench_naming(model: AnyToken, file: Path, count: int, seed: int = 0) -> list[Figures]:
    """Ways to name held-out images of a set: accuracy with its 95 % interval, seconds per image, speed, difference.

    file: records with `image`, a caption `text` that begins with the name and a comma, and `split`. The names of all
    records are the choice. Images come one at a time, and all ways take turns on each. Seconds are of the CPU, so other
    work on the machine counts little. speed: how many times as fast as generating the caption; difference: of accuracy
    to it, paired. The row "read the image alone" has no answers: every way that asks the model reads the image, so none
    is faster. EvaluationError for a set without a test split.
    """
    records = list(read_records(file))
    held_out = [one for one in records if one.get("split") == "test"]
    if not held_out:
        raise EvaluationError(f"{file} has no records of split test.")
    labels = sorted({_name(one["text"]) for one in records})
    replies = [model.processor.encode_reply(one) for one in labels]
    prior = np.array([one.total for one in score_ids(model.engine, model.processor.null_prompt(), replies)])

    def generate(prompt: list[Any]) -> list[str]:
        return [_name(model.generate(prompt, "text", seed=seed, temperature=0).text)]

    def classify(image: Any) -> list[str]:
        scores = np.array(model.score([image, QUESTION], labels))
        return [labels[int(one.argmax())] for one in (scores, scores - prior)]

    beginnings = [model.processor.encode_reply(f"{one},")[:-1] for one in labels]

    def begin(image: Any) -> list[str]:
        return [labels[best_answers(model.engine, model.encode_prompt([image]), beginnings, 1)[0][0]]]

    def read(image: Any) -> list[str]:
        score_ids(model.engine, model.encode_prompt([image]), [beginnings[0][:1]])
        return []

    ways: dict[tuple[str, ...], Callable[[Any], list[str]]] = {
        (BASE,): lambda image: generate([image]),
        ("generate the name",): lambda image: generate([image, QUESTION]),
        ("score all names", "score all names, pmi"): classify,
        ("best name",): lambda image: [labels[model.rerank([image, QUESTION], labels, "none", top=1)[0][0]]],
        ("best name, as the caption's beginning",): begin,
        (READ,): read,
    }
    if model.embedding_heads:
        rests = sorted({one["text"].removeprefix(_name(one["text"])) for one in records})
        templates = ["{}" + rest for rest in rests[:: max(1, len(rests) // TEMPLATES)]]
        zero_shot = ZeroShot(model, labels, templates)
        ways["zero-shot by embedding",] = lambda image: [zero_shot.classify([image])[0].label]
    right: dict[str, list[float]] = {name: [] for names in ways for name in names}
    seconds = dict.fromkeys(right, 0.0)
    rows = np.random.default_rng(seed).permutation(len(held_out))[:count]
    for place, number in enumerate(tqdm(rows, desc="naming")):
        record = held_out[number]
        image = open_media(record["image"], KINDS["image"], file.parent)
        for names, way in ways.items():
            if place == 0:
                way(image)  # warm up
            start = time.process_time()
            answers = way(image)
            taken = time.process_time() - start
            for name in names:
                seconds[name] += taken
            for name, answer in zip(names, answers, strict=bool(answers)):
                right[name].append(float(same_text(answer, _name(record["text"]))))
    found = {name: np.array(scores) for name, scores in right.items() if scores}

    def row(name: str) -> Figures:
        figures: Figures = {"side": name, "images": len(rows), "names": len(labels)}
        if name in found:
            figures["accuracy"] = figure(_mean, found[name], is_mean=True)
            figures["difference"] = difference(_mean, found[name], found[BASE], is_mean=True)
        times = {"seconds per image": seconds[name] / len(rows), "speed": seconds[BASE] / seconds[name]}
        return figures | times

    return [row(name) for name in seconds]


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean())


def _name(caption: str) -> str:
    return caption.split(",")[0]


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
