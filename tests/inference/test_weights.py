"""Whatever changes the weights between two calls, the second answers with the new ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anytoken.inference.api import AnyToken
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.request import GenerationRequest
from anytoken.inference.weights import checksum
from anytoken.model.modeling import AnyTokenForCausalLM

OPTIONS: dict[str, Any] = {
    "output": ["text", "image"],
    "temperature": 0,
    "cfg_scale": 1,
    "max_new_tokens": 60,
}


def other_values(lm: AnyTokenForCausalLM) -> list[Tensor]:
    """Weights of another model of the same shapes."""
    generator = torch.Generator().manual_seed(9)
    return [p.detach() + 0.2 * torch.randn(p.shape, generator=generator) for p in lm.parameters()]


def assign(lm: AnyTokenForCausalLM) -> None:
    """As an exponential moving average is put in for evaluation."""
    for parameter, value in zip(lm.parameters(), other_values(lm), strict=True):
        parameter.data = value


def copy_in(lm: AnyTokenForCausalLM) -> None:
    for parameter, value in zip(lm.parameters(), other_values(lm), strict=True):
        parameter.data.copy_(value)


def in_place(lm: AnyTokenForCausalLM) -> None:
    with torch.no_grad():
        for parameter, value in zip(lm.parameters(), other_values(lm), strict=True):
            parameter.copy_(value)


def one_layer(lm: AnyTokenForCausalLM) -> None:
    lm.model.layers[0].self_attn.q_proj.weight.data = lm.model.layers[0].self_attn.q_proj.weight.data * -1


def one_expert(lm: AnyTokenForCausalLM) -> None:
    lm.model.layers[1].mlp.experts.down_proj.data = lm.model.layers[1].mlp.experts.down_proj.data.flip(0)


def the_head_alone(lm: AnyTokenForCausalLM) -> None:
    lm.lm_head.weight = nn.Parameter(other_values(lm)[0])


def another_module(lm: AnyTokenForCausalLM) -> None:
    other = copy.deepcopy(lm.lm_head)
    other.weight = nn.Parameter(other_values(lm)[0])
    lm.set_output_embeddings(other)


def hook(lm: AnyTokenForCausalLM) -> None:
    lm.model.layers[0].self_attn.register_forward_hook(lambda module, given, got: (-got[0], *got[1:]))


CHANGES = [
    assign, copy_in, in_place, one_layer, one_expert, the_head_alone, another_module, hook,
    lambda lm: lm.double(), lambda lm: lm.bfloat16(), lambda lm: lm.to(torch.float16).float(),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_uses_the_new_weights(
    own_model: AnyToken, change: Callable[[AnyTokenForCausalLM], Any]
) -> None:
    """Compared with a model that is opened in that state; a chat does not use what it read with the old ones."""
    chat = own_model.chat()
    chat.send("red apple", **OPTIONS)
    turns = list(chat.turns)
    change(own_model.lm)
    fresh = AnyToken(own_model.lm, own_model.processor)
    said = chat.send("green pear", **OPTIONS)
    start = len(chat.ids) - len(said.ids)
    assert said.ids == fresh.generate_ids([chat.ids[:start]], **OPTIONS)[0].ids
    assert own_model.generate("a", **OPTIONS).ids == fresh.generate("a", **OPTIONS).ids
    assert chat.turns[: len(turns)] == turns


def test_a_batch_that_runs_on_takes_them_with_its_next_request(own_model: AnyToken) -> None:
    engine, prompt = own_model.engine, own_model.encode_prompt("a")
    scheduler, found = engine.scheduler(), []
    for change in (lambda lm: None, assign, lambda lm: lm.double()):
        change(own_model.lm)
        number = scheduler.submit(GenerationRequest(prompt, ("image",), seed=3))
        ids = []
        while len(scheduler):
            ids += [token.id for token in scheduler.step() if token.row == number]
        assert (
            ids
            == AnyToken(own_model.lm, own_model.processor)
            .generate_ids([prompt], "image", seed=3, top_k=0)[0]
            .ids
        )
        found.append(ids)
    assert found[0] != found[1]


def test_nothing_is_prepared_twice_without_a_reason(
    own_model: AnyToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, chat = [], own_model.chat()
    original = ModelRunner.__init__
    monkeypatch.setattr(
        ModelRunner, "__init__", lambda self, *given: (made.append(1), original(self, *given))[1]
    )
    for _ in range(3):
        chat.send("red apple", **OPTIONS)
        own_model.lm(
            torch.zeros(1, 4, dtype=torch.long), output_router_logits=True
        )  # leaves recording hooks behind
    assert len(made) == 1 and own_model.engine.head().decoder is not None and len(chat._prefixes) == 1


def test_a_checksum_tells_every_bit_and_type(own_model: AnyToken) -> None:
    def now() -> int:
        return checksum(own_model.lm.parameters())

    weight = own_model.lm.lm_head.weight
    before = now()
    assert now() == before
    weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(9.0))
    assert now() != before
    weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(-9.0))
    assert now() == before
    own_model.lm.double()
    assert now() != before
    own_model.lm.float()
    assert now() == before
