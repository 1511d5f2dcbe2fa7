"""Best-fit packing of training sequences into rows of T ids, with position ids that restart at each sequence.

There is no attention mask: restarting positions keep sequences apart (with ``use_cache=False``). Sequences wait in a
pool. Each row takes the one that has waited longest, and those of the pool that fill the rest of the row best: a
subset sum, computed on the bits of one integer. So rows are nearly full, no token is lost, and no length waits forever
or is drawn less often. (Krell et al., arXiv 2107.02027, pack a whole set by its
histogram of lengths; Ding et al., arXiv 2404.10830, by best-fit decreasing.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from anytoken.utils.errors import DataError

if TYPE_CHECKING:  # the model imports this file, and does not need what makes sequences
    from anytoken.data.views import TrainingSequence

POOL = 256  # sequences to choose from, at least; more where a batch holds more
CHOICE = 1024  # sequences that one row chooses from, at least, where more wait: it need not look at all of a large pool
EXACT = (
    16_384  # ids of a row that are filled by the best choice; what is longer is filled in turn up to there
)
DRAWN_TOGETHER = 16  # samples that a worker draws at a time
FEW = 1000  # the share of unusable draws is taken over at least this many


@dataclass
class PackState:
    """The state of a stream: the next sample to draw, and the drawn samples that wait, oldest first."""

    next_index: int = 0
    waiting: list[int] = field(default_factory=list)


def best_fit(lengths: Sequence[int], room: int) -> list[int]:
    """Indices of the lengths with the largest sum that fits into ``room``; earlier ones win ties."""
    reached, fits = [1], (1 << room + 1) - 1  # bit n is set if some of the lengths so far sum to n
    for length in lengths:
        if reached[-1] >> room:
            break
        reached.append((reached[-1] | reached[-1] << length) & fits)
    left, places = reached.pop().bit_length() - 1, []
    while left:
        place = len(reached) - 1
        if not reached.pop() >> left & 1:  # not reached without this one
            places.append(place)
            left -= lengths[place]
    return places[::-1]


def sample_starts(position_ids: Tensor) -> Tensor:
    """Where samples start, bool [B, T]: at the start of each row and where positions [B, T] do not increase by one."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def flash_lengths(position_ids: Tensor) -> dict[str, Any]:
    """Arguments of FlashAttention for S samples in concatenated rows, from their positions [B, T].

    ``cu_seq_lens_q`` and ``_k``, sample boundaries, int32 [S + 1]; ``max_length_q`` and
    ``_k``, the longest sample.
    """
    starts = sample_starts(position_ids).flatten().nonzero().squeeze(1)
    edges = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).int()
    longest = int(edges.diff().max())
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def pack(bins: list[list[TrainingSequence]], context: int, pad: int) -> dict[str, Tensor]:
    """Lay bins of sequences out as one batch of B rows of T ids.

    Returns ``input_ids`` and ``position_ids`` int64 [B, T]; ``loss_index`` int64 [N], the flat positions
    whose next id is learned; ``targets`` int64 [N], those ids. Padding is a sequence of its own, never learned.
    """
    ids = np.full((len(bins), context), pad, dtype=np.int64)
    positions = np.zeros((len(bins), context), dtype=np.int64)
    learn = np.zeros((len(bins), context), dtype=bool)
    for row, sequences in enumerate(bins):
        start = 0
        for sequence in sequences:
            stop = start + len(sequence.ids)
            if stop > context:
                raise DataError(f"{stop} ids in a row of {context}")
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


class _Samples(Dataset["TrainingSequence"]):
    """Samples by index, as a DataLoader with workers expects."""

    def __init__(self, sample: Callable[[int], TrainingSequence]) -> None:
        self.sample = sample

    def __getitem__(self, index: int) -> TrainingSequence:
        return self.sample(index)


class PackedStream(IterableDataset):
    """An endless stream of packed batches over ``sample(i)``; its state at any recent batch can be asked for.

    Of ``shares`` processes each draws and packs everything and is given the rows of its own ``share`` (drawing is far
    faster than training), so the batches, put together, and the state are the same for any number of processes;
    DataError if they cannot share the rows evenly. ``workers`` processes draw samples ahead; the batches are the
    same for any number of them, since packing happens here, in order. (Given to a DataLoader with workers of its own,
    each of those draws everything and hands over its part: right, but no faster.) ``skipped`` counts, by reason, the
    draws that samples were tried with in vain; DataError once their share passes ``max_bad``. The states of the last
    ``kept`` batches can be asked for, as loaders, and steps of many batches, read ahead.
    """

    def __init__(
        self,
        sample: Callable[[int], TrainingSequence],
        rows: int,
        context: int,
        pad: int,
        shares: int = 1,
        share: int = 0,
        workers: int = 0,
        max_bad: float = 1.0,
        kept: int = 64,
    ) -> None:
        super().__init__()
        if rows % shares:
            raise DataError(
                f"{rows} rows cannot be shared evenly by {shares} processes; make them a multiple"
            )
        self.sample, self.rows, self.context, self.pad = sample, rows, context, pad
        self.own = slice(share * rows // shares, (share + 1) * rows // shares)
        self.workers, self.max_bad, self.kept = workers, max_bad, kept
        self.batch_index = self.drawn = 0
        self.skipped: Counter[str] = Counter()
        self._states: dict[int, PackState] = {0: PackState()}

    def state(self, batch_index: int) -> PackState:
        """The state before batch ``batch_index``, one of the last ``kept``."""
        return self._states[batch_index]

    def restore(self, batch_index: int, state: PackState) -> None:
        """Resume from a state that ``state(batch_index)`` gave."""
        self.batch_index, self._states = batch_index, {batch_index: state}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        state, info = self._states[self.batch_index], get_worker_info()
        draws, next_index = self._draws(state), state.next_index
        # Ordered: unlike a dictionary's, its first item is found at once after thousands were taken.
        pool = OrderedDict((index, next(draws)) for index in state.waiting)
        size = sum(len(sequence.ids) for sequence in pool.values())
        while True:
            while len(pool) < POOL or size < 2 * self.rows * self.context:
                pool[next_index] = sequence = next(draws)
                size += len(sequence.ids)
                next_index += 1
                self._count(sequence)
            bins = [self._row(pool) for _ in range(self.rows)]
            size -= sum(len(sequence.ids) for row in bins for sequence in row)
            self.batch_index += 1
            self._states[self.batch_index] = PackState(next_index, list(pool))
            self._states.pop(self.batch_index - self.kept, None)
            if info is None or (self.batch_index - 1) % info.num_workers == info.id:
                yield pack(bins[self.own], self.context, self.pad)

    def _draws(self, state: PackState) -> Iterator[TrainingSequence]:
        """The waiting sequences again, then new ones."""
        loader = DataLoader(
            _Samples(self.sample),
            batch_size=DRAWN_TOGETHER,
            sampler=chain(state.waiting, count(state.next_index)),
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator(),  # a loader draws a seed, and must not move the model's random numbers
        )
        return chain.from_iterable(loader)

    def _row(self, pool: OrderedDict[int, TrainingSequence]) -> list[TrainingSequence]:
        """Take the oldest sequence from the pool, and those of the longest-waiting ones that fill its row best.

        The number of sequences considered does not depend on the pool size, so packing is linear in the rows.
        """
        _, oldest = pool.popitem(last=False)
        row, room = [oldest], self.context - len(oldest.ids)
        if room < 0:
            raise DataError(f"{len(oldest.ids)} ids in a row of {self.context}")
        while room > EXACT and pool and len(next(iter(pool.values())).ids) <= room - EXACT // 2:
            _, taken = pool.popitem(last=False)
            row.append(taken)
            room -= len(taken.ids)
        indices: list[int] = []
        lengths: list[int] = []
        total = 0
        for index, sequence in pool.items():
            if len(lengths) >= CHOICE and total >= 4 * room:
                break
            indices.append(index)
            lengths.append(len(sequence.ids))
            total += lengths[-1]
        return row + [pool.pop(indices[place]) for place in best_fit(lengths, room)]

    def _count(self, sequence: TrainingSequence) -> None:
        self.drawn += 1 + len(sequence.skipped)
        self.skipped.update(sequence.skipped)
        bad = sum(self.skipped.values())
        if bad > self.max_bad * max(self.drawn, FEW):
            reasons = ", ".join(f"{number} {reason}" for reason, number in self.skipped.most_common())
            raise DataError(
                f"{bad} of {self.drawn} drawn samples are unusable ({reasons}), more than the fraction {self.max_bad} "
                "that max_bad allows; fix the data, raise the context, or allow more"
            )
