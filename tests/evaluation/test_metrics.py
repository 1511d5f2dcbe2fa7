"""Shares and their intervals, agreement of texts and sequences, nearest neighbours."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytoken.evaluation import metrics


def test_the_wilson_interval_is_the_textbook_one():
    low, high = metrics.Proportion(8, 10).interval
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
    assert metrics.Proportion(0, 0).interval == (0.0, 1.0)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_narrows_with_cases(case):
    right, total = case
    low, high = metrics.Proportion(right, total).interval
    assert 0 <= low <= right / total + 1e-9 and right / total - 1e-9 <= high <= 1
    wider_low, wider_high = low, high
    low, high = metrics.Proportion(right * 4, total * 4).interval
    assert high - low < wider_high - wider_low


def test_text_matches_up_to_case_and_space_only():
    assert metrics.same_text("A red  apple", "a red apple")
    assert not metrics.same_text("a red apple", "a red apple, 3d")


def test_identity_counts_missing_and_surplus_elements_as_wrong():
    assert metrics.sequence_identity("MKL", "MKL") == 1
    assert metrics.sequence_identity("MK", "MKLV") == 0.5
    assert metrics.sequence_identity("MKLV", "MK") == 0.5
    assert metrics.sequence_identity("", "MK") == 0


def test_majority_takes_the_most_frequent_and_refuses_nothing():
    assert metrics.majority(["a", "b", "b"]) == "b"
    with pytest.raises(ValueError, match="at least one"):
        metrics.majority([])


def test_nearest_agrees_with_brute_force():
    rng = np.random.default_rng(0)
    queries, items = rng.normal(size=(30, 5)), rng.normal(size=(40, 5))
    brute = ((queries[:, None] - items[None]) ** 2).sum(-1).argmin(1)
    assert (metrics.nearest(queries, items, block=7) == brute).all()
