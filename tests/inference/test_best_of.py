"""The best of several replies by default: where a checkpoint says so, and only if a text tells which one is best."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anytoken
from anytoken import Image, Speech
from anytoken.inference.best_of import BestOf, load_best_of
from anytoken.inference.streaming import finish
from anytoken.utils.errors import RequestError

SPOKEN = Speech(np.sin(np.arange(16_000) / 9).astype(np.float32) * 0.3, 16_000)
PIXELS = Image(np.full((64, 64, 3), 200, np.uint8))
HOT: dict[str, Any] = {"best_of": 3, "rerank": "prompt", "temperature": 1.0, "seed": 4}


@pytest.fixture
def model() -> anytoken.AnyToken:
    found = anytoken.load("mini")
    found.chains = {("speech", "image"): ("text",)}
    found.best_of = {("text", "image"): BestOf(3, 1.0), ("speech", "image"): BestOf(3, 1.0)}
    return found


@pytest.mark.parametrize("prompt", ["a fox", SPOKEN], ids=["text", "chain"])
def test_by_default_the_reply_is_the_best_of_several(model: anytoken.AnyToken, prompt: Any) -> None:
    best = model.generate(prompt, "image", seed=4)
    words = {"sampling": {"text": {"temperature": 0}}} if prompt is SPOKEN else {}
    assert best.ids == model.generate(prompt, "image", **HOT, **words).ids
    assert best.ids != model.generate(prompt, "image", seed=4, best_of=1).ids


def test_single_replies_are_those_of_a_stream(model: anytoken.AnyToken) -> None:
    assert (
        model.generate("a fox", "image", seed=4, best_of=1).ids
        == finish(model.stream("a fox", "image", seed=4)).ids
    )


def test_prompts_of_a_batch_take_their_own_numbers(model: anytoken.AnyToken) -> None:
    prompts = ["a fox", PIXELS, [{"role": "user", "content": "an owl"}]]
    batch = model.generate(prompts, "image", batch=True, seed=4)
    assert [one.ids for one in batch] == [model.generate(one, "image", seed=4).ids for one in prompts]
    assert batch[1].ids == model.generate(PIXELS, "image", seed=4, best_of=1).ids


TALK = [
    {"role": "user", "content": "a fox"},
    {"role": "assistant", "content": [PIXELS]},
    {"role": "user", "content": "an owl"},
]


@pytest.mark.parametrize(
    ("prompt", "output", "options"),
    [
        (PIXELS, "image", {}),
        (["a fox", PIXELS], "image", {}),
        (TALK, "image", {}),
        ("a fox", ["text", "image"], {"max_new_tokens": 120}),
        ("a fox", "speech", {}),
        ("a fox", "image", {"temperature": 0}),
        (SPOKEN, "image", {"via": []}),
    ],
    ids=["no text", "a medium", "two turns", "two outputs", "another output", "greedy", "no step of text"],
)
def test_other_replies_are_single(
    model: anytoken.AnyToken,
    prompt: Any,
    output: Any,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    replies = model._replies
    monkeypatch.setattr(model, "_replies", lambda requests: asked.append(len(requests)) or replies(requests))
    model.generate(prompt, output, seed=4, **options)
    assert asked == [1]


def test_temperatures_of_the_caller_apply(model: anytoken.AnyToken) -> None:
    model.best_of = {("text", "image"): BestOf(3, 5.0)}
    plain = model.generate("a fox", "image", **HOT).ids
    assert model.generate("a fox", "image", seed=4, temperature=1.0).ids == plain
    assert model.generate("a fox", "image", seed=4, sampling={"image": {"temperature": 1.0}}).ids == plain
    assert model.generate("a fox", "image", seed=4).ids != plain


def test_a_checkpoint_keeps_its_defaults(model: anytoken.AnyToken, tmp_path: Path) -> None:
    model.best_of = {("text", "image"): BestOf(4, 0.5)}
    folder = model.save_pretrained(tmp_path / "saved")
    held = {"text->image": {"replies": 4, "temperature": 0.5}}
    assert json.loads((folder / "best_of.json").read_text()) == held
    assert anytoken.load(folder).best_of == model.best_of
    model.best_of = {}
    model.save_pretrained(folder)
    assert not (folder / "best_of.json").exists() and anytoken.load(folder).best_of == {}


@pytest.mark.parametrize(
    "content",
    [
        "[]", '{"image": {"replies": 4, "temperature": 1}}', '{"text->image": 4}', '{"text->image": {"replies": 4',
        '{"text->image": {"replies": 0, "temperature": 1}}', '{"text->image": {"replies": 2, "temperature": 0}}',
        '{"text->image": {"replies": 2.5, "temperature": 1}}', '{"text->image": {"replies": 2, "heat": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "best_of.json").write_text(content)
    with pytest.raises(RequestError, match=r"best_of\.json.*copy the checkpoint again"):
        load_best_of(tmp_path)
