"""Recorded decoding steps: with a stand-in for the recorder, which runs the work again, everything around it is tested.

On a GPU: the same hidden states as without graphs, and one wait for each step.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_loop import Recorder, asked
from torch import Tensor

import anytoken
from anytoken.inference.api import AnyToken
from anytoken.inference.batch import Batch
from anytoken.inference.cuda_graphs import Recorded, StepGraphs
from anytoken.inference.engine import Engine
from anytoken.inference.request import GenerationRequest
from anytoken.inference.sampling import Sampling

SEEDED = {"image": Sampling(temperature=1.0), "text": Sampling(temperature=1.0)}


def engines(model: AnyToken, record: Any) -> tuple[Engine, Engine]:
    """The plain engine, and one whose steps are recorded."""
    plain, graphed = (Engine(model.lm, model.processor.grammar) for _ in range(2))
    decoder = graphed.head().decoder
    assert decoder is not None
    decoder.graphs = StepGraphs(decoder, record)
    return plain, graphed


def replies(engine: Engine, prompts: list[list[int]], limit: int, **options: Any) -> list[list[int]]:
    found = engine.generate(asked(prompts, None, SEEDED, limit, seed=3, **options))
    return [one.ids for one in found]


def test_recorded_steps_give_the_same_ids(own_model: AnyToken) -> None:
    recorder = Recorder()
    plain, graphed = engines(own_model, recorder)
    prompts = [own_model.encode_prompt(text) for text in ("a", "red apple", "a b c")]
    for some in (prompts[:1], prompts[:2], prompts):
        assert replies(graphed, some, 40) == replies(plain, some, 40)
    assert recorder.replayed > 50 > recorder.recorded


def test_guidance_and_rows_that_leave_are_no_other(own_model: AnyToken) -> None:
    plain, graphed = engines(own_model, Recorder())
    prompts = [own_model.encode_prompt(text) for text in ("a", "red apple", "b", "c", "d")]
    guided = {"image": Sampling(temperature=1.0, cfg_scale=2.0)}
    null = own_model.processor.null_prompt()
    plans = [("image",), ("text",), ("image",), ("text", "image"), ("tone",)]
    found = [
        [one.ids for one in engine.generate(asked(prompts, plans, guided, 60, seed=1, null_prompt=null))]
        for engine in (plain, graphed)
    ]
    assert found[0] == found[1]


def test_numbers_of_rows_are_rounded_up_and_a_larger_storage_is_recorded_anew(own_model: AnyToken) -> None:
    recorder = Recorder()
    _, graphed = engines(own_model, recorder)
    decoder = graphed.head().decoder
    assert decoder is not None and decoder.graphs is not None
    with torch.inference_mode():
        batch = Batch(graphed.head())
        slots = [batch.add([1, 2, 3 + n]) for n in range(3)]
        for _ in range(3):
            batch.forward()
            for slot in slots:
                slot.ids.append(4)
        assert recorder.recorded == 1 and set(decoder.graphs._graphs) == {4}
        batch.cache.reserve(3, 2000)
        batch.forward()
    assert recorder.recorded == 2 and set(decoder.graphs._graphs) == {4}


def test_rows_that_fill_up_a_step_spoil_no_prompt_that_is_being_read(own_model: AnyToken) -> None:
    recorder = Recorder()
    plain, graphed = engines(own_model, recorder)
    prompts = [
        own_model.encode_prompt(text) for text in ("a", "red apple", "b", "c " * 50, "What is this? " * 12)
    ]
    requests = asked(prompts, None, SEEDED, 60, seed=3)
    scheduler, found = graphed.scheduler(max_prefill_tokens=4), [[] for _ in requests]
    for request in requests:  # three decode, so that a recorded step has four rows, while the others read
        scheduler.submit(request)
        for token in scheduler.step() + scheduler.step():
            found[token.row].append(token.id)
    assert scheduler._batch._known > len(scheduler._batch.decoded) > 2
    for token in scheduler.drain():
        found[token.row].append(token.id)
    assert found == [one.ids for one in plain.generate(requests)] and recorder.replayed > 10


def test_what_cannot_be_recorded_runs_as_it_is(own_model: AnyToken, caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def fails(work: Callable[[], Tensor]) -> Recorded:
        tried.append(work)
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, graphed = engines(own_model, fails)
    prompts = [own_model.encode_prompt("a")]
    with caplog.at_level(logging.WARNING, "anytoken"):
        assert replies(graphed, prompts, 30) == replies(plain, prompts, 30)
    assert len(tried) == 1 and "could not be recorded" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it has one")
def test_without_a_gpu_the_switch_says_that_it_has_no_effect(
    own_model: AnyToken, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "anytoken"):
        engine = Engine(own_model.lm, own_model.processor.grammar, cuda_graphs=True)
        assert engine.head().decoder is not None and engine.head().decoder.graphs is None
    assert "cuda_graphs has no effect: the model is on cpu" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 8])
@torch.inference_mode()
def test_on_a_gpu_graphs_compute_the_same(rows: int) -> None:
    """Within the rounding of bfloat16: attention over all columns of the storage adds up in another order."""
    model = anytoken.load("mini", "cuda")
    engine = Engine(model.lm, model.processor.grammar, cuda_graphs=True)
    decoder = engine.head().decoder
    assert decoder is not None and decoder.graphs is not None
    graphs, decoder.graphs = decoder.graphs, None
    batch = Batch(engine.head())
    slots = [batch.add(model.encode_prompt(f"a red apple, {n}")) for n in range(rows)]
    batch.forward()
    for token in (1, 2, 3, 4):
        positions = [len(slot.ids) for slot in batch.slots]
        for slot in slots:
            slot.ids.append(token)
        plain = batch.forward()
        found = graphs.step([token] * rows, positions, batch.cache)
        assert found is not None and not graphs.broken
        torch.testing.assert_close(found, plain, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_step_waits_once_for_a_gpu(monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool) -> None:
    """Where ids are read, and nowhere else."""
    model = anytoken.load("mini", "cuda")
    scheduler = Engine(model.lm, model.processor.grammar, cuda_graphs=cuda_graphs).scheduler()
    for n in range(4):
        prompt = model.encode_prompt(f"a red apple, {n}")
        scheduler.submit(GenerationRequest(prompt, ("image",), {"image": Sampling(temperature=1.0)}, seed=n))
    for _ in range(5):  # prompts are read, and graphs recorded
        scheduler.step()
    real, waits = scheduler._read, []

    def read(drawn: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        waits.append(len(drawn))
        try:
            return real(drawn)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(scheduler, "_read", read)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            scheduler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 10
