"""Views: what they parse to, and the ids they write."""

from types import SimpleNamespace

import numpy as np
import pytest

from anytoken.data.views import (
    Literal,
    TrainingSequence,
    build_sequence,
    drop_prompt,
    parse_view,
    view_turns,
)
from anytoken.utils.errors import DataError

CONTROLS = SimpleNamespace(bos=100, user=101, assistant=102, system=103, end=104, null=105)
PICTURE = [200, 7, 8, 201]
ITEM = {"text": "ab", "voice": "x", "image": PICTURE}


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def sequence(view: str, drop: bool = False, learn_all: bool = False) -> TrainingSequence:
    turns = view_turns(parse_view(view), ITEM, np.random.default_rng(0))
    return build_sequence(drop_prompt(turns) if drop else turns, CONTROLS, encode, learn_all)


def test_parse_view() -> None:
    view = parse_view('text, ", voice " ,voice->image')
    assert view.sources == ("text", Literal(", voice "), "voice") and view.targets == ("image",)
    assert view.keys == ("text", "voice", "image")
    assert parse_view("messages").keys == ("messages",)


@pytest.mark.parametrize(
    "bad",
    [
        "text",
        "text->",
        "text image->speech",
        'a,"b->c',
        "a,,b->c",
        "a->b->c",
        "(a)->b",
        "a->(b)",
        'a->("b"),c',
    ],
)
def test_bad_views_are_refused(bad: str) -> None:
    with pytest.raises(DataError):
        parse_view(bad)


def test_direction_puts_prompt_before_answer_and_learns_the_answer_and_its_end() -> None:
    found = sequence("text->image")
    assert found.ids.tolist() == [100, 101, 97, 98, 104, 102, *PICTURE, 104]
    assert found.learn.tolist() == [False] * 6 + [True] * 5


def test_a_key_in_parentheses_is_read_but_not_learned() -> None:
    found = sequence("voice->(text),image")
    assert found.ids.tolist() == sequence("voice->text,image").ids.tolist()
    assert found.learn.tolist() == [False] * 7 + [True] * 5


def test_neighbouring_strings_are_tokenized_as_one() -> None:
    seen: list[str] = []

    def spy(text: str) -> list[int]:
        seen.append(text)
        return [1]

    turns = view_turns(parse_view('text,", voice ",voice->image,text'), ITEM, np.random.default_rng(0))
    build_sequence(turns, CONTROLS, spy)
    assert seen == ["ab, voice x", "ab"]


def test_dropped_prompt_is_the_null_prompt_and_the_answer_stays() -> None:
    found = sequence("text->image", drop=True)
    assert found.ids.tolist() == [100, 101, 105, 104, 102, *PICTURE, 104]
    assert found.learn.sum() == 5


def test_learn_all_learns_all_but_the_first() -> None:
    assert sequence("text->image", learn_all=True).learn.tolist() == [False] + [True] * 10


def test_view_without_sources_is_an_assistant_turn() -> None:
    assert sequence("->text").ids.tolist() == [100, 102, 97, 98, 104]


def test_interleaved_takes_both_orders() -> None:
    item = {"text": "ab", "image": PICTURE}
    orders = {
        tuple(map(str, view_turns(parse_view("interleaved"), item, np.random.default_rng(seed))[0][1]))
        for seed in range(20)
    }
    assert orders == {("ab", str(PICTURE)), (str(PICTURE), "ab")}


def test_missing_key_is_named() -> None:
    with pytest.raises(DataError, match="'speech'"):
        sequence("speech->text")
