"""The generation loop against a plain one, and what it promises: validity, seeds, budgets, batches."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from reference_loop import asked, reference

from anytoken.inference import batch as batch_module
from anytoken.inference import scheduler as scheduler_module
from anytoken.inference.api import AnyToken
from anytoken.inference.engine import (
    Engine,
    GeneratedIds,
    Token,
)
from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.sampling import Sampling
from anytoken.utils.errors import RequestError

GREEDY = {kind: Sampling(temperature=0) for kind in ("text", "image", "tone")}
PLANS = [None, ("text",), ("image",), ("tone",), ("tone", "text", "image")]
WORDS = ["red apple", "a", "What is this? green pear", "schön"]


@pytest.fixture
def engine(model: AnyToken) -> Engine:
    return Engine(model.lm, model.processor.grammar)


def prompts_of(model: AnyToken) -> list[list[int]]:
    return [model.encode_prompt(words) for words in WORDS]


EXPECTED: dict[str, list[list[int]]] = {}  # the slow loop runs once for all ways that are compared with it


def expected_of(model: AnyToken, plan: Sequence[str] | None, limit: int, **guided: Any) -> list[list[int]]:
    """The reference loop's replies; only for the shared model."""
    key, grammar = repr((plan, limit, guided)), model.processor.grammar
    if key not in EXPECTED:
        EXPECTED[key] = [
            reference(model.lm, grammar, prompt, plan, limit, **guided) for prompt in prompts_of(model)
        ]
    return EXPECTED[key]


WAYS = ["flat", "module", "chunks", "compiled"]


@pytest.fixture(params=[pytest.param(way, marks=[pytest.mark.slow] * (way == "compiled")) for way in WAYS])
def any_engine(
    request: pytest.FixtureRequest, model: AnyToken, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    """An engine for each way of decoding."""
    if request.param == "compiled":
        return Engine(model.lm, model.processor.grammar, compiled=True)
    if request.param == "module":
        engine.head().decoder = None
    else:
        assert engine.head().decoder is not None
    if request.param == "chunks":
        monkeypatch.setattr(batch_module, "CHUNK", 3)
    return engine


@pytest.mark.parametrize("plan", PLANS)
def test_greedy_equals_the_reference_loop(
    model: AnyToken, any_engine: Engine, plan: tuple[str, ...] | None
) -> None:
    """Together, alone, several of one prompt, and once more with what was kept of the first time."""
    prompts, expected = prompts_of(model), expected_of(model, plan, 40)
    prefixes = PrefixCache(len(prompts))
    for rows in ([0, 1, 2, 3], [2], [1, 1, 3, 1]):
        some = [prompts[row] for row in rows]
        for _ in range(2):
            tokens = any_engine.stream(asked(some, [plan] * len(rows), GREEDY, 40, prefixes=prefixes))
            assert replies_of(tokens, len(rows)) == [expected[row] for row in rows]
    assert len(prefixes) == len(prompts)


@pytest.mark.parametrize("plan", [("image",), ("text", "image"), None])
def test_guided_greedy_equals_the_reference_loop(
    model: AnyToken, any_engine: Engine, plan: tuple[str, ...] | None
) -> None:
    """The branch without a prompt joins late in ("text", "image"), when the picture begins."""
    prompts, null = prompts_of(model), model.processor.null_prompt()
    sampling = {**GREEDY, "image": Sampling(temperature=0, cfg_scale=3.0)}
    expected = expected_of(model, plan, 40, null_prompt=null, cfg_scale={"image": 3.0})
    for rows in ([0, 1, 2, 3], [3]):  # together, and alone
        some = [prompts[row] for row in rows]
        found = any_engine.generate(asked(some, [plan] * len(rows), sampling, 40, null_prompt=null))
        assert [reply.ids for reply in found] == [expected[row] for row in rows]
    if plan == ("image",):
        assert expected != expected_of(model, plan, 40)


def replies_of(tokens: Iterable[Token], count: int) -> list[list[int]]:
    replies: list[list[int]] = [[] for _ in range(count)]
    for token in tokens:
        replies[token.row].append(token.id)
    return replies


def test_a_prompt_is_read_once_for_many_samples_and_a_prefix_never_again(
    model: AnyToken, engine: Engine, fed: list[int]
) -> None:
    prompt, plans = [*range(90)], [("text",)] * 8
    engine.generate(asked([prompt] * 8, plans, GREEDY, 3))
    assert fed[:2] == [len(prompt) - 1, 8]
    fed.clear()
    prefixes = PrefixCache()
    first = replies_of(engine.stream(asked([prompt], [("text",)], GREEDY, 5, prefixes=prefixes)), 1)[0]
    assert fed == [90, 1, 1, 1]
    fed.clear()
    longer = [*prompt, *first[:-1], 7, 8]
    replies_of(engine.stream(asked([longer], [("text",)], GREEDY, 2, prefixes=prefixes)), 1)
    assert sum(fed) == len(longer) - 93  # the reply's last id and its end were never fed


def test_prefixes_of_other_weights_are_forgotten(own_model: AnyToken) -> None:
    engine, prefixes = own_model.engine, PrefixCache()
    prompt = prompts_of(own_model)[0]

    def run() -> list[int]:
        return replies_of(engine.stream(asked([prompt], [("text",)], GREEDY, 20, prefixes=prefixes)), 1)[0]

    before = run()
    with torch.no_grad():
        for parameter in own_model.lm.model.layers.parameters():
            parameter.mul_(-0.5)
    expected = reference(own_model.lm, own_model.processor.grammar, prompt, ("text",), 20)
    assert run() == expected != before


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_a_row_does_not_depend_on_its_batch(model: AnyToken, engine: Engine, cfg_scale: float) -> None:
    prompts, null = prompts_of(model), model.processor.null_prompt()
    sampling = {"image": Sampling(top_k=6, cfg_scale=cfg_scale)}
    plans = [None, ("image",), ("tone", "image"), ("text",)]
    together = engine.generate(
        asked(prompts, plans, sampling, 40, seed=5, null_prompt=null, rows=[0, 0, 1, 0])
    )
    for index, number in enumerate([0, 0, 1, 0]):
        alone = engine.generate(
            asked([prompts[index]], [plans[index]], sampling, 40, seed=5, null_prompt=null, rows=[number])
        )
        assert alone == [together[index]]


def test_more_rows_than_fit_together(
    model: AnyToken, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(model)
    expected = engine.generate(asked(prompts, None, GREEDY, 20))
    monkeypatch.setattr(scheduler_module, "MAX_ROWS", 3)
    assert engine.generate(asked(prompts, None, GREEDY, 20)) == expected


def test_seeds(model: AnyToken, engine: Engine) -> None:
    def run(seed: int | None, rows: list[int] | None = None) -> list[GeneratedIds]:
        return engine.generate(
            asked([prompts_of(model)[0]] * 2, [("text",)] * 2, {}, 30, seed=seed, rows=rows)
        )

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)
    first, second = run(3)
    assert first != second and run(3, [0, 0]) == [first, first]


def test_forced_tokens_need_no_forward(
    model: AnyToken, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = ModelRunner.features
    monkeypatch.setattr(
        ModelRunner, "features", lambda self, *inputs: calls.append(1) or original(self, *inputs)
    )
    sizes = {"image": (2, 3)}
    [reply] = engine.generate(asked([prompts_of(model)[0]], [("image",)], GREEDY, sizes=sizes))
    assert len(reply.ids) == 1 + 2 + 6 + 1 + 1  # open, two sizes, codes, close, end
    assert len(calls) == 6


def test_finish_reason_tells_a_cut_from_an_end(model: AnyToken, engine: Engine) -> None:
    prompt = prompts_of(model)[0]
    end = model.token_space.end
    for limit in (2, 5):
        [reply] = engine.generate(asked([prompt], [("text",)], GREEDY, limit))
        expected = "length" if len(reply.ids) == limit else "stop"
        assert reply.ids[-1] == end and reply.finish_reason == expected == "length"
    [picture] = engine.generate(asked([prompt], [("image",)], GREEDY, sizes={"image": (1, 1)}))
    assert picture.finish_reason == "stop"
    [tone] = engine.generate(asked([prompt], [("tone",)], {"tone": Sampling(temperature=0)}, 7))
    assert len(tone.ids) == 7 and tone.finish_reason == "length"  # two frames fit, no third


def test_tokens_come_as_they_are_made(model: AnyToken, engine: Engine) -> None:
    seen = list(engine.stream(asked(prompts_of(model), None, GREEDY, 12)))
    for row, reply in enumerate(engine.generate(asked(prompts_of(model), None, GREEDY, 12))):
        tokens = [token for token in seen if token.row == row]
        assert [token.id for token in tokens] == reply.ids
        assert [token.finish_reason for token in tokens] == [None] * (len(reply.ids) - 1) + [
            reply.finish_reason
        ]
    assert [token.row for token in seen] != sorted(token.row for token in seen)


def test_repetition_penalty_avoids_what_the_reply_holds(model: AnyToken, engine: Engine) -> None:
    prompt = prompts_of(model)[0]
    plain = engine.generate(asked([prompt], [("text",)], {"text": Sampling(top_k=2)}, 60, seed=0))[0].ids
    strict = Sampling(top_k=2, repetition_penalty=1e6)
    varied = engine.generate(asked([prompt], [("text",)], {"text": strict}, 60, seed=0))[0].ids
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

    assert ModelRunner(model.lm).sliced
    monkeypatch.setattr(type(model.lm), "forward", negated)
    assert not ModelRunner(model.lm).sliced
    engine = Engine(model.lm, model.processor.grammar)
    found = engine.generate(asked(prompts_of(model), [("image",)] * 4, GREEDY, 30))
    grammar = model.processor.grammar
    expected = [reference(model.lm, grammar, prompt, ("image",), 30) for prompt in prompts_of(model)]
    assert [reply.ids for reply in found] == expected


@pytest.mark.parametrize("exit_name", ["end", "tone"])
def test_a_planned_text_ends_where_the_model_would_end_it(
    model: AnyToken, monkeypatch: pytest.MonkeyPatch, exit_name: str
) -> None:
    space, original = model.token_space, type(model.lm).forward
    exit_id = space.end if exit_name == "end" else space.open_token("tone")

    def done(self: torch.nn.Module, *args: object, **inputs: object) -> object:
        output = original(self, *args, **inputs)
        output.logits[..., exit_id] += 100
        return output

    monkeypatch.setattr(type(model.lm), "forward", done)
    engine = Engine(model.lm, model.processor.grammar)
    [reply] = engine.generate(asked(prompts_of(model)[:1], [("text", "image")], GREEDY, 60))
    assert reply.ids[1] == space.open_token("image")  # after a text of one id
    inputs = model.lm_inputs(WORDS[0], output=["text", "image"], max_new_tokens=60)
    ids = model.lm.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids[: len(reply.ids)] == reply.ids
    [free] = engine.generate(asked(prompts_of(model)[:1], [("text",)], GREEDY, 60))
    assert free.ids[1] == space.end if exit_name == "end" else len(free.ids) > 2


def test_what_does_not_fit_is_refused_before_the_first_token(model: AnyToken, engine: Engine) -> None:
    prompt = prompts_of(model)[0]
    with pytest.raises(RequestError, match=r"300.*context is 256"):
        engine.stream(asked([[1] * 300]))
    with pytest.raises(ValueError, match="max_new_tokens is 3"):
        engine.stream(asked([prompt], [("image",)], max_new_tokens=3))
    with pytest.raises(RequestError, match=r"max_new_tokens.*0"):
        engine.stream(asked([prompt], max_new_tokens=0))
    for seed in (-1, 1.5, True):
        with pytest.raises(RequestError, match=f"seed.*{seed}"):
            engine.stream(asked([prompt], seed=seed))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="null_prompt"):
        engine.stream(asked([prompt], sampling={"image": Sampling(cfg_scale=2)}))
