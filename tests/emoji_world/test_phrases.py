"""Phrasings: many, a part of them held out for good, none of which stands inside one that is trained on."""

import re

import numpy as np
import pytest

from anytoken.emoji_world.instruct import REQUESTS
from anytoken.emoji_world.phrases import DOCUMENTED, MORE, is_held_out, phrasings, wording


def literal(phrasing: str) -> str:
    return re.sub(r"\{\w*\}", "", phrasing).strip(" .?:").casefold()


def test_enough_phrasings_are_held_out_and_those_of_the_pages_are_not() -> None:
    held_out = [one for purpose in MORE for one in phrasings(purpose, held_out=True)]
    assert len(held_out) >= 60 and len(set(held_out)) == len(held_out)
    everyday = (
        "draw",
        "name",
        "say",
        "hear",
        "animate",
        "animate_this",
        "watch",
        "draw_spoken",
        "decline",
        "who",
    )
    assert all(len(phrasings(purpose, held_out=True)) >= 3 for purpose in everyday)
    assert not any(is_held_out(purpose, one) for purpose, known in DOCUMENTED.items() for one in known)
    assert set(REQUESTS) <= set(DOCUMENTED) == set(MORE)


@pytest.mark.parametrize("purpose", sorted(MORE))
def test_no_held_out_phrasing_stands_inside_a_known_one(purpose: str) -> None:
    known = [literal(one) for one in phrasings(purpose)]
    for one in phrasings(purpose, held_out=True):
        assert not [other for other in known if literal(one) in other], one


def test_wordings_vary_around_the_phrasing_and_follow_the_seed() -> None:
    def draw(**options: bool) -> set[str]:
        rng = np.random.default_rng(0)
        return {wording(rng, "draw", "a fox", **options) for _ in range(3000)}

    plain, varied = draw(vary=False), draw()
    assert plain == {one.format("a fox") for one in phrasings("draw")}
    assert len(varied) > 3 * len(plain) and varied == draw()
    assert "Could you draw a fox?" in varied
    assert not any(re.match(r"(?i)(please|can you|now) what", one) for one in varied)
    assert all("a fox" in one for one in varied)


def test_held_out_wordings_use_held_out_phrasings_only() -> None:
    rng = np.random.default_rng(0)
    options = {one.format("a cat") for one in phrasings("animate", held_out=True)}
    said = {wording(rng, "animate", "a cat", held_out=True, vary=False) for _ in range(200)}
    assert said == options
    assert wording(rng, "product", held_out=True, vary=False) in phrasings("product")  # none is held out
