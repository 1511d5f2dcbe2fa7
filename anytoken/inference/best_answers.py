"""The most likely of many answers without scoring them all: best-first search in the tree of their ids.

No answer is more likely than its prefix. So the branch with the highest bound is extended, one id at a time, and a
complete answer above all other bounds is the best: exact A* with the log-likelihood so far as its estimate. For an
undecided model this would read most branches one by one; after MOST_STEPS all answers are scored at once instead.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from anytoken.inference.answer_tree import ROOT, AnswerTree
from anytoken.inference.engine import Engine
from anytoken.inference.kv_cache import KVCache, agreement
from anytoken.inference.score import Normalize, check_length, score_ids
from anytoken.model.grid_positions import CodeWalk
from anytoken.training.losses.balanced import grammar_groups

MOST_STEPS = 16  # as many as take about the time of scoring 160 names


class Bounds:
    """The best value that an answer below a node of a tree can have, by the log-likelihood up to the node."""

    def __init__(self, tree: AnswerTree, normalize: Normalize, priors: Sequence[float]) -> None:
        self._normalize = normalize
        self._lengths = np.zeros(len(tree.ids))
        self._priors = np.full(len(tree.ids), np.inf)
        for path, prior in zip(tree.paths, priors, strict=True):
            self._lengths[path] = np.maximum(self._lengths[path], len(path))
            self._priors[path] = np.minimum(self._priors[path], prior)

    def __call__(self, node: int, logprob: float) -> float:
        if self._normalize == "tokens":
            return logprob / float(self._lengths[node])
        return logprob - float(self._priors[node]) if self._normalize == "pmi" else logprob


@torch.inference_mode()
def best_answers(
    engine: Engine,
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    top: int,
    normalize: Normalize = "none",
    prior: Sequence[int] | None = None,
) -> list[tuple[int, float]]:
    """The `top` best answers, each with its value, best first: the same as by `score_ids`, up to rounding.

    prior: ids of the empty prompt, for normalize="pmi"; answers then have to be scored after it, all of them.
    RequestError if prompt and answer do not fit the context.
    """
    check_length(engine, prompt, answers)
    priors = [0.0] * len(answers)
    if prior is not None:
        priors = [one.total for one in score_ids(engine, prior, answers)]
    tree = AnswerTree.of(answers)
    bound, walk = Bounds(tree, normalize, priors), _Walk(engine, prompt, tree)
    whole: dict[int, list[int]] = {}
    for row, path in enumerate(tree.paths):
        whole.setdefault(int(path[-1]), []).append(row)
    found: list[tuple[int, float]] = []
    ahead: list[
        tuple[float, int, int, float]
    ] = []  # less the bound, the order of coming, node, log-likelihood
    order, node, logprob = itertools.count(), ROOT, 0.0
    for _ in range(MOST_STEPS):
        for child, value in walk.children(node):
            heapq.heappush(ahead, (-bound(child, logprob + value), next(order), child, logprob + value))
        while ahead:
            below, _, node, logprob = heapq.heappop(ahead)
            if node not in whole:
                break
            found += [(row, -below) for row in whole[node]]
        if len(found) >= top or node in whole:
            return found[:top]
    scores = score_ids(engine, prompt, answers)
    values = [bound(int(path[-1]), one.total) for path, one in zip(tree.paths, scores, strict=True)]
    best = sorted(enumerate(values), key=lambda pair: -pair[1])
    return best[:top]


class _Walk:
    """The model on one branch of a tree at a time; going to another one reads what they do not share."""

    def __init__(self, engine: Engine, prompt: Sequence[int], tree: AnswerTree) -> None:
        self._engine, self._tree, self._length = engine, tree, len(prompt)
        weight = engine.lm.get_input_embeddings().weight
        self._cache = KVCache(weight.device, weight.dtype)
        self._cache.reserve(1, self._length + max(map(len, tree.paths)))
        self._walk = CodeWalk.of(engine.lm)
        self._root = self._read(self._walk, list(prompt), 0)
        self._path: list[int] = []
        self._children: dict[int, list[int]] = {}
        for node, parent in enumerate(tree.parents):
            self._children.setdefault(parent, []).append(node)

    def children(self, node: int) -> list[tuple[int, float]]:
        """The nodes that follow one, each with the log-probability of its id."""
        nodes, features, head = self._children[node], self._features(node), self._engine.head()
        ids = torch.tensor([self._tree.ids[one] for one in nodes])
        found = torch.empty(len(nodes))
        for where, ranges in grammar_groups(ids, self._engine.grammar):
            competing = torch.cat([torch.arange(start, stop) for start, stop in ranges])
            columns = (competing == ids[where, None]).int().argmax(1)
            found[where] = head(features, tuple(ranges))[0].log_softmax(0).cpu()[columns]
        return list(zip(nodes, found.tolist(), strict=True))

    def _features(self, node: int) -> torch.Tensor:
        if node == ROOT:
            return self._root
        path = [node]
        while (parent := self._tree.parents[path[0]]) != ROOT:
            path.insert(0, parent)
        shared = agreement(path, self._path)
        start = self._length + shared
        self._cache.clear_row(0)
        self._cache.show(0, 0, start)
        self._path = path
        ids, walk = [self._tree.ids[one] for one in path], self._walk
        if walk is not None:
            walk = walk.copy()
            for one in ids[:shared]:
                walk.step(one)
        return self._read(walk, ids[shared:], start)

    def _read(self, walk: CodeWalk | None, ids: list[int], start: int) -> torch.Tensor:
        """Feed ids at positions from `start` on; walk: where they begin, it goes to their end."""
        places = None if walk is None else [[walk.step(one) for one in ids]]
        positions = [list(range(start, start + len(ids)))]
        return self._engine.head().features([ids], positions, self._cache, 0, places)
