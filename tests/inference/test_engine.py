"""The generation loop against a plain one, and what it promises: validity, seeds, budgets, batches."""

import random
from collections.abc import Sequence

import pytest
import torch

from anytoken.inference import engine as engine_module
from anytoken.inference.api import AnyToken
from anytoken.inference.batch import Head
from anytoken.inference.engine import Engine, EngineError, GeneratedIds, Token
from anytoken.inference.sampling import Sampling

GREEDY = {kind: Sampling(temperature=0) for kind in ("text", "image", "tone")}
PLANS = [None, ("text",), ("image",), ("tone",), ("tone", "text", "image")]
WORDS = ["red apple", "a", "What is this? green pear", "schön"]


@pytest.fixture
def engine(model: AnyToken) -> Engine:
    return Engine(model.lm, model.processor.grammar)


def prompts_of(model: AnyToken) -> list[list[int]]:
    return [model.encode_prompt(words) for words in WORDS]


@torch.inference_mode()
def reference(
    model: AnyToken,
    prompt: list[int],
    plan: Sequence[str] | None,
    limit: int,
    cfg: dict[str, float] | None = None,
) -> list[int]:
    """Greedy decoding with nothing clever: every step reads the whole sequence and computes all logits."""
    grammar, space = model.processor.grammar, model.token_space
    opens = {space.open_token(name): name for name in space.modalities}
    state, ids, kind = grammar.reply(plan), [], "text"
    while not grammar.finished(state):
        logits = model.lm(torch.tensor([prompt + ids]), use_cache=False).logits[0, -1]
        scale = (cfg or {}).get(kind, 1)
        if scale != 1:
            free = model.lm(torch.tensor([model.processor.null_prompt() + ids]), use_cache=False).logits[
                0, -1
            ]
            logits = free + scale * (logits - free)
        allowed = torch.full_like(logits, -torch.inf)
        for start, stop in grammar.allowed(state, limit - len(ids)):
            allowed[start:stop] = logits[start:stop]
        ids.append(int(allowed.argmax()))
        state = grammar.advance(state, ids[-1])
        kind = opens.get(ids[-1], kind)
        if ids[-1] in {space.close_token(name) for name in space.modalities}:
            kind = "text"
    return ids


@pytest.mark.parametrize("plan", PLANS)
def test_greedy_equals_the_reference_loop(
    model: AnyToken, engine: Engine, plan: tuple[str, ...] | None
) -> None:
    prompts = prompts_of(model)
    found = engine.generate(prompts, [plan] * len(prompts), GREEDY, max_new_tokens=60)
    assert [reply.ids for reply in found] == [reference(model, prompt, plan, 60) for prompt in prompts]


@pytest.mark.parametrize("plan", [("image",), ("text", "image"), None])
def test_guided_greedy_equals_the_reference_loop(
    model: AnyToken, engine: Engine, plan: tuple[str, ...] | None
) -> None:
    """The branch without a prompt joins late in ("text", "image"), when the picture begins."""
    prompts = prompts_of(model)
    sampling = {**GREEDY, "image": Sampling(temperature=0, cfg_scale=3.0)}
    null = model.processor.null_prompt()
    found = engine.generate(prompts, [plan] * len(prompts), sampling, 50, null_prompt=null)
    expected = [reference(model, prompt, plan, 50, {"image": 3.0}) for prompt in prompts]
    assert [reply.ids for reply in found] == expected
    if plan == ("image",):
        assert expected != [reference(model, prompt, plan, 50) for prompt in prompts]


def test_every_reply_is_valid_for_any_sampling_and_budget(model: AnyToken, engine: Engine) -> None:
    """240 replies with random settings: each walks the grammar to its end, fits its budget and decodes."""
    grammar = model.processor.grammar
    chance = random.Random(0)
    count = 0
    for trial in range(24):
        plan = chance.choice(PLANS)
        sampling = {
            kind: Sampling(
                temperature=chance.choice([0, 0.7, 1, 3]),
                top_k=chance.choice([0, 1, 5]),
                top_p=chance.choice([1, 0.8]),
                repetition_penalty=chance.choice([1, 1.3]),
                cfg_scale=chance.choice([1, 1, 2]),
            )
            for kind in model.kinds
        }
        limit = grammar.min_remaining(grammar.reply(plan)) + chance.choice([0, 1, 2, 5, 30])
        prompts = [chance.choice(prompts_of(model)) for _ in range(10)]
        null = model.processor.null_prompt()
        for reply in engine.generate(prompts, [plan] * 10, sampling, limit, seed=trial, null_prompt=null):
            assert len(reply.ids) <= limit
            assert grammar.finished(grammar.walk(grammar.reply(plan), reply.ids))
            kinds = [segment.kind for segment in model.detokenize(reply.ids)]
            assert plan is None or kinds == list(plan)
            count += 1
    assert count == 240


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_a_row_does_not_depend_on_its_batch(model: AnyToken, engine: Engine, cfg_scale: float) -> None:
    prompts, null = prompts_of(model), model.processor.null_prompt()
    sampling = {"image": Sampling(top_k=6, cfg_scale=cfg_scale)}
    plans = [None, ("image",), ("tone", "image"), ("text",)]
    together = engine.generate(prompts, plans, sampling, 40, seed=5, null_prompt=null, rows=[0, 0, 1, 0])
    for index, number in enumerate([0, 0, 1, 0]):
        alone = engine.generate(
            [prompts[index]], [plans[index]], sampling, 40, seed=5, null_prompt=null, rows=[number]
        )
        assert alone == [together[index]]


def test_more_rows_than_fit_together(
    model: AnyToken, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(model)
    expected = engine.generate(prompts, None, GREEDY, 20)
    monkeypatch.setattr(engine_module, "MAX_ROWS", 3)
    assert engine.generate(prompts, None, GREEDY, 20) == expected


def test_seeds(model: AnyToken, engine: Engine) -> None:
    def run(seed: int | None, rows: list[int] | None = None) -> list[GeneratedIds]:
        return engine.generate([prompts_of(model)[0]] * 2, [("text",)] * 2, {}, 30, seed=seed, rows=rows)

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)
    first, second = run(3)
    assert first != second and run(3, [0, 0]) == [first, first]


def test_forced_tokens_need_no_forward(
    model: AnyToken, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = Head.features
    monkeypatch.setattr(Head, "features", lambda self, **inputs: calls.append(1) or original(self, **inputs))
    sizes = {"image": (2, 3)}
    [reply] = engine.generate([prompts_of(model)[0]], [("image",)], GREEDY, sizes=sizes)
    assert len(reply.ids) == 1 + 2 + 6 + 1 + 1  # open, two sizes, codes, close, end
    assert len(calls) == 6


def test_finish_reason_tells_a_cut_from_an_end(model: AnyToken, engine: Engine) -> None:
    prompt = prompts_of(model)[0]
    end = model.token_space.end
    for limit in (2, 5):
        [reply] = engine.generate([prompt], [("text",)], GREEDY, limit)
        expected = "length" if len(reply.ids) == limit else "stop"
        assert reply.ids[-1] == end and reply.finish_reason == expected == "length"
    [picture] = engine.generate([prompt], [("image",)], GREEDY, sizes={"image": (1, 1)})
    assert picture.finish_reason == "stop"
    [tone] = engine.generate([prompt], [("tone",)], {"tone": Sampling(temperature=0)}, 7)
    assert len(tone.ids) == 7 and tone.finish_reason == "length"  # two frames fit, no third


def test_tokens_come_as_they_are_made(model: AnyToken, engine: Engine) -> None:
    seen: list[Token] = []
    replies = engine.generate(prompts_of(model), None, GREEDY, 12, on_token=seen.append)
    for row, reply in enumerate(replies):
        tokens = [token for token in seen if token.row == row]
        assert [token.id for token in tokens] == reply.ids
        assert [token.finish_reason for token in tokens] == [None] * (len(reply.ids) - 1) + [
            reply.finish_reason
        ]
    assert [token.row for token in seen] != sorted(token.row for token in seen)


def test_repetition_penalty_avoids_what_the_reply_holds(model: AnyToken, engine: Engine) -> None:
    prompt = prompts_of(model)[0]
    plain = engine.generate([prompt], [("text",)], {"text": Sampling(top_k=2)}, 60, seed=0)[0].ids
    strict = Sampling(top_k=2, repetition_penalty=1e6)
    varied = engine.generate([prompt], [("text",)], {"text": strict}, 60, seed=0)[0].ids
    assert len(set(plain)) < len(plain)
    assert len(set(varied)) == len(varied)


def test_a_model_with_its_own_logits_is_asked_for_all_of_them(
    model: AnyToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = type(model.lm).forward

    def negated(self: torch.nn.Module, *args: object, **inputs: object) -> object:
        output = original(self, *args, **inputs)
        output.logits = -output.logits
        return output

    assert Head(model.lm).sliced
    monkeypatch.setattr(type(model.lm), "forward", negated)
    assert not Head(model.lm).sliced
    engine = Engine(model.lm, model.processor.grammar)
    found = engine.generate(prompts_of(model), [("image",)] * 4, GREEDY)
    expected = [reference(model, prompt, ("image",), 200) for prompt in prompts_of(model)]
    assert [reply.ids for reply in found] == expected


def test_what_does_not_fit_is_refused_before_the_first_token(model: AnyToken, engine: Engine) -> None:
    prompt = prompts_of(model)[0]
    with pytest.raises(EngineError, match=r"300.*context is 256"):
        engine.stream([[1] * 300])
    with pytest.raises(ValueError, match="max_new_tokens is 3"):
        engine.stream([prompt], [("image",)], max_new_tokens=3)
    with pytest.raises(EngineError, match=r"max_new_tokens.*0"):
        engine.stream([prompt], max_new_tokens=0)
    for seed in (-1, 1.5, True):
        with pytest.raises(EngineError, match=f"seed.*{seed}"):
            engine.stream([prompt], seed=seed)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="null_prompt"):
        engine.stream([prompt], sampling={"image": Sampling(cfg_scale=2)})
