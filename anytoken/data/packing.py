"""Best-fit packing of training sequences into rows of T ids, with position ids that restart at each sequence.

There is no attention mask: restarting positions alone keep sequences apart (with ``use_cache=False``). A
sequence goes to the fullest row that still has room; one that fits nowhere waits for the next batch, so no
token is lost and long sequences are not drawn less often.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from anytoken.data.views import TrainingSequence

PATIENCE = 8  # sequences that may wait before a batch counts as full


class PackingError(ValueError):
    """A sequence that cannot be packed."""


@dataclass
class PackState:
    """Where a stream stands: the next sample to draw and the drawn ones that wait."""

    next_index: int = 0
    waiting: list[int] = field(default_factory=list)


def best_fit(lengths: list[int], rows: list[int]) -> list[int | None]:
    """Place each length into the row with the least room that suffices; ``rows`` (room left) is updated.

    Returns the row of each, None for those that fit nowhere.
    """
    placed: list[int | None] = []
    for length in lengths:
        fitting = [(room, row) for row, room in enumerate(rows) if room >= length]
        row = min(fitting)[1] if fitting else None
        if row is not None:
            rows[row] -= length
        placed.append(row)
    return placed


def pack(bins: list[list[TrainingSequence]], context: int, pad: int) -> dict[str, Tensor]:
    """Lay bins of sequences out as one batch of B rows of T ids.

    Returns ``input_ids`` and ``position_ids`` int64 [B, T]; ``loss_index`` int64 [N], the flat positions
    whose next id is learnt; ``targets`` int64 [N], those ids. Padding is a sequence of its own, never learnt.
    """
    ids = np.full((len(bins), context), pad, dtype=np.int64)
    positions = np.zeros((len(bins), context), dtype=np.int64)
    learn = np.zeros((len(bins), context), dtype=bool)
    for row, sequences in enumerate(bins):
        start = 0
        for sequence in sequences:
            stop = start + len(sequence.ids)
            if stop > context:
                raise PackingError(f"{stop} ids in a row of {context}")
            ids[row, start:stop], learn[row, start:stop] = sequence.ids, sequence.learn
            positions[row, start:stop] = np.arange(stop - start)
            learn[row, start] = False  # nothing stands before it
            start = stop
        positions[row, start:] = np.arange(context - start)
    learnt = np.flatnonzero(learn)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "loss_index": torch.from_numpy(learnt - 1),
        "targets": torch.from_numpy(ids.reshape(-1)[learnt]),
    }


class PackedStream(IterableDataset):
    """An endless stream of packed batches over ``sample(i)``; its state at any recent batch can be asked for.

    ``stride`` and ``offset`` split the samples between processes: each sees its own indices.
    """

    def __init__(
        self,
        sample: Callable[[int], TrainingSequence],
        rows: int,
        context: int,
        pad: int,
        stride: int = 1,
        offset: int = 0,
    ) -> None:
        super().__init__()
        self.sample, self.rows, self.context, self.pad = sample, rows, context, pad
        self.stride, self.offset = stride, offset
        self.batch_index = 0
        self._states: dict[int, PackState] = {0: PackState()}

    def state(self, batch_index: int) -> PackState:
        """The state that batch ``batch_index`` is made from; the last 64 are kept, as loaders prefetch."""
        return self._states[batch_index]

    def restore(self, batch_index: int, state: PackState) -> None:
        """Go on from a state that ``state(batch_index)`` gave."""
        self.batch_index, self._states = batch_index, {batch_index: state}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            batch, state = self._next(self._states[self.batch_index])
            self.batch_index += 1
            self._states[self.batch_index] = state
            self._states.pop(self.batch_index - 64, None)
            yield batch

    def _next(self, state: PackState) -> tuple[dict[str, Tensor], PackState]:
        bins: list[list[TrainingSequence]] = [[] for _ in range(self.rows)]
        room = [self.context] * self.rows
        waiting: list[int] = []
        queue, next_index = list(state.waiting), state.next_index
        while len(waiting) < PATIENCE:
            if not queue:
                queue.append(next_index)
                next_index += 1
            index = queue.pop(0)
            sequence = self.sample(index * self.stride + self.offset)
            (row,) = best_fit([len(sequence.ids)], room)
            if row is None:
                waiting.append(index)
            else:
                bins[row].append(sequence)
        return pack(bins, self.context, self.pad), PackState(next_index, waiting + queue)
