"""Reranking by the prompt: the best reply is the one from which the prompt's text can be read back."""

from typing import Any

import numpy as np
import pytest

import anytoken
from anytoken import Image, Speech, Text
from anytoken.inference.likeliest_prompt import prompt_likelihood
from anytoken.inference.score import score_ids
from anytoken.utils.errors import RequestError

HOT = {"seed": 3, "temperature": 1.0}


@pytest.fixture(scope="module")
def mini() -> anytoken.AnyToken:
    found = anytoken.load("mini")
    found.chains = {}
    return found


def back(model: anytoken.AnyToken, reply: Any, text: str) -> float:
    """log p(text | media) by way of ids, since decoding a medium and encoding it again changes its codes."""
    space = model.token_space
    body = reply.ids[: reply.ids.index(space.end)]
    opens = [place for place, token in enumerate(body) if token in map(space.open_token, space.modalities)]
    prompt = [space.bos, space.user, *body[opens[-1] :], space.end, space.assistant]
    answer = [*model.tokenize(Text(text)), space.end]
    return score_ids(model.engine, prompt, [answer])[0].total


def test_the_best_reply_says_most_of_its_prompt(mini: anytoken.AnyToken) -> None:
    caption = "a fox, 3d, blue background"
    ranked = mini.generate(caption, "image", best_of=5, num_return=5, rerank="prompt", **HOT)
    drawn = mini.generate(caption, "image", num_return=5, **HOT)
    assert sorted(map(tuple, (one.ids for one in ranked))) == sorted(map(tuple, (one.ids for one in drawn)))
    values = [back(mini, one, caption) for one in ranked]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert mini.generate(caption, "image", best_of=5, rerank="prompt", **HOT).ids == ranked[0].ids


def test_the_text_of_a_chain_counts_where_there_is_one(mini: anytoken.AnyToken) -> None:
    spoken = Speech(np.sin(np.arange(8_000) / 7).astype(np.float32) * 0.3, 16_000)
    ranked = mini.generate(
        spoken, "image", via="text", best_of=3, num_return=3, rerank="prompt", sizes=None, **HOT
    )
    values = [back(mini, one, one.steps[0].text) for one in ranked]
    assert values == sorted(values, reverse=True)


def test_a_video_is_read_with_its_first_frame_where_prompts_are(
    mini: anytoken.AnyToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = mini.generate("a fox, animated, blue background", "video", seed=1)
    prompt, space = mini.encode_prompt("a fox, animated, blue background"), mini.token_space
    answer = [*mini.tokenize(Text("a fox, animated, blue background")), space.end]
    for first_frames in (False, True):
        monkeypatch.setattr(mini.processor, "first_frames", first_frames)
        found = prompt_likelihood(mini.engine, mini.processor, prompt, clip.ids, 0)
        frame = mini.tokenize(Image(clip.videos[0].frames[0])) if first_frames else []
        body = clip.ids[clip.ids.index(space.open_token("video")) : clip.ids.index(space.end)]
        read = [space.bos, space.user, *frame, *body, space.end, space.assistant]
        assert found == pytest.approx(score_ids(mini.engine, read, [answer])[0].total)


def test_instructions_and_batches(mini: anytoken.AnyToken) -> None:
    prompts = ["Draw a fox", "Draw an owl"]
    best = mini.generate(prompts, "image", batch=True, best_of=3, rerank="prompt", **HOT)
    assert [one.ids for one in best] == [
        mini.generate(one, "image", best_of=3, rerank="prompt", **HOT).ids for one in prompts
    ]


@pytest.mark.parametrize(
    ("prompt", "output", "message"),
    [
        (Image(np.zeros((64, 64, 3), np.uint8)), "video", "there is no text here"),
        ("a fox", "text", "there is no medium here"),
    ],
)
def test_what_cannot_be_compared_is_an_error(
    mini: anytoken.AnyToken, prompt: Any, output: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        mini.generate(prompt, output, best_of=2, rerank="prompt", **HOT)
    with pytest.raises(RequestError, match='rerank is "prompt" or a function'):
        mini.generate("a fox", "image", best_of=2, rerank="clip", **HOT)  # type: ignore[call-overload]
