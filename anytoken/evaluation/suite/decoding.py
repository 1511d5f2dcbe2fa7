"""Get a model's answers to questions: replies, choices, scores or rankings, as JSON lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anytoken.evaluation.suite.samples import Outcome, Sample, TaskSet
from anytoken.evaluation.suite.schema import Classify, Generate, Retrieve, Score, Task
from anytoken.evaluation.suite.template import fill, segment_types
from anytoken.inference.score import score_ids
from anytoken.segments import Segment, Text, usual_suffix
from anytoken.utils.errors import EvaluationError

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken

Line = dict[str, Any]
BLOCK = 20  # prompts that are answered at once; those of a block share a seed


def answer(
    model: AnyToken, task: Task, data: TaskSet, samples: Sequence[Sample], done: set[int], media: Path
) -> Iterator[list[Line]]:
    """Lines for the samples that are not done, block by block; media of replies are saved below `media`."""
    decoding = task.decoding
    items, right = data.items(samples) if isinstance(decoding, Retrieve) else ([], [])
    vectors, between = None, None
    if isinstance(decoding, Retrieve) and decoding.by == "embed":
        vectors = _embed(model, task, items)
        between = _embed(model, task, data.items(samples, decoding.via)[0]) if decoding.via else None
    for start in range(0, len(samples), BLOCK):
        places = [
            place for place in range(start, min(start + BLOCK, len(samples))) if samples[place].id not in done
        ]
        block = [samples[place] for place in places]
        if not block:
            continue
        if isinstance(decoding, Generate):
            lines = _generate(model, task, block, task.seed + start, media)
        elif isinstance(decoding, Classify):
            lines = [_classify(model, decoding, one) for one in block]
        elif isinstance(decoding, Score):
            lines = [_score(model, decoding, data, one) for one in block]
        else:
            wanted = [right[place] for place in places]
            lines = _retrieve(model, task, block, items, vectors, between, wanted)
        yield [{"id": one.id, **line} for one, line in zip(block, lines, strict=True)]


def _generate(model: AnyToken, task: Task, block: Sequence[Sample], seed: int, media: Path) -> list[Line]:
    decoding = task.decoding
    assert isinstance(decoding, Generate)
    prompts = [one.prompt for one in block]
    replies = model.generate(prompts, task.output, batch=True, seed=seed, **decoding.options)
    return [
        {
            "answer": [
                _saved(segment, media, f"{one.id:06d}-{place}")
                for place, segment in enumerate(reply.segments)
            ],
            "finish_reason": reply.finish_reason,
            "new_tokens": reply.usage.new_tokens,
        }
        for one, reply in zip(block, replies, strict=True)
    ]


def _saved(segment: Segment, media: Path, stem: str) -> Line:
    """A segment as a part of a message; media become files whose names are relative to the folder above `media`."""
    if isinstance(segment, Text):
        return {"type": "text", "text": segment.text}
    if segment.kind == "dna":
        return {"type": "dna", "dna": segment.bases}  # type: ignore[attr-defined]
    path = segment.save(media / f"{stem}{usual_suffix(segment.kind)}")
    return {"type": segment.kind, segment.kind: f"{media.name}/{path.name}"}


def _classify(model: AnyToken, decoding: Classify, sample: Sample) -> Line:
    found = model.classify(sample.prompt, list(sample.labels), decoding.normalize)
    probabilities = [round(one, 6) for one in found.probabilities]
    return {"choice": int(np.argmax(found.probabilities)), "probabilities": probabilities}


def _score(model: AnyToken, decoding: Score, data: TaskSet, sample: Sample) -> Line:
    """Log-likelihoods of `of` and `against`; without a prompt, after the empty one."""
    templates = [one for one in (decoding.of, decoding.against) if one is not None]
    answers = [fill(one, sample.record, data.opener(sample.record)) for one in templates]
    if sample.messages:
        return {"scores": model.score(sample.prompt, answers, decoding.normalize)}
    if decoding.normalize == "pmi":
        raise EvaluationError(f"{data.task.name}: pmi compares a prompt with none, and this task has none.")
    replies = [model.processor.encode_reply(one) for one in answers]
    scores = score_ids(model.engine, model.processor.null_prompt(), replies)
    return {"scores": [one.value(decoding.normalize) for one in scores]}


def _retrieve(
    model: AnyToken,
    task: Task,
    block: Sequence[Sample],
    items: list[Any],
    vectors: Any,
    between: Any,
    right: list[list[int]],
) -> list[Line]:
    decoding = task.decoding
    assert isinstance(decoding, Retrieve)
    queries = _embed(model, task, [one.prompt for one in block]) if vectors is not None else None
    if queries is not None and between is not None:
        queries = between[(queries @ between.T).argmax(1)]
    lines = []
    for place, (one, wanted) in enumerate(zip(block, right, strict=True)):
        pool = _pool(decoding, task.seed, one.id, len(items), wanted)
        if queries is not None:
            scores = (queries[place] @ vectors[pool].T).tolist()
        else:
            normalize = decoding.normalize or "pmi"
            scores = model.score(one.prompt, [items[item] for item in pool], normalize)
        # a tie is no success: of equal scores the right item comes last
        order = sorted(zip(pool, scores, strict=True), key=lambda pair: (-pair[1], pair[0] in wanted))
        lines.append({"ranking": [item for item, _ in order], "right": wanted})
    return lines


def _pool(decoding: Retrieve, seed: int, number: int, count: int, wanted: list[int]) -> list[int]:
    """The items that are ranked: all, or the right ones among others drawn for this sample."""
    if decoding.candidates is None:
        return list(range(count))
    others = np.setdiff1d(np.arange(count), wanted)
    drawn = np.random.default_rng((seed, number)).permutation(others)
    return sorted([*wanted, *drawn[: max(0, decoding.candidates - len(wanted))].tolist()])


def _embed(model: AnyToken, task: Task, prompts: Sequence[Any]) -> np.ndarray:
    """Unit vectors [N, D]; EvaluationError for a model without embeddings."""
    embed = getattr(model, "embed", None)
    if embed is None:
        raise EvaluationError(
            f"{task.name} retrieves by embeddings, and this model has no embed(); set decoding.by: score, which ranks "
            "the items by their likelihood after the prompt."
        )
    blocks = [embed(list(prompts[start : start + BLOCK])) for start in range(0, len(prompts), BLOCK)]
    return np.concatenate([torch.as_tensor(one).float().cpu().numpy() for one in blocks])


def read_outcome(task: Task, sample: Sample, line: Line, folder: Path) -> Outcome:
    """A line as an outcome, its media opened."""
    if "answer" in line:
        return Outcome(sample, answer=tuple(_answer(task, line["answer"], folder)))
    if "choice" in line:
        return Outcome(sample, choice=line["choice"], probabilities=tuple(line["probabilities"]))
    if "scores" in line:
        return Outcome(sample, score=line["scores"][0] - sum(line["scores"][1:]))
    ranking = tuple(line["ranking"])
    return Outcome(sample, ranking=ranking, ranks=ranks(ranking, line["right"]))


def ranks(ranking: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """The places of the right items, from 1, in order."""
    return tuple(place for place, item in enumerate(ranking, start=1) if item in right)


def _answer(task: Task, parts: Sequence[Line], folder: Path) -> list[Segment]:
    types = segment_types()
    found: list[Segment] = []
    for part in parts:
        kind = part["type"]
        if kind in ("text", "dna"):
            found.append(types[kind](part[kind]))  # type: ignore[call-arg]
        else:
            found.append(types[kind].open(folder / part[kind]))
    pattern = getattr(task.decoding, "extract", None)
    if pattern is None:
        return found
    text = "".join(one.text for one in found if isinstance(one, Text))
    match = re.search(pattern, text, re.DOTALL)
    return [Text(match[1].strip() if match else "")]
