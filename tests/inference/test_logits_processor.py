"""The grammar inside generate of transformers gives what the engine gives."""

import pytest
import torch

from anytoken.inference.api import AnyToken
from anytoken.inference.engine import Engine
from anytoken.inference.logits_processor import GrammarLogitsProcessor
from anytoken.inference.sampling import Sampling

GREEDY = {kind: Sampling(temperature=0) for kind in ("text", "image", "tone")}
WORDS = ["red apple", "a", "What is this? green pear"]


def transformers_generate(
    model: AnyToken, plan: tuple[str, ...] | None, limit: int, **options: object
) -> list[list[int]]:
    """Left-padded prompts through lm.generate; ids of each row up to and with its end token."""
    space = model.token_space
    prompts = [model.encode_prompt(words) for words in WORDS]
    width = max(map(len, prompts))
    ids = torch.tensor([[space.pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processor = GrammarLogitsProcessor(model.processor.grammar, width, plan, limit)
    output = model.lm.generate(
        ids,
        attention_mask=mask,
        logits_processor=[processor],
        max_new_tokens=limit,
        pad_token_id=space.pad,
        eos_token_id=space.end,
        **options,
    )
    rows = output[:, width:].tolist()
    return [row[: row.index(space.end) + 1] for row in rows]


@pytest.mark.parametrize("plan", [None, ("image",), ("text", "tone"), ("tone", "image")])
def test_greedy_is_the_same(model: AnyToken, plan: tuple[str, ...] | None) -> None:
    found = transformers_generate(model, plan, 45, do_sample=False)
    engine = Engine(model.lm, model.processor.grammar)
    prompts = [model.encode_prompt(words) for words in WORDS]
    assert found == [reply.ids for reply in engine.generate(prompts, [plan] * 3, GREEDY, 45)]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_samples_and_beams_are_legal(model: AnyToken, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    grammar = model.processor.grammar
    for row in transformers_generate(model, ("text", "image"), 40, **options):
        assert grammar.finished(grammar.walk(grammar.reply(("text", "image")), row))


def test_a_limit_below_the_shortest_reply_is_refused(model: AnyToken) -> None:
    with pytest.raises(ValueError, match="4"):
        GrammarLogitsProcessor(model.processor.grammar, 3, ("image",), 4)
