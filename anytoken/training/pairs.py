"""Pairs for contrastive training: the two sides of a view, each as the prompt that `embed` reads.

Batch ``b`` is a function of the seed and ``b`` alone. All its pairs are of one view, so that negatives have the
modality of the positive and cannot be recognized by modality alone. No record occurs twice in a batch unless there are
too few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anytoken.data.mixture import MAX_TRIES, Mixture, _Choice
from anytoken.data.packing import PackedStream, PackState
from anytoken.data.views import Given, Piece, piece_ids
from anytoken.tokenizers.base import TokenizerError
from anytoken.utils.errors import DataError

IDS_KEPT = (
    2_000_000  # of pairs that are kept: making them takes as long as half a step that trains a head alone
)


class Pair(NamedTuple):
    """Ids of both sides, the group of records that are positives of each other, the weight of the pair, and failed
    draws."""

    left: list[int]
    right: list[int]
    group: Any
    weight: float
    skipped: tuple[str, ...] = ()


class PairMixture(Mixture):
    """Draws batches of pairs from weighted sources and views; `positives` and `weight_by` are keys of records."""

    def __init__(
        self, *arguments: Any, positives: str | None = None, weight_by: str | None = None, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self.positives, self.weight_by = positives, weight_by
        self._made: dict[tuple[int, int], Pair] = {}  # by choice and row, where a row makes one pair only
        self._ids_kept = 0
        for choice in self.choices:
            if choice.view.special or choice.view.given or not choice.view.sources:
                raise DataError(
                    f"{choice.source.spec.path}: view {choice.view.name!r} has no two sides to pair; write left->right "
                    "without parentheses"
                )
            for key in filter(None, (positives, weight_by)):
                records = choice.source.shards.records
                if any(records[row].get(key) is None for row in choice.rows):
                    raise DataError(f"{choice.source.spec.path}: records without the key {key!r}")

    def _first_samples(self, steps: np.ndarray, *unused: Any) -> np.ndarray:
        return steps  # a batch is a step

    @property
    def view_names(self) -> list[str]:
        """The views, each once."""
        return list(dict.fromkeys(choice.view.name for choice in self.choices))

    def kinds(self) -> list[str]:
        """The modalities of all sides, in the order of the token space."""
        found = set()
        for choice in self.choices:
            pair = choice.source.spec.pair_with
            taken = pair.take if pair is not None else {}
            for term in (*choice.view.sources, *choice.view.targets):
                key = taken.get(term, term) if isinstance(term, str) else "text"
                found.add(key if key in choice.source.processor.tokenizers else "text")
        return [name for name in self.controls.modality_names if name in found]

    def draw(self, batch: int, size: int) -> tuple[str, list[Pair]]:
        """The view of a batch and its pairs; DataError if too few records fit the context."""
        rng = np.random.default_rng((self.seed, batch))
        cumulated = self._cumulated[self._firsts.searchsorted(batch, side="right") - 1]
        choice = self.choices[int(cumulated.searchsorted(rng.random(), side="right"))]
        order = rng.permutation(choice.rows)
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(choice.rows)])
        rows = iter(order.tolist())
        return choice.view.name, [self._fitting(choice, rows, rng) for _ in range(size)]

    def _fitting(self, choice: _Choice, rows: Iterator[int], rng: np.random.Generator) -> Pair:
        skipped: list[str] = []
        for _ in range(MAX_TRIES):
            row = next(rows, None)
            row = int(rng.choice(choice.rows)) if row is None else row
            try:
                pair = self.pair(choice, row, rng)
            except TokenizerError:
                skipped.append(f"of illegal codes in {choice.source.spec.path}")
                continue
            if max(len(pair.left), len(pair.right)) <= self.context:
                return pair._replace(skipped=tuple(skipped))
            skipped.append(f"longer than the context of {self.context} ids in {choice.source.spec.path}")
        reasons = ", ".join(f"{number} {reason}" for reason, number in Counter(skipped).most_common())
        raise DataError(
            f"nothing could be drawn in {MAX_TRIES} tries ({reasons}); raise context or fix the data"
        )

    @property
    def num_pairs(self) -> int:
        """The number of pairs that can be drawn, counting joins with every partner."""
        return sum(
            len(choice.source.partners_of(int(row))) or 1 for choice in self.choices for row in choice.rows
        )

    def all_prompts(self) -> Iterator[list[int]]:
        """Both sides of every pair that can be drawn, in the order of the sources, with repetitions."""
        rng = np.random.default_rng(0)  # nothing is left to it
        for choice in self.choices:
            for row in choice.rows.tolist():
                partners: list[int | None] = [*choice.source.partners_of(row)]
                for partner in partners or [None]:
                    try:
                        pair = self.pair(choice, row, rng, partner)
                    except TokenizerError:
                        continue
                    if max(len(pair.left), len(pair.right)) <= self.context:
                        yield pair.left
                        yield pair.right

    def pair(self, choice: _Choice, row: int, rng: np.random.Generator, partner: int | None = None) -> Pair:
        """The pair of a record and view; partner: the joined record, random if None."""
        key = id(choice), row
        if key in self._made:
            return self._made[key]
        partners = choice.source.partners_of(row)
        if partners and partner is None:
            partner = partners[int(rng.integers(len(partners)))]
        (_, left), (_, right) = choice.source.turns(row, choice.view, rng, partner)
        if choice.source.processor.first_frames:  # the right side is a prompt, too
            backward = replace(choice.view, sources=choice.view.targets, targets=choice.view.sources)
            (_, right), _ = choice.source.turns(row, backward, rng, partner)
        record = choice.source.shards.records[row]
        group = row if self.positives is None else str(record[self.positives])
        weight = 1.0 if self.weight_by is None else float(record[self.weight_by])
        made = Pair(self._prompt(left), self._prompt(right), group, weight)
        if choice.source.spec.pair_with is None and self._ids_kept < IDS_KEPT:
            self._made[key] = made
            self._ids_kept += len(made.left) + len(made.right)
        return made

    def _prompt(self, pieces: Sequence[Piece | Given]) -> list[int]:
        space: Any = self.controls
        content = [i for piece in pieces for i in piece_ids(piece, self._encode_text)]
        return [space.bos, space.user, *content, space.end, space.assistant]


class PairStream(PackedStream):
    """An endless stream of batches of pairs; each process gets its own part of every batch.

    A batch holds ``left_ids`` and ``right_ids`` int64 [N, T], padded on the right, their ``lengths`` [N], ``groups``
    [N], equal for positives, ``weights`` [N], and ``view``, its number.
    """

    def __init__(self, mixture: PairMixture, *arguments: Any) -> None:
        super().__init__(lambda index: None, *arguments)  # type: ignore[arg-type, return-value]
        self.mixture, self.views = mixture, mixture.view_names

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            view, pairs = self.mixture.draw(self.batch_index, self.rows)
            for pair in pairs:
                self._count(pair)  # type: ignore[arg-type]
            self.batch_index += 1
            self._states[self.batch_index] = PackState(self.batch_index)
            self._states.pop(self.batch_index - 64, None)
            yield collate(pairs, self.pad, self.own) | {"view": torch.tensor(self.views.index(view))}


def collate(pairs: Sequence[Pair], pad: int, own: slice = slice(None)) -> dict[str, Tensor]:
    """The pairs in `own` as tensors; lengths and group numbers are those of the whole batch."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(pair.group for pair in pairs))}
    batch = {
        "groups": torch.tensor([numbers[pair.group] for pair in pairs])[own],
        "weights": torch.tensor([pair.weight for pair in pairs], dtype=torch.float32)[own],
    }
    for name, sequences in (("left", [p.left for p in pairs]), ("right", [p.right for p in pairs])):
        lengths = torch.tensor([len(ids) for ids in sequences])
        ids = torch.full((len(pairs), int(lengths.max())), pad)
        ids[torch.arange(ids.shape[1]) < lengths[:, None]] = torch.tensor(
            list(chain.from_iterable(sequences))
        )
        batch |= {f"{name}_ids": ids[own], f"{name}_lengths": lengths[own]}
    return batch
