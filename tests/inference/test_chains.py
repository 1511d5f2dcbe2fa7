"""Chains of modality: steps before the output are generated, kept out of the segments, and saved with checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anytoken
from anytoken import Image, Speech, Text
from anytoken.inference.chains import Cascade, load_chains, prompt_kind
from anytoken.inference.generation import longest_segment
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


def two_calls(model: anytoken.AnyToken, text: str, kinds: tuple[str, str], **options: Any) -> list[int]:
    """The ids of a medium, and of what the model makes of it as a prompt."""
    first = model.generate(text, output=kinds[0], **options).ids
    space, step = model.token_space, first[:-1]
    prompt = [space.bos, space.user, *step, space.end, space.assistant]
    return [*step, *model.generate_ids([prompt], kinds[1], **options)[0].ids]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_cascade_is_one_call_after_the_other(model: anytoken.AnyToken, scale: float) -> None:
    options = {"temperature": 0.0, "cfg_scale": scale}
    reply = model.generate("a fox", output="video", via="image", cascade=True, **options)
    assert [one.kind for one in reply.steps] == ["image"] and [one.kind for one in reply.segments] == [
        "video"
    ]
    assert reply.ids == two_calls(model, "a fox", ("image", "video"), **options)


def test_a_cascade_passes_on_text(model: anytoken.AnyToken) -> None:
    reply = model.generate(PIXELS, output="image", via="text", cascade=True, temperature=0.0)
    [text], [image] = reply.steps, reply.segments
    assert isinstance(text, Text)
    again = model.generate(text.text, output="image", temperature=0.0)
    assert np.array_equal(image.pixels, again.segments[0].pixels)


def test_a_longer_cascade_reads_the_last_step_only(model: anytoken.AnyToken) -> None:
    options = {"cascade": True, "temperature": 0.0}
    reply = model.generate(SPOKEN, output="video", via=["text", "image"], **options)
    [text, image] = reply.steps
    assert isinstance(text, Text) and isinstance(image, Image)
    later = model.generate(text.text, output="video", via="image", **options).ids
    assert reply.ids[-len(later) :] == later


def test_a_cascade_in_company_is_that_on_its_own(model: anytoken.AnyToken) -> None:
    model.chains = {("text", "video"): Cascade(["image"])}
    prompts = ["a fox", SPOKEN, "a bear"]
    found = model.generate(prompts, output="video", batch=True, seed=0)
    assert [len(one.steps) for one in found] == [1, 0, 1]
    assert [one.ids for one in found] == [model.generate(one, output="video", seed=0).ids for one in prompts]


@pytest.fixture
def mover(model: anytoken.AnyToken) -> anytoken.AnyToken:
    """A model that draws before it animates."""
    model.chains = {("text", "video"): Cascade(["image"])}
    return model


def test_a_reply_that_the_model_decides_takes_the_steps(mover: anytoken.AnyToken) -> None:
    request = "Make a video of a fox"
    reply = mover.generate(request, temperature=0.0)
    assert [one.kind for one in reply.segments] == ["video"]
    assert [one.kind for one in reply.steps] == ["image"]
    assert reply.ids == mover.generate(request, output="video", temperature=0.0).ids
    events = list(mover.stream(request, temperature=0.0))
    assert [one.kind for one in events if isinstance(one, SegmentStarted)] == ["video"]
    assert not mover.generate(request, temperature=0.0, via=[]).steps
    assert [one.kind for one in mover.generate("Draw a fox", temperature=0.0).segments] == ["image"]


@pytest.mark.parametrize("output", [None, "video"])
def test_no_room_for_a_step_is_no_step(mover: anytoken.AnyToken, output: str | None) -> None:
    tokenizers = mover.processor.tokenizers
    least = 1 + sum(longest_segment(tokenizers[kind]) for kind in ("image", "video"))
    for room, steps in ((least, 1), (least - 1, 0)):
        reply = mover.generate("Make a video of a fox", output, seed=0, max_new_tokens=room)
        assert [one.kind for one in reply.segments] == ["video"] and len(reply.steps) == steps


def test_an_image_that_is_there_is_not_drawn_again(mover: anytoken.AnyToken) -> None:
    chat = mover.chat()
    chat.send(PIXELS, output="text", seed=0)
    assert not chat.send("Animate it", output="video", seed=0).steps


def test_a_cascade_needs_steps_that_can_be_passed_on(model: anytoken.AnyToken) -> None:
    with pytest.raises(RequestError, match="cascade=True needs steps"):
        model.generate("a fox", output="video", cascade=True)
    with pytest.raises(RequestError, match="call generate twice"):
        model.generate("a fox", output="text", via="video", cascade=True)


def test_a_checkpoint_keeps_its_chains(model: anytoken.AnyToken, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "saved")
    assert json.loads((folder / "chains.json").read_text()) == {"speech->image": ["text"]}
    assert anytoken.load(folder).chains == model.chains
    model.chains = {("text", "video"): Cascade(["image"])}
    model.save_pretrained(folder)
    [steps] = anytoken.load(folder).chains.values()
    assert isinstance(steps, Cascade) and steps == ("image",)
    model.chains = {}
    model.save_pretrained(folder)
    assert not (folder / "chains.json").exists() and anytoken.load(folder).chains == {}


@pytest.mark.parametrize(
    "content",
    ["[]", '{"speech": ["text"]}', '{"speech->image": "text', '{"a->b": []}', '{"a->b": {"steps": []}}'],
)
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
