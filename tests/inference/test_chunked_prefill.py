"""Prompts that are read in pieces between the decoding steps of others: the same replies, and nobody waits for long."""

import random

import pytest

from anytoken.inference import batch as batch_module
from anytoken.inference.api import AnyToken
from anytoken.inference.engine import Engine
from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.request import GenerationRequest
from anytoken.inference.sampling import Sampling
from anytoken.inference.scheduler import Scheduler
from anytoken.utils.errors import RequestError

SAMPLING = {"text": Sampling(top_k=9), "image": Sampling(temperature=0.7, cfg_scale=2.0), "tone": Sampling()}
LONG = "What is this? " * 14
JOBS = [
    ("red apple", ("image",)), ("a", None), ("green pear", ("tone", "text")), ("red apple", ("image",)),
    (LONG, ("image", "text")), (LONG, ("image",)), (LONG + "red", ("tone", "image")), (LONG, ("text", "image")),
]  # fmt: skip


def request(model: AnyToken, job: int) -> GenerationRequest:
    words, plan = JOBS[job]
    null = model.processor.null_prompt()
    return GenerationRequest(model.encode_prompt(words), plan, SAMPLING, 40, 7, draw=job, null_prompt=null)


@pytest.fixture(scope="module")
def alone(model: AnyToken) -> list[list[int]]:
    """What each job is answered when nothing else runs and its prompt is read whole."""
    engine = Engine(model.lm, model.processor.grammar)
    return [engine.generate([request(model, job)])[0].ids for job in range(len(JOBS))]


@pytest.mark.parametrize("limit", [1, 5, 48])
@pytest.mark.parametrize("seed", range(2))
def test_replies_are_the_same_whoever_joins_or_leaves_at_whatever_step(
    model: AnyToken, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, limit: int, seed: int
) -> None:
    monkeypatch.setattr(batch_module, "CHUNK", 32)
    scheduler, draw = Engine(model.lm, model.processor.grammar).scheduler(5, limit), random.Random(seed)
    left = draw.sample(range(len(JOBS)), len(JOBS))
    jobs: dict[int, int] = {}
    found: dict[int, list[int]] = {}
    cancelled = set()
    while left or len(scheduler):
        while left and draw.random() < 0.3:
            job = left.pop()
            jobs[scheduler.submit(request(model, job))] = job
        if jobs and draw.random() < 0.02:
            cancelled.add(gone := draw.choice(list(jobs)))
            scheduler.cancel(gone)
        for token in scheduler.step():
            found.setdefault(token.row, []).append(token.id)
    for number, job in jobs.items():
        ids = found.get(number, [])
        assert ids == (alone[job][: len(ids)] if number in cancelled else alone[job])
    assert len(cancelled) < len(jobs) and not scheduler._batch.slots


def prefill(model: AnyToken, scheduler: Scheduler, fed: list[int], limit: int) -> int:
    """Let a text run and two long prompts join it; how many steps read a part of them."""
    text = GenerationRequest(model.encode_prompt("a"), ("text",), {"text": Sampling(temperature=2.0)}, 150, 1)
    running, steps = scheduler.submit(text), 0
    scheduler.step()
    late = {scheduler.submit(request(model, job)) for job in (4, 6)}
    begun: set[int] = set()
    while begun != late:
        fed.clear()
        tokens = scheduler.step()
        assert len(scheduler) == 3
        if not fed:  # what the newcomers begin with without asking the model
            continue
        assert [token.row for token in tokens].count(running) == 1, (
            "whoever is decoded gets an id in every step"
        )
        assert sum(fed) <= limit + 5, "a piece, and an id of each sequence"
        begun |= {token.row for token in tokens} - {running}
        steps += 1
    return steps


def test_a_running_reply_waits_for_no_more_than_a_piece_of_a_long_prompt(
    model: AnyToken, fed: list[int]
) -> None:
    limit = 16
    lengths = [len(model.encode_prompt(JOBS[job][0])) for job in (4, 6)]
    assert min(lengths) > 5 * limit
    engine = Engine(model.lm, model.processor.grammar)
    assert prefill(model, engine.scheduler(max_prefill_tokens=limit), fed, limit) >= sum(lengths) // limit
    with pytest.raises(AssertionError, match="a piece"):
        prefill(model, engine.scheduler(), fed, limit)


def test_a_short_prompt_does_not_wait_for_a_long_one(
    model: AnyToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when neither was decoded before: control returns after each chunk."""
    monkeypatch.setattr(batch_module, "CHUNK", 16)
    scheduler = Engine(model.lm, model.processor.grammar).scheduler(max_prefill_tokens=16)
    long = scheduler.submit(request(model, 6))
    scheduler.step()  # its first id needs no model
    assert scheduler.step() == []
    short = scheduler.submit(request(model, 1))
    while not (tokens := scheduler.step()):
        pass
    assert {token.row for token in tokens} == {short} and scheduler._batch.slots[1] is scheduler._rows[
        long
    ].slot


def test_a_guided_request_alone_reads_whole_chunks(
    model: AnyToken, fed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sequence without the prompt is read first, and only waits then: nothing is decoded that could be held up."""
    monkeypatch.setattr(batch_module, "CHUNK", 32)
    scheduler = Engine(model.lm, model.processor.grammar).scheduler(max_prefill_tokens=4)
    scheduler.submit(request(model, 5))
    scheduler.step()  # its first id needs no model
    assert not fed
    while not scheduler.step():
        pass
    chunks = -(-len(scheduler._rows[0].slot.ids) // 32)
    assert chunks > 3 and len(fed) == chunks + 2, "the last id of the empty prompt, then that of both"


def test_equal_prompts_are_read_once_and_known_prefixes_not_at_all(model: AnyToken, fed: list[int]) -> None:
    prompt, prefixes = model.encode_prompt(LONG), PrefixCache(4)
    scheduler = Engine(model.lm, model.processor.grammar).scheduler(max_prefill_tokens=16)
    greedy = {"text": Sampling(temperature=0)}

    def ask(text: list[int], **options: object) -> None:
        scheduler.submit(GenerationRequest(text, ("text",), greedy, 3, **options))  # type: ignore[arg-type]

    ask(model.encode_prompt("a"))
    scheduler.step()
    for _ in range(3):
        ask(prompt, prefixes=prefixes)
    fed.clear()
    while len(scheduler):
        scheduler.step()
    assert len(prompt) <= sum(fed) < len(prompt) + 20
    ask([*prompt, 5, 6], prefixes=prefixes)
    fed.clear()
    while len(scheduler):
        scheduler.step()
    assert sum(fed) < 8


def test_a_cancelled_prompt_leaves_what_it_had_read_to_its_prefixes(model: AnyToken, fed: list[int]) -> None:
    prompt, prefixes = model.encode_prompt(LONG), PrefixCache()
    scheduler = Engine(model.lm, model.processor.grammar).scheduler(max_prefill_tokens=16)
    scheduler.submit(GenerationRequest(model.encode_prompt("a"), ("text",), max_new_tokens=90))
    scheduler.step()
    number = scheduler.submit(GenerationRequest(prompt, ("text",), max_new_tokens=9, prefixes=prefixes))
    scheduler.cancel(number)
    assert len(prefixes) == 0
    number = scheduler.submit(GenerationRequest(prompt, ("text",), max_new_tokens=9, prefixes=prefixes))
    scheduler.step()
    scheduler.step()
    scheduler.cancel(number)
    assert prefixes.find(prompt)[1] == 32


def test_a_limit_of_no_tokens_is_an_error(model: AnyToken) -> None:
    with pytest.raises(RequestError, match=r"at least 1.*received 0"):
        model.engine.scheduler(max_prefill_tokens=0)
