"""Whatever the model says, a reply is legal, in budget and as planned: thousands of replies to random logits.

And hundreds of models with random weights, in one running batch, each decoded to its segments.
"""

import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loop import asked
from torch import Tensor

from anytoken.grammar import Grammar
from anytoken.grammar_tables import Ranges
from anytoken.inference.api import AnyToken
from anytoken.inference.engine import Engine, GeneratedIds
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.request import GenerationRequest
from anytoken.inference.sampling import Sampling
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, CodeSequence, CodeShape

CONTEXT = 200
SHAPES: dict[str, tuple[list[int], CodeShape]] = {
    "image": ([12], CodeGrid(axes=("rows", "cols"), min_size=(1, 2), max_size=(5, 6))),
    "speech": ([9, 9, 4], CodeSequence(2, 9, num_codebooks=3, num_global_codes=3)),
    "video": (
        [5, 6],
        CodeGrid(
            axes=("steps", "rows"), min_size=(2, 2), max_size=(3, 4), num_codebooks=2, num_global_codes=1
        ),
    ),
    "dna": ([4], CodeSequence(1, 30)),
}
GLOBAL_SIZE = 5
KINDS = ["text", *SHAPES]


class NoHead(ModelRunner):
    """Instead of a model: random logits of any size, now and then equal or infinite."""

    def __init__(self) -> None:
        table = SimpleNamespace(weight=torch.zeros(1))
        self.lm: Any = SimpleNamespace(device=torch.device("cpu"), get_input_embeddings=lambda: table)
        self.decoder: Any = True
        self.walk = None

    def features(self, ids: list[list[int]], *_: Any) -> Tensor:
        return torch.zeros(len(ids), 1)

    def __call__(self, features: Tensor, ranges: Ranges) -> Tensor:
        width = sum(stop - start for start, stop in ranges)
        scale = 10.0 ** torch.empty(len(features), 1).uniform_(-3, 6)
        logits = torch.randn(len(features), width) * scale * (torch.rand(len(features), 1) > 0.1)
        return logits.masked_fill(torch.rand(len(features), width) < 0.05, -1e30)


def make_engine() -> Engine:
    space = TokenSpace(40)
    for kind, (sizes, shape) in SHAPES.items():
        space.append_modality(kind, sizes, shape, GLOBAL_SIZE if shape.num_global_codes else 0)
    config = SimpleNamespace(max_position_embeddings=CONTEXT)
    lm: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), parameters=lambda: ())
    engine, head = Engine(lm, Grammar(space)), NoHead()
    engine.head = lambda: head  # type: ignore[method-assign]
    return engine


ENGINE = make_engine()
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 50.0]),
    top_k=st.sampled_from([0, 1, 3, 1000]),
    top_p=st.sampled_from([1e-6, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.5, 100.0]),
    cfg_scale=st.sampled_from([0.0, 1.0, 1.0, 3.0]),
)
PLANS = st.one_of(
    st.none(),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(
        lambda kinds: tuple(kind for kind, _ in itertools.groupby(kinds) if kind != "text")
        or ("text",)
    ),
    st.sampled_from([("text", "image", "text"), ("image", "image"), ("speech", "text", "dna")]),
)  # fmt: skip
SIZES = st.sampled_from([None, {"image": (3, 2)}, {"video": (2, 4)}, {"image": (5, 6), "video": (3, 3)}])


def finish_reason(grammar: Grammar, state: Any, ids: Iterable[int], limit: int) -> str:
    """ "length" if somewhere the limit alone left no choice."""
    cut = False
    for place, token in enumerate(ids):
        if grammar.allowed(state, limit - place) == ((token, token + 1),):
            cut = cut or grammar.allowed(state) != ((token, token + 1),)
        state = grammar.advance(state, token)
    return "length" if cut else "stop"


def check(reply: GeneratedIds, plan: tuple[str, ...] | None, sizes: Any, limit: int) -> None:
    grammar = ENGINE.grammar
    start = grammar.reply(plan, sizes=sizes)
    assert grammar.finished(grammar.walk(start, reply.ids))
    assert len(reply.ids) <= limit
    pieces = grammar.parse(reply.ids)
    for piece in pieces:
        if piece.kind != "text":
            counts, shape = SHAPES[piece.kind]
            assert (piece.values >= 0).all() and (piece.values < torch.tensor(counts).numpy()).all()
            assert len(piece.header) == shape.num_global_codes
            assert (piece.header >= 0).all() and (piece.header < GLOBAL_SIZE).all()
            pinned = (sizes or {}).get(piece.kind)
            assert pinned is None or piece.size == pinned
            assert isinstance(shape, CodeGrid) or shape.min_length <= len(piece.values) <= shape.max_length
    if plan is not None:
        assert [piece.kind for piece in pieces] == list(plan)
    assert reply.finish_reason == finish_reason(grammar, start, reply.ids, limit)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_reply_is_legal(data: st.DataObject) -> None:
    """Up to twelve replies a batch, each with its own prompt; budgets from the least possible up."""
    plan, sizes = data.draw(PLANS), data.draw(SIZES)
    sampling = data.draw(st.dictionaries(st.sampled_from(KINDS), SAMPLINGS))
    grammar = ENGINE.grammar
    least = grammar.min_remaining(grammar.reply(plan, sizes=sizes))
    limit = least + data.draw(st.integers(0, 40) | st.just(0))
    lengths = data.draw(st.lists(st.integers(1, CONTEXT - least), min_size=8, max_size=12))
    seed = data.draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    replies = ENGINE.generate(asked(
        [[3] * length for length in lengths], [plan] * len(lengths), sampling, limit, seed,
        null_prompt=[1, 2], sizes=sizes,
    ))  # fmt: skip
    for length, reply in zip(lengths, replies, strict=True):
        check(reply, plan, sizes, min(limit, CONTEXT - length))


@pytest.mark.parametrize("budget", range(2, 40))
def test_a_segment_that_does_not_fit_is_not_started(budget: int) -> None:
    """Free replies: what is opened is also closed, and all that fits is opened now and then."""
    torch.manual_seed(0)
    replies = ENGINE.generate(asked([[3]] * 40, None, {}, budget, seed=budget))
    grammar = ENGINE.grammar
    seen = {piece.kind for reply in replies for piece in grammar.parse(reply.ids)}
    fits = {kind for kind in SHAPES if grammar.min_remaining(grammar.reply((kind,))) <= budget}
    assert seen - {"text"} <= fits
    if budget > 20:
        assert seen == set(KINDS)


def drawn_sampling(random: np.random.Generator) -> Sampling:
    return Sampling(
        temperature=random.choice([0.0, 0.7, 1.0, 30.0]),
        top_k=random.choice([0, 1, 5]),
        top_p=random.choice([0.3, 1.0]),
        min_p=random.choice([0.0, 0.5]),
        repetition_penalty=random.choice([0.5, 1.0, 3.0]),
        cfg_scale=random.choice([0.0, 1.0, 4.0]),
    )


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2, 5.0])
def test_every_reply_of_random_weights_decodes(own_model: AnyToken, spread: float) -> None:
    """Each of 120 replies has its own prompt, plan, budget and settings; a budget below the least is refused."""
    grammar, random = own_model.processor.grammar, np.random.default_rng(0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in own_model.lm.parameters():
            parameter.normal_(std=spread)
    scheduler, null = own_model.engine.scheduler(), own_model.processor.null_prompt()
    plans = [None, ("text",), ("image",), ("tone",), ("text", "image"), ("image", "text", "tone", "image")]
    made: list[tuple[tuple[str, ...] | None, int]] = []
    for _ in range(120):
        plan, prompt = plans[random.integers(len(plans))], [1] * random.integers(1, 150)
        least = grammar.min_remaining(grammar.reply(plan))
        limit = least + int(random.integers(-1, 30))
        settings = {kind: drawn_sampling(random) for kind in own_model.kinds}
        options = {"output_kinds": plan, "sampling": settings, "max_new_tokens": limit, "null_prompt": null}
        if limit < least:
            with pytest.raises(ValueError, match=f"{limit}"):
                scheduler.submit(GenerationRequest(prompt, **options))
            continue
        request = GenerationRequest(prompt, seed=0, draw=len(made), **options)
        assert scheduler.submit(request) == len(made)
        made.append((plan, limit))
    replies: list[list[int]] = [[] for _ in made]
    reasons = [""] * len(made)
    while len(scheduler):
        for token in scheduler.step():
            replies[token.row].append(token.id)
            reasons[token.row] = token.finish_reason or ""
    for (plan, limit), ids, reason in zip(made, replies, reasons, strict=True):
        assert len(ids) <= limit and reason == finish_reason(grammar, grammar.reply(plan), ids, limit)
        kinds = [segment.kind for segment in own_model.detokenize(ids)]
        assert kinds == list(plan or kinds) and kinds
