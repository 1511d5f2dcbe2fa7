"""Packing loses no token, keeps sequences apart, and goes on where it stopped."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.data.packing import PackedStream, PackingError, best_fit, pack
from anytoken.data.views import TrainingSequence

PAD = 0


def make(length: int, start: int = 1) -> TrainingSequence:
    ids = np.arange(start, start + length, dtype=np.int32)
    learn = np.arange(length) >= length // 2
    return TrainingSequence(ids, learn)


def stream(rows: int = 3, context: int = 20, seed: int = 0, **split: int) -> PackedStream:
    def sample(index: int) -> TrainingSequence:
        length = int(np.random.default_rng((seed, index)).integers(2, context + 1))
        return make(length, start=1 + 100 * index)

    return PackedStream(sample, rows, context, PAD, **split)


def sequences_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Cut a batch back into its sequences, by the restarts of the positions."""
    found = []
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        found += [ids[a:b] for a, b in itertools.pairwise(starts)]
    return [sequence for sequence in found if sequence[0] != PAD]


def test_best_fit_takes_the_tightest_row() -> None:
    rows = [10, 5, 8]
    assert best_fit([5, 8, 9, 2, 6], rows) == [1, 2, 0, None, None]
    assert rows == [1, 0, 0]


def test_pack_targets_are_the_next_ids() -> None:
    batch = pack([[make(4, 10), make(3, 20)], [make(5, 30)]], context=8, pad=PAD)
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["loss_index"] + 1], batch["targets"])
    assert batch["targets"].tolist() == [12, 13, 21, 22, 32, 33, 34]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]


def test_a_first_id_is_never_a_target() -> None:
    whole = TrainingSequence(np.array([5, 6, 7], dtype=np.int32), np.ones(3, dtype=bool))
    assert pack([[whole, whole]], context=6, pad=PAD)["targets"].tolist() == [6, 7, 6, 7]


def test_too_much_for_a_row_is_an_error() -> None:
    with pytest.raises(PackingError, match="9 ids in a row of 8"):
        pack([[make(9)]], context=8, pad=PAD)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), context=st.integers(4, 40), seed=st.integers(0, 1000))
def test_every_sample_arrives_once_and_whole(rows: int, context: int, seed: int) -> None:
    source = stream(rows, context, seed)
    batches = iter(source)
    arrived = [sequence for _ in range(12) for sequence in sequences_of(next(batches))]
    state = source.state(12)
    expected = [index for index in range(state.next_index) if index not in state.waiting]
    assert sorted(arrived) == [source.sample(index).ids.tolist() for index in expected]


def test_rows_are_nearly_full() -> None:
    def short(index: int) -> TrainingSequence:
        return make(int(np.random.default_rng(index).integers(10, 80)))

    batches = iter(PackedStream(short, 8, 512, PAD))
    filled = torch.cat([next(batches)["input_ids"] != PAD for _ in range(5)])
    assert filled.float().mean() > 0.97


def test_restored_stream_gives_the_same_batches() -> None:
    first = stream()
    batches = iter(first)
    wanted = [next(batches) for _ in range(8)][5:]
    state = first.state(5)
    second = stream()
    second.restore(5, state)
    for batch, again in zip(wanted, iter(second), strict=False):
        assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_processes_share_the_samples_without_overlap() -> None:
    seen = [
        {
            ids[0]
            for _, batch in zip(range(4), stream(stride=2, offset=offset), strict=False)
            for ids in sequences_of(batch)
        }
        for offset in (0, 1)
    ]
    assert not seen[0] & seen[1]
    assert {start // 100 % 2 for start in seen[0]} == {0} and {start // 100 % 2 for start in seen[1]} == {1}
