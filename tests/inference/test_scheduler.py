"""Continuous batching: who joins late gets the same ids as alone, who is cancelled leaves nothing behind."""

import pytest
from reference_loop import asked

from anytoken.inference.api import AnyToken
from anytoken.inference.engine import (
    Engine,
)
from anytoken.inference.request import GenerationRequest
from anytoken.inference.sampling import Sampling
from anytoken.inference.scheduler import Scheduler
from anytoken.utils.errors import RequestError

SAMPLING = {"text": Sampling(top_k=9), "image": Sampling(temperature=0.7, cfg_scale=2.0), "tone": Sampling()}
JOBS = [
    ("red apple", ("image",)), ("a", None), ("What is this? green pear", ("tone", "text")),
    ("schön", ("text", "image")), ("red apple", ("image",)), ("a", ("tone",)),
]  # fmt: skip


def alone(model: AnyToken, engine: Engine, job: int) -> tuple[list[int], str]:
    words, plan = JOBS[job]
    [reply] = engine.generate(asked(
        [model.encode_prompt(words)], [plan], SAMPLING, 40, 7, null_prompt=model.processor.null_prompt(), rows=[job]
    ))  # fmt: skip
    return reply.ids, reply.finish_reason


def submit(model: AnyToken, scheduler: Scheduler, job: int) -> int:
    words, plan = JOBS[job]
    null = model.processor.null_prompt()
    return scheduler.submit(
        GenerationRequest(model.encode_prompt(words), plan, SAMPLING, 40, seed=7, draw=job, null_prompt=null)
    )


@pytest.mark.parametrize(("max_rows", "every"), [(64, 1), (64, 5), (2, 3)])
def test_late_joiners_get_what_they_get_alone(model: AnyToken, max_rows: int, every: int) -> None:
    engine = Engine(model.lm, model.processor.grammar)
    scheduler = engine.scheduler(max_rows)
    ids: dict[int, list[int]] = {}
    reasons = {}
    jobs = list(range(len(JOBS)))
    steps = 0
    while jobs or len(scheduler):
        if jobs and steps % every == 0:
            job = jobs.pop(0)
            assert submit(model, scheduler, job) == job
        for token in scheduler.step():
            ids.setdefault(token.row, []).append(token.id)
            if token.finish_reason:
                reasons[token.row] = token.finish_reason
        steps += 1
    assert {job: (ids[job], reasons[job]) for job in ids} == {
        job: alone(model, engine, job) for job in range(len(JOBS))
    }
    assert not scheduler._batch.slots and scheduler.step() == []


def test_cancelling_leaves_the_others_as_they_are(model: AnyToken) -> None:
    engine = Engine(model.lm, model.processor.grammar)
    scheduler = engine.scheduler(3)
    for job in range(4):
        submit(model, scheduler, job)
    ids: dict[int, list[int]] = {}
    for step in range(200):
        if step == 4:
            scheduler.cancel(0)  # runs, with a guidance row
            scheduler.cancel(0)  # is gone
            scheduler.cancel(99)  # never was
        for token in scheduler.step():
            ids.setdefault(token.row, []).append(token.id)
        if step == 4:
            assert 0 not in {row.number for row in scheduler._rows}
    stopped = ids.pop(0)
    assert stopped == alone(model, engine, 0)[0][: len(stopped)]
    assert ids == {job: alone(model, engine, job)[0] for job in (1, 2, 3)}
    assert len(scheduler) == 0 and not scheduler._batch.slots


def test_a_request_that_waits_can_be_cancelled(model: AnyToken) -> None:
    scheduler = Engine(model.lm, model.processor.grammar).scheduler(1)
    submit(model, scheduler, 2)
    submit(model, scheduler, 5)
    scheduler.cancel(1)
    numbers = set()
    while len(scheduler):
        numbers |= {token.row for token in scheduler.step()}
    assert numbers == {0}


def test_what_begins_without_a_choice_comes_before_the_model_reads(model: AnyToken) -> None:
    scheduler = Engine(model.lm, model.processor.grammar).scheduler()
    submit(model, scheduler, 0)
    assert [token.id for token in scheduler.step()] == [model.token_space.open_token("image")]
    assert not scheduler._batch.cache.keys


def test_a_bad_request_is_refused_and_the_batch_goes_on(model: AnyToken) -> None:
    engine = Engine(model.lm, model.processor.grammar)
    scheduler = engine.scheduler()
    submit(model, scheduler, 0)
    with pytest.raises(RequestError, match="max_new_tokens"):
        scheduler.submit(GenerationRequest([1], max_new_tokens=0))
    assert len(scheduler) == 1
    found = []
    while len(scheduler):
        found += [token.id for token in scheduler.step()]
    assert found == alone(model, engine, 0)[0]


def test_log_probabilities(model: AnyToken) -> None:
    """Of the ids among those allowed, whatever the sampling; ids without a choice have 0."""
    engine, grammar = Engine(model.lm, model.processor.grammar), model.processor.grammar
    prompt = model.encode_prompt("red apple")
    tokens = list(
        engine.stream(
            asked([prompt], [("image",)], {"image": Sampling(temperature=3.0)}, seed=1, scored=True)
        )
    )
    ids = [token.id for token in tokens]
    import torch

    with torch.no_grad():
        logits = model.lm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    state = grammar.reply(("image",))
    for token, row in zip(tokens, logits, strict=True):
        allowed = grammar.mask(grammar.allowed(state, None))
        expected = row[: len(allowed)].masked_fill(~allowed, -torch.inf).log_softmax(-1)[token.id].item()
        assert token.logprob == pytest.approx(expected, abs=1e-4)
        state = grammar.advance(state, token.id)
