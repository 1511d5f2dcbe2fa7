"""Packing loses no token, keeps sequences apart, and goes on where it stopped."""

import dataclasses
import itertools
import json
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from anytoken.data import packing
from anytoken.data.packing import (
    POOL,
    PackedStream,
    PackState,
    best_fit,
    flash_lengths,
    pack,
)
from anytoken.data.views import TrainingSequence
from anytoken.utils.errors import DataError

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


@given(lengths=st.lists(st.integers(1, 30), max_size=9), room=st.integers(0, 60))
def test_best_fit_is_the_best_of_all_subsets(lengths: list[int], room: int) -> None:
    places = best_fit(lengths, room)
    assert len(set(places)) == len(places)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(lengths, n) for n in range(len(lengths) + 1)
    )
    assert sum(lengths[place] for place in places) == max(sum(one) for one in subsets if sum(one) <= room)


def test_best_fit_prefers_those_that_came_early() -> None:
    assert best_fit([4, 6, 10, 10], 10) == [0, 1]


def test_pack_targets_are_the_next_ids() -> None:
    batch = pack([[make(4, 10), make(3, 20)], [make(5, 30)]], context=8, pad=PAD)
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["loss_index"] + 1], batch["targets"])
    assert batch["targets"].tolist() == [12, 13, 21, 22, 32, 33, 34]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]


def test_flash_attention_is_told_every_sample_of_every_row() -> None:
    positions = pack([[make(4), make(3)], [make(5)]], context=8, pad=PAD)["position_ids"]
    told = flash_lengths(positions)
    (wanted, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions.reshape(1, -1))
    assert wanted.tolist() == [0, 4, 7, 8, 13, 16] and longest == 5
    for side in ("q", "k"):
        lengths = told[f"cu_seq_lens_{side}"]
        assert lengths.dtype == torch.int32 and torch.equal(lengths, wanted)
        assert told[f"max_length_{side}"] == 5 and isinstance(told[f"max_length_{side}"], int)


def test_a_first_id_is_never_a_target() -> None:
    whole = TrainingSequence(np.array([5, 6, 7], dtype=np.int32), np.ones(3, dtype=bool))
    assert pack([[whole, whole]], context=6, pad=PAD)["targets"].tolist() == [6, 7, 6, 7]


def test_too_much_for_a_row_is_an_error() -> None:
    with pytest.raises(DataError, match="9 ids in a row of 8"):
        pack([[make(9)]], context=8, pad=PAD)


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 5), context=st.integers(4, 40), seed=st.integers(0, 1000))
def test_every_sample_arrives_once_and_whole(rows: int, context: int, seed: int) -> None:
    source = stream(rows, context, seed)
    batches = iter(source)
    arrived = [sequence for _ in range(12) for sequence in sequences_of(next(batches))]
    state = source.state(12)
    expected = [index for index in range(state.next_index) if index not in state.waiting]
    assert sorted(arrived) == [source.sample(index).ids.tolist() for index in expected]


def test_rows_are_all_but_full() -> None:
    def short(index: int) -> TrainingSequence:
        return make(int(np.random.default_rng(index).integers(10, 80)))

    batches = iter(PackedStream(short, 8, 512, PAD))
    filled = torch.cat([next(batches)["input_ids"] != PAD for _ in range(5)])
    assert filled.float().mean() > 0.999


def test_a_length_that_fits_nothing_is_not_kept_waiting() -> None:
    def often_short(index: int) -> TrainingSequence:
        return make(19 if index % 10 == 0 else 5, start=1 + 100 * index)

    source = PackedStream(often_short, 4, 20, PAD)
    for number, _ in zip(range(1, 40), source, strict=False):
        state = source.state(number)
        assert state.waiting == sorted(state.waiting)  # by age
        assert state.next_index - state.waiting[0] <= POOL + 10 * 4


def test_restored_stream_gives_the_same_batches() -> None:
    first = stream()
    batches = iter(first)
    wanted = [next(batches) for _ in range(90)][85:]
    second = stream()
    second.restore(85, PackState(**json.loads(json.dumps(dataclasses.asdict(first.state(85))))))
    for batch, again in zip(wanted, iter(second), strict=False):
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert first.state(90) == second.state(90)


def take(batches: Iterable[dict[str, torch.Tensor]], count: int = 7) -> list[dict[str, torch.Tensor]]:
    return [batch for _, batch in zip(range(count), batches, strict=False)]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(workers: int) -> None:
    alone = take(stream())
    own = take(stream(workers=workers))
    loaders = take(DataLoader(stream(), batch_size=None, num_workers=workers))
    for other in (own, loaders):
        for batch, again in zip(alone, other, strict=True):
            assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_stream_moves_no_random_numbers_of_the_model() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    take(stream())
    assert torch.rand(1) == wanted


def test_too_many_useless_draws_are_an_error_that_counts_them() -> None:
    def hard(index: int) -> TrainingSequence:
        return dataclasses.replace(make(10), skipped=("too long",) if index % 10 == 0 else ())

    source = PackedStream(hard, 4, 20, PAD, max_bad=0.2)
    take(source, 200)
    assert source.skipped["too long"] / source.drawn == pytest.approx(1 / 11, rel=0.05)
    with pytest.raises(DataError, match=r"unusable \(\d+ too long\), more than the fraction 0.05"):
        take(PackedStream(hard, 4, 20, PAD, max_bad=0.05), 1000)


def test_processes_share_the_rows_of_the_same_batches() -> None:
    alone, shared = stream(rows=6), [stream(rows=6, shares=3, share=share) for share in range(3)]
    for batch, *parts in zip(take(alone), *map(take, shared), strict=True):
        for name in ("input_ids", "position_ids"):
            assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
        assert torch.equal(batch["targets"], torch.cat([part["targets"] for part in parts]))
    assert all(one.state(7) == alone.state(7) for one in shared)  # so any number of them goes on from it
    with pytest.raises(DataError, match="6 rows cannot be shared evenly by 4"):
        stream(rows=6, shares=4)


def test_a_row_costs_the_same_in_a_pool_of_any_size() -> None:
    looked = []

    def spy(lengths: list[int], room: int) -> list[int]:
        looked.append(len(lengths))
        return best_fit(lengths, room)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "best_fit", spy)
        batches = iter(PackedStream(lambda index: make(2 + index % 7), 400, 64, PAD))
        filled = torch.cat([next(batches)["input_ids"] != PAD for _ in range(2)])
    assert max(looked) == packing.CHOICE and filled.float().mean() > 0.98


def test_a_long_row_is_filled_in_turn_and_then_by_the_best_choice() -> None:
    def short(index: int) -> TrainingSequence:
        return make(int(np.random.default_rng(index).integers(10, 900)))

    source = PackedStream(short, 2, 3 * packing.EXACT, PAD)
    batch = next(iter(source))
    assert (batch["input_ids"] != PAD).float().mean() > 0.999
    wanted = [index for index in range(source.state(1).next_index) if index not in source.state(1).waiting]
    assert sorted(len(one) for one in sequences_of(batch)) == sorted(
        len(short(index).ids) for index in wanted
    )
