"""Answers as a tree of ids: a shared prefix is one branch and is read once.

Nodes are ids after the prompt, parents first; ROOT stands for the prompt. All nodes go through the model as one row,
with a mask that separates the branches (tree attention, SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from anytoken.inference.kv_cache import agreement

ROOT = -1  # the parent of answers' first ids


class BranchedCache(DynamicCache):
    """Keys and values of a prompt, followed by those of branches that a mask separates."""

    one_sample_a_row = (
        True  # positions that go back are another branch of the row's sample, not another sample
    )


@dataclass(frozen=True)
class AnswerTree:
    """ids and parents: of all nodes. depths: from 0. paths: the nodes of each answer, int64 [T]."""

    ids: list[int]
    parents: list[int]
    depths: list[int]
    paths: list[np.ndarray]

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> AnswerTree:
        """The tree of some answers' ids."""
        known: dict[tuple[int, int], int] = {}
        tree = cls([], [], [], [])
        for answer in answers:
            path, parent = np.empty(len(answer), np.int64), ROOT
            for depth, token in enumerate(answer):
                node = known.setdefault((parent, token), len(tree.ids))
                if node == len(tree.ids):
                    tree.ids.append(token)
                    tree.parents.append(parent)
                    tree.depths.append(depth)
                path[depth] = parent = node
            tree.paths.append(path)
        return tree

    @property
    def inner(self) -> list[int]:
        """The nodes that something follows, in order: those that the model has to read."""
        return sorted({*self.parents} - {ROOT})

    def mask(self, nodes: Sequence[int]) -> np.ndarray | None:
        """Which of some nodes, whose ancestors are among them, read which: bool [N, N]; None if it is causal."""
        place = {node: number for number, node in enumerate(nodes)}
        parents = [place.get(self.parents[node], ROOT) for node in nodes]
        if parents == list(range(ROOT, len(nodes) - 1)):
            return None
        mask = np.eye(len(nodes), dtype=bool)
        for number, parent in enumerate(parents):
            if parent != ROOT:
                mask[number] |= mask[parent]
        return mask


def branch_mask(
    config: PretrainedConfig, mask: np.ndarray, positions: Tensor, prompt: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The mask [1, 1, N, P + N] that is added to the scores of N nodes at `positions` [N] after P = `prompt` ids.

    One per layer type if some layers use sliding windows.
    """
    own = torch.from_numpy(mask).to(positions.device)
    open_ = torch.cat([own.new_ones(len(own), prompt), own], 1)
    where = torch.cat([torch.arange(prompt, device=positions.device), positions])

    def added(window: int | None) -> Tensor:
        seen = open_ if window is None else open_ & (where > positions[:, None] - window)
        closed = torch.finfo(dtype).min
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, closed)[None, None]

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if window is None or "sliding_attention" not in types:
        return added(None if types else window)
    return {"full_attention": added(None), "sliding_attention": added(window)}


def similar_answers(answers: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Rows of answers in batches whose trees have at most `most` nodes, or one answer; alike ones lie together."""
    batch: list[int] = []
    nodes, before = 0, answers[0][:0]
    for row in sorted(range(len(answers)), key=lambda row: tuple(answers[row])):
        answer = answers[row]
        nodes += len(answer) - agreement(answer, before)
        if batch and nodes > most:
            yield batch
            batch, nodes = [], len(answer)
        batch.append(row)
        before = answer
    yield batch
