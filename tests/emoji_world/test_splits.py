"""Hold-outs: shares as declared, independent of each other, and fixed for good (the goldens below never change)."""

from collections.abc import Callable
from itertools import combinations

import pytest

from anytoken.emoji_world import splits

CODES = [f"{0x1F300 + number:X}" for number in range(20_000)]
COLORS = ("white", "black", "red", "orange", "yellow", "green", "blue", "purple")
PURPOSES: dict[str, tuple[Callable[[str], bool], float]] = {
    "style": (splits.style_held_out, 0.20),
    "video": (splits.video_held_out, 0.10),
    "tokenizer": (splits.tokenizer_held_out, 0.20),
    "pair, blue": (lambda code: splits.pair_held_out(code, "blue"), 0.10),
    "pair, red": (lambda code: splits.pair_held_out(code, "red"), 0.10),
    "spoken, kal16": (lambda code: splits.spoken_held_out(code, "kal16"), 0.20),
    "spoken, joe": (lambda code: splits.spoken_held_out(code, "joe"), 0.20),
    "gene": (lambda code: splits.gene_split(code) == "test", 0.10),
    "stretch": (lambda code: splits.stretch_split(int(code, 16)) == "test", 0.10),
}
# code point: (style, video, tokenizer, held-out colours, held-out voices)
GOLDEN: dict[str, tuple[bool, bool, bool, set[str], set[str]]] = {
    "1F34E": (True, False, False, set(), {"joe"}),  # red apple
    "1F347": (False, False, False, set(), set()),  # grapes
    "1F989": (True, False, True, {"white", "orange"}, {"kal16"}),  # owl
    "1F697": (True, False, True, {"yellow", "purple"}, {"kal16", "joe"}),  # automobile
    "1F9ED": (False, True, False, set(), set()),  # compass
    "1FAB5": (True, False, False, {"green", "purple"}, set()),  # wood
    "1F422": (False, False, False, {"black", "purple"}, set()),  # turtle
    "2708-FE0F": (True, False, False, {"purple"}, {"joe"}),  # airplane, as OpenMoji writes it
}


@pytest.mark.parametrize("purpose", PURPOSES)
def test_shares_are_as_declared(purpose: str) -> None:
    held_out, share = PURPOSES[purpose]
    spread = (share * (1 - share) / len(CODES)) ** 0.5
    assert abs(sum(map(held_out, CODES)) / len(CODES) - share) < 4 * spread


@pytest.mark.parametrize("pair", list(combinations(PURPOSES, 2)), ids=" and ".join)
def test_purposes_are_independent(pair: tuple[str, str]) -> None:
    (one, share), (other, other_share) = (PURPOSES[purpose] for purpose in pair)
    both, expected = sum(one(code) and other(code) for code in CODES) / len(CODES), share * other_share
    assert abs(both - expected) < 4 * (expected * (1 - expected) / len(CODES)) ** 0.5


@pytest.mark.parametrize("code", GOLDEN)
def test_the_split_has_not_moved(code: str) -> None:
    found = (
        splits.style_held_out(code),
        splits.video_held_out(code),
        splits.tokenizer_held_out(code),
        {color for color in COLORS if splits.pair_held_out(code, color)},
        {voice for voice in ("slt", "kal16", "joe") if splits.spoken_held_out(code, voice)},
    )
    assert found == GOLDEN[code]


def test_the_gene_split_has_not_moved() -> None:
    products = {
        "hypothetical protein": "train",
        "putative ATPase": "train",
        "DNA helicase IV": "test",
        "RNase R": "test",
        "cell division protein DedD": "test",
    }
    assert {product: splits.gene_split(product) for product in products} == products
    held_out = [start for start in range(100) if splits.stretch_split(start) == "test"]
    assert held_out == [7, 12, 14, 30, 39, 45, 59, 75, 87]


def test_fractions_depend_on_each_key_and_on_where_one_ends() -> None:
    assert splits.fraction("1F34E", "style") == 0.19520059296309863
    assert splits.fraction("ab", "c") != splits.fraction("a", "bc") != splits.fraction("abc")
    assert all(0 <= splits.fraction(code) < 1 for code in CODES[:1000])


def test_only_training_voices_have_unspoken_names() -> None:
    held_out = {
        voice
        for voice in ("slt", "kal16", "joe", "awb", "rms", "en-us", "en-gb", "en-us+f3")
        if any(splits.spoken_held_out(code, voice) for code in CODES[:500])
    }
    assert held_out == set(splits.SPOKEN_VOICES) == {"kal16", "joe"}


def test_why_a_picture_is_held_out() -> None:
    assert splits.image_holdout("1FAB5", "3d", "white") == "style"
    assert splits.image_holdout("1FAB5", "3d", "green") == "style"  # the stronger reason first
    assert splits.image_holdout("1FAB5", "flat", "green") == "pair"
    assert splits.image_holdout("1FAB5", "flat", "white") is None
    assert splits.image_holdout("1F347", "3d", "white") is None


def test_why_a_video_is_held_out() -> None:
    assert splits.video_holdout("1F9ED", "white") == "video"
    assert splits.video_holdout("1F422", "black") == "pair"
    assert (
        splits.video_holdout("1FAB5", "white") is None
    )  # held out in 3-D style, which is about still pictures


def test_a_pair_is_held_out_in_every_style_and_moving() -> None:
    for color in COLORS:
        reasons = {
            splits.image_holdout("1F422", style, color) for style in ("line", "noto", "twemoji", "flat", "3d")
        }
        assert reasons == {splits.video_holdout("1F422", color)}
