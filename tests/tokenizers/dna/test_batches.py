"""Batches of DNA: what one sequence after the other gives, errors included, for every kind of DNA tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from batteries import dna_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.segments import DNA, SegmentError, Text
from anytoken.tokenizers.base import Codes, TokenizerError, load_tokenizer
from anytoken.tokenizers.dna.base import MAX_TOKENS
from anytoken.tokenizers.dna.kmer_bpe import PIECE

MINI = Path(__file__).parents[3] / "anytoken" / "pretrained" / "mini" / "tokenizers" / "dna"
TOKENIZERS = [load_tokenizer(MINI), *dna_tokenizers()]
all_kinds = pytest.mark.parametrize(
    "tokenizer", TOKENIZERS, ids=lambda one: f"{one.kind}-{one.codebook_sizes[0]}"
)
letters = st.text("ACGT", min_size=1, max_size=90) | st.text("ACGTNacgtuRYK", min_size=1, max_size=40)


def unchecked(bases: str) -> DNA:
    """DNA whose letters nobody looked at."""
    segment = DNA("A")
    object.__setattr__(segment, "bases", bases)
    return segment


def outcome(work, *given):
    """What comes back, or the type and the words of the error."""
    try:
        return work(*given)
    except ValueError as error:
        return type(error), str(error)


def one_by_one(work, given):
    return [work(one) for one in given]


@all_kinds
@given(sequences=st.lists(letters, max_size=12))
@settings(max_examples=60, deadline=None)
def test_encoding_a_batch_is_encoding_one_by_one(tokenizer, sequences):
    segments = [DNA(bases) for bases in sequences]
    codes = tokenizer.encode_batch(segments)
    assert codes == one_by_one(tokenizer.encode, segments)
    assert all(one.values.dtype == np.int64 and one.values.shape[1] == 1 for one in codes)
    assert tokenizer.decode_batch(codes) == one_by_one(tokenizer.decode, codes)


@all_kinds
@given(counts=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_codes_decode_as_one_by_one(tokenizer, counts, seed):
    rng = np.random.default_rng(seed)
    codes = [Codes(rng.integers(0, tokenizer.codebook_sizes[0], (count, 1))) for count in counts]
    assert tokenizer.decode_batch(codes) == one_by_one(tokenizer.decode, codes)


@all_kinds
@given(
    sequences=st.lists(letters.map(DNA), max_size=4),
    wrong=st.lists(
        st.sampled_from(
            [
                Text("ACGT"),
                DNA("NA" * 2 * MAX_TOKENS),
                DNA("N" * (PIECE + 1)),
                unchecked("ACXGT"),
                unchecked("AC日"),
            ]
        ),
        min_size=1,
        max_size=3,
    ),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_no_dna_is_the_error_of_the_first(tokenizer, sequences, wrong, data):
    segments = data.draw(st.permutations([*sequences, *wrong]))
    found = outcome(tokenizer.encode_batch, segments)
    assert found == outcome(one_by_one, tokenizer.encode, segments)
    assert found[0] is TokenizerError


@all_kinds
@given(
    counts=st.lists(st.integers(1, 9), max_size=4),
    wrong=st.lists(
        st.sampled_from([(0, 1, 0), (MAX_TOKENS + 1, 1, 0), (3, 2, 0), (3, 1, -1), (3, 1, 10**6)]),
        min_size=1,
        max_size=3,
    ),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_codes_that_are_none_are_the_error_of_the_first(tokenizer, counts, wrong, data):
    good = [Codes(np.zeros((count, 1))) for count in counts]
    bad = [Codes(np.full((count, books), value)) for count, books, value in wrong]
    codes = data.draw(st.permutations([*good, *bad]))
    found = outcome(tokenizer.decode_batch, codes)
    assert found == outcome(one_by_one, tokenizer.decode, codes)
    assert found[0] is TokenizerError


@given(st.text("ACGTUNRYSWKMBDHVacgtunryswkmbdhv", min_size=1), st.characters(), st.data())
def test_dna_takes_exactly_the_iupac_letters(bases, other, data):
    place = data.draw(st.integers(0, len(bases)))
    mixed = bases[:place] + other + bases[place:]
    assert DNA(bases).bases == bases
    if other in "ACGTUNRYSWKMBDHVacgtunryswkmbdhv":
        assert DNA(mixed).bases == mixed
    else:
        with pytest.raises(SegmentError, match=f"at position {place + 1} of"):
            DNA(mixed)
