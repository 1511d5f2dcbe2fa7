"""The grammar inside generate of transformers gives what the engine gives."""

from typing import Any

import pytest
import torch

from anytoken.inference.api import AnyToken
from anytoken.inference.logits_processor import GrammarLogitsProcessor

WORDS = ["red apple", "a", "What is this? green pear"]


def replies(model: AnyToken, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    """The ids of each row up to and with its end token."""
    width, end = inputs["input_ids"].shape[1], model.token_space.end
    rows = model.lm.generate(**inputs, **options)[:, width:].tolist()
    return [row[: row.index(end) + 1] for row in rows]


@pytest.mark.parametrize("output", [None, "text", "image", "tone", ["text", "tone"], ["tone", "image"]])
def test_greedy_is_the_same(model: AnyToken, output: Any) -> None:
    """In a batch with padding on the left, and for one prompt alone."""
    options = {"max_new_tokens": 45, "sizes": {"image": (3, 4)}}
    inputs = model.lm_inputs(WORDS, output, batch=True, **options)
    assert (inputs["attention_mask"].sum(1) != inputs["input_ids"].shape[1]).any()
    expected = model.generate(WORDS, output, batch=True, temperature=0, cfg_scale=1, **options)
    assert replies(model, inputs, do_sample=False) == [reply.ids for reply in expected]
    alone = model.lm_inputs(WORDS[1], output, **options)
    assert replies(model, alone, do_sample=False) == [expected[1].ids]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_samples_and_beams_are_legal(model: AnyToken, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    inputs = model.lm_inputs(WORDS, ["text", "image"], batch=True, max_new_tokens=40)
    grammar = model.processor.grammar
    for row in replies(model, inputs, top_k=5, **options):
        assert grammar.finished(grammar.walk(grammar.reply(("text", "image")), row))
        assert [segment.kind for segment in model.detokenize(row)] == ["text", "image"]


def test_the_prompt_is_what_the_first_call_sees(model: AnyToken) -> None:
    inputs = model.lm_inputs("a", "image", max_new_tokens=60)
    known = replies(model, {**inputs}, do_sample=False)
    inputs["logits_processor"] = [GrammarLogitsProcessor(model.processor.grammar, None, ["image"], 60)]
    assert replies(model, inputs, do_sample=False) == known


def test_what_it_cannot_do_is_said(model: AnyToken) -> None:
    with pytest.raises(ValueError, match="4"):
        model.lm_inputs("a", "image", max_new_tokens=4)
    with pytest.raises(ValueError, match="smell"):
        model.lm_inputs("a", "smell")
    inputs = model.lm_inputs("a", "image", max_new_tokens=30)
    replies(model, inputs, do_sample=False)
    with pytest.raises(ValueError, match="new one for the next call"):
        replies(model, {**inputs, **model_ids(model, "red apple")}, do_sample=False)
    with pytest.raises(ValueError, match="without assisted decoding"):
        assisted = model.lm_inputs("red apple red apple red apple", "text", max_new_tokens=30)
        replies(model, assisted, do_sample=False, prompt_lookup_num_tokens=3)


def model_ids(model: AnyToken, words: str) -> dict[str, Any]:
    """Another prompt, for a processor that was made for the first."""
    inputs = model.lm_inputs(words, "image", max_new_tokens=30)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"do_sample": False}, {"do_sample": False, "num_beams": 2}]
)
def test_a_contradiction_with_other_settings_is_said(model: AnyToken, options: dict[str, Any]) -> None:
    """An image ends when it ends: min_new_tokens would leave no id, and the first of the vocabulary be taken."""
    inputs = model.lm_inputs("a", "image", max_new_tokens=60, sizes={"image": (1, 1)})
    with pytest.raises(ValueError, match=r"grammar allows <\|end\|> here.*min_new_tokens"):
        model.lm.generate(**inputs, min_new_tokens=40, **options)
    inputs = model.lm_inputs("a", "text", max_new_tokens=60)
    assert len(replies(model, inputs, min_new_tokens=20, **options)[0]) > 20  # text can go on
