"""Chains of modality: steps before the output are generated, kept out of the segments, and saved with checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest

import anytoken
from anytoken import Image, Speech, Text
from anytoken.inference.chains import load_chains, prompt_kind
from anytoken.inference.streaming import SegmentFinished, SegmentStarted, TextDelta
from anytoken.utils.errors import RequestError

SPOKEN = Speech(np.sin(np.arange(16_000) / 9).astype(np.float32) * 0.3, 16_000)
PIXELS = Image(np.full((64, 64, 3), 200, np.uint8))


@pytest.fixture
def model() -> anytoken.AnyToken:
    found = anytoken.load("mini")
    found.chains = {("speech", "image"): ("text",)}
    return found


def test_a_chain_of_the_checkpoint_applies_to_its_kinds_only(model: anytoken.AnyToken) -> None:
    reply = model.generate(SPOKEN, output="image", seed=0)
    assert [one.kind for one in reply.segments] == ["image"]
    assert [one.kind for one in reply.steps] == ["text"]
    assert [one.kind for one in model.detokenize(reply.ids)] == ["text", "image"]
    for prompt, output in (("a fox", "image"), (SPOKEN, "text"), ([SPOKEN, PIXELS], "image")):
        assert not model.generate(prompt, output=output, seed=0).steps
    assert not model.generate(SPOKEN, output=["image", "text"], seed=0).steps


def test_the_last_step_is_what_the_reply_continues_from(model: anytoken.AnyToken) -> None:
    chained = model.generate(SPOKEN, output="image", seed=0, temperature=0.0)
    written = model.generate(SPOKEN, output=["text", "image"], seed=0, temperature=0.0)
    assert chained.ids == written.ids
    direct = model.generate(SPOKEN, output="image", seed=0, temperature=0.0, via=[])
    assert direct.ids != written.ids and not direct.steps


def test_via_takes_any_kinds(model: anytoken.AnyToken) -> None:
    reply = model.generate("a fox", output="text", via="image", seed=0)
    assert [one.kind for one in reply.steps] == ["image"] and isinstance(reply.segments[0], Text)
    longer = model.generate(SPOKEN, output="video", via=["text", "image"], seed=0)
    assert [one.kind for one in longer.steps] == ["text", "image"]
    with pytest.raises(RequestError, match="needs an output, such as output="):
        model.generate("a fox", via="image")
    with pytest.raises(RequestError, match="smell"):
        model.generate("a fox", output="image", via="smell")


def test_prompts_of_a_batch_take_their_own_ways(model: anytoken.AnyToken) -> None:
    spoken, typed = model.generate([SPOKEN, "a fox"], output="image", batch=True, seed=0)
    assert len(spoken.steps) == 1 and not typed.steps
    assert spoken.ids == model.generate(SPOKEN, output="image", seed=0).ids


def test_steps_cause_no_events(model: anytoken.AnyToken) -> None:
    events = model.stream(SPOKEN, output="image", seed=0)
    seen = []
    try:
        while True:
            seen.append(next(events))
    except StopIteration as end:
        reply = end.value
    assert [one.kind for one in reply.steps] == ["text"]
    assert [one.kind for one in seen if isinstance(one, SegmentStarted)] == ["image"]
    assert [one.segment.kind for one in seen if isinstance(one, SegmentFinished)] == ["image"]
    assert not [one for one in seen if isinstance(one, TextDelta)]


def test_a_conversation_goes_on_after_a_chain(model: anytoken.AnyToken, tmp_path: Path) -> None:
    chat = model.chat()
    reply = chat.send(SPOKEN, output="image", seed=0)
    assert [one.kind for one in chat.messages[-1]["content"]] == ["image"]
    assert chat.ids[-len(reply.ids) :] == reply.ids
    chat.save(tmp_path / "chat")
    again = type(chat).load(tmp_path / "chat", model)
    assert again.ids == chat.ids
    assert again.send("What is this?", output="text").ids == chat.send("What is this?", output="text").ids


def test_a_checkpoint_keeps_its_chains(model: anytoken.AnyToken, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "saved")
    assert json.loads((folder / "chains.json").read_text()) == {"speech->image": ["text"]}
    assert anytoken.load(folder).chains == model.chains
    model.chains = {}
    model.save_pretrained(folder)
    assert not (folder / "chains.json").exists() and anytoken.load(folder).chains == {}


@pytest.mark.parametrize("content", ["[]", '{"speech": ["text"]}', '{"speech->image": "text', '{"a->b": []}'])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "chains.json").write_text(content)
    with pytest.raises(RequestError, match=r"chains\.json.*copy the checkpoint again"):
        load_chains(tmp_path)


def test_only_the_last_turn_decides(model: anytoken.AnyToken) -> None:
    space = model.token_space
    messages = [
        {"role": "user", "content": [SPOKEN]},
        {"role": "assistant", "content": [PIXELS]},
        {"role": "user", "content": ["Again"]},
    ]
    assert prompt_kind(model.encode_prompt(messages), space) == "text"
    assert prompt_kind(model.encode_prompt(messages[:1]), space) == "speech"
    assert prompt_kind(model.encode_prompt([SPOKEN, "Draw this."]), space) == "speech"
    assert prompt_kind(model.encode_prompt([SPOKEN, PIXELS]), space) is None
    assert prompt_kind([], space) is None
