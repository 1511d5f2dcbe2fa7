"""Log-likelihoods of answers: any segments after any prompt, with the prompt read once.

Each answer is scored as the assistant's whole reply: its ids and the end id, every id under the softmax over the ids
that the grammar allows at its place, as in decoding. Ids without an alternative, such as the close id of an image,
have probability 1. The keys and values of the prompt are shared by all answers, which are read in batches of similar
length. Length normalization follows GPT-3 (arXiv 2005.14165); PMI compares with the likelihood after an empty prompt,
which removes the prior of an answer (2104.08315).

Shapes: N answers, T ids of the longest, P prompt ids, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from anytoken.grammar import Grammar
from anytoken.inference.answer_tree import ROOT, AnswerTree, BranchedCache, branch_mask, similar_answers
from anytoken.inference.engine import Engine
from anytoken.model.attention import usable_attention
from anytoken.model.grid_positions import CodeWalk, Place
from anytoken.training.losses.balanced import grammar_groups
from anytoken.training.losses.linear_cross_entropy import linear_cross_entropy
from anytoken.utils.errors import RequestError

Normalize = Literal["none", "tokens", "pmi"]
T = TypeVar("T")
Given = dict[str, Any]
Steps = Generator[None, None, T]  # work in parts; what it returns is the result
PART = 512  # ids of one forward, unless a single answer is longer


@dataclass(frozen=True)
class Score:
    """The log-likelihood of one answer, in nats.

    ids: of the answer, int64 [T], with the end id. logprobs: of each id given all before it, float32 [T]. segments:
    kind and summed log-likelihood of each segment in order; the end id belongs to the last one. prior: log-likelihood
    after an empty prompt, if requested.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    segments: tuple[tuple[str, float], ...]
    prior: float | None = None

    @property
    def total(self) -> float:
        """Log-likelihood of the whole answer."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def per_token(self) -> float:
        """Mean log-likelihood of an id."""
        return self.total / len(self.ids)

    @property
    def pmi(self) -> float:
        """Pointwise mutual information of prompt and answer: `total` less `prior`; RequestError without a prior."""
        if self.prior is None:
            raise RequestError('This score has no prior: ask for it with normalize="pmi".')
        return self.total - self.prior

    def value(self, normalize: Normalize) -> float:
        """The score under a normalization."""
        return {"none": lambda: self.total, "tokens": lambda: self.per_token, "pmi": lambda: self.pmi}[
            normalize
        ]()


@dataclass(frozen=True)
class Classification:
    """`label` is the most likely of `labels`; probabilities: of each label among all of them, in their order."""

    label: Any
    labels: tuple[Any, ...]
    probabilities: tuple[float, ...]

    def top(self, count: int = 5) -> list[tuple[Any, float]]:
        """The `count` most likely labels with their probabilities, best first."""
        pairs = zip(self.labels, self.probabilities, strict=True)
        return sorted(pairs, key=itemgetter(1), reverse=True)[:count]


def classify(labels: Sequence[Any], scores: Sequence[float]) -> Classification:
    """Labels with the softmax of their scores."""
    probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0)
    return Classification(labels[int(probabilities.argmax())], tuple(labels), tuple(probabilities.tolist()))


def perplexity(grammar: Grammar, score: Score) -> float:
    """exp of the mean negative log-likelihood of the ids of a score that have an alternative."""
    classes = grammar.loss_rows(torch.from_numpy(score.ids)).tolist()
    alone = {
        number
        for number, ranges in enumerate(grammar.class_ranges)
        if sum(stop - start for start, stop in ranges) == 1
    }
    counted = sum(number not in alone for number in classes)
    return math.exp(-score.total / counted)


def check_normalize(normalize: str) -> None:
    """RequestError for an unknown normalization."""
    if normalize not in get_args(Normalize):
        raise RequestError(f"normalize is one of {', '.join(get_args(Normalize))}; received {normalize!r}.")


def check_length(engine: Engine, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
    """RequestError unless the prompt and the longest answer fit the context."""
    longest = max(map(len, answers))
    if len(prompt) + longest > engine.context:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens and the longest answer {longest}, but the context is "
            f"{engine.context} tokens: shorten one of them."
        )


def score_ids(engine: Engine, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Score]:
    """Score answers, each the ids of a reply with its end id, after the ids of a prompt.

    RequestError if prompt and answer do not fit the context.
    """
    return drain(score_steps(engine, prompt, answers))


def drain(steps: Steps[T]) -> T:
    """Run work in parts to its end; returns the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def score_steps(
    engine: Engine,
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    prior: Sequence[int] | None = None,
) -> Steps[list[Score]]:
    """`score_ids` in parts: it yields after each forward pass of at most about PART ids, so that other work can run in
    between.

    prior: ids of the empty prompt, to also score the answers after it.
    """
    check_length(engine, prompt, answers)
    found = yield from _logprobs(engine, prompt, answers)
    priors: list[float | None] = [None] * len(answers)
    if prior is not None:
        priors = [float(one.sum()) for one in (yield from _logprobs(engine, prior, answers))]
    return [
        Score(np.asarray(ids), logprobs, segment_sums(engine.grammar, ids, logprobs), before)
        for ids, logprobs, before in zip(answers, found, priors, strict=True)
    ]


@torch.inference_mode()
def _logprobs(
    engine: Engine, prompt: Sequence[int], answers: Sequence[Sequence[int]]
) -> Steps[list[np.ndarray]]:
    """Log-probability of every id of every answer, each float32 [T]."""
    device, cache, places = engine.lm.device, BranchedCache(), _Places(engine.lm)
    for start in range(0, len(prompt), PART):
        part = prompt[start : start + PART]
        ids, where = torch.tensor([list(part)], device=device), places.walked(part)
        # [1, 1, D]: predicts the first id of every answer
        first = _features(engine, ids, cache, **where)[:, -1:]
        yield
    result: dict[int, np.ndarray] = {}
    for rows in similar_answers(answers, PART):
        tree = AnswerTree.of([answers[row] for row in rows])
        inner, features = tree.inner, first
        if inner:
            where = places.branched(tree, inner)
            features = torch.cat([first, _branch_features(engine, tree, inner, cache, len(prompt), where)], 1)
            cache.crop(-len(inner))
        place = {node: number for number, node in enumerate([ROOT, *inner])}
        parents = torch.tensor([place[parent] for parent in tree.parents], device=device)
        scored = _target_logprobs(engine, features[0, parents], torch.tensor(tree.ids, device=device))
        found = scored.float().cpu().numpy()
        result |= {row: found[path] for row, path in zip(rows, tree.paths, strict=True)}
        yield
    return [result[row] for row in range(len(answers))]


def _branch_features(
    engine: Engine, tree: AnswerTree, nodes: Sequence[int], cache: DynamicCache, prompt: int, places: Given
) -> Tensor:
    """`_features` of tree nodes, which attend to the cached prompt and their ancestors."""
    device, mask = engine.lm.device, tree.mask(nodes)
    ids = torch.tensor([[tree.ids[node] for node in nodes]], device=device)
    if mask is None:
        return _features(engine, ids, cache, **places)
    positions = prompt + torch.tensor([tree.depths[node] for node in nodes], device=device)
    config, dtype = engine.lm.config.get_text_config(), engine.lm.get_input_embeddings().weight.dtype
    added = branch_mask(config, mask, positions, prompt, dtype)
    return _features(engine, ids, cache, attention_mask=added, position_ids=positions[None], **places)


class _Places:
    """`code_places` of a model with grid positions; nothing for others."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self._walk = CodeWalk.of(lm)
        self._device = lm.device

    def walked(self, ids: Sequence[int]) -> Given:
        """Places of further prompt ids."""
        return self._given([] if self._walk is None else map(self._walk.step, ids))

    def branched(self, tree: AnswerTree, nodes: Sequence[int]) -> Given:
        """Places of tree nodes after the prompt; parents come first."""
        if self._walk is None:
            return {}
        walks, found = {ROOT: self._walk}, []
        for node in nodes:
            walks[node] = walks[tree.parents[node]].copy()
            found.append(walks[node].step(tree.ids[node]))
        return self._given(found)

    def _given(self, places: Iterable[Place]) -> Given:
        return (
            {} if self._walk is None else {"code_places": torch.tensor([list(places)], device=self._device)}
        )


def _features(engine: Engine, ids: Tensor, cache: DynamicCache, **given: Any) -> Tensor:
    """Input of the head for ids [1, T] after the cache: [1, T, D], or logits [1, T, V] of an unknown kind of head.

    given: a mask of branches, which FlashAttention cannot take, and their positions; what `_Places` gives.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True, **given}
    with usable_attention(engine.lm, cached=True, masked="attention_mask" in given):
        if engine.head().sliced:
            return engine.lm.base_model(**inputs).last_hidden_state
        return engine.lm(**inputs).logits


def _target_logprobs(engine: Engine, features: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of targets [N] among the ids that the grammar allows, from `_features` [N, ...]."""
    groups = grammar_groups(targets, engine.grammar)
    if engine.head().sliced:
        layer = engine.head().layer
        if layer.bias is None:
            weights = torch.zeros(len(targets), device=targets.device)
            return -linear_cross_entropy(features, layer.weight, targets, weights, groups=groups).nll
        features = layer(features)
    found = features.new_empty(len(targets), dtype=torch.float32)
    for where, ranges in groups:
        logits = features[where].float()
        spans = torch.cat([logits[:, start:stop] for start, stop in ranges], 1)
        found[where] = logits.gather(1, targets[where, None]).squeeze(1) - spans.logsumexp(1)
    return found


def segment_sums(grammar: Grammar, ids: Sequence[int], logprobs: np.ndarray) -> tuple[tuple[str, float], ...]:
    """Kind and summed log-likelihood of each segment of a reply's ids; control ids belong to the segment before
    them."""
    space = grammar.token_space
    kinds = {space.open_token(name): name for name in space.modalities}
    found: list[tuple[str, float]] = []
    for token, logprob in zip(ids, logprobs.tolist(), strict=True):
        kind = "text" if token < space.text_size else kinds.get(token)
        if kind is not None and not (kind == "text" and found and found[-1][0] == "text"):
            found.append((kind, 0.0))
        last = found[-1]
        found[-1] = (last[0], last[1] + logprob)
    return tuple(found)
