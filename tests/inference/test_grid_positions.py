"""Grid positions wherever a key-value cache is: every way of decoding and scoring gives what a plain forward gives."""

from itertools import count
from typing import Any

import pytest
import torch
from reference_loop import Recorder, asked, reference

from anytoken.inference import batch as batch_module
from anytoken.inference import best_answers as best_module
from anytoken.inference.api import AnyToken
from anytoken.inference.cuda_graphs import StepGraphs
from anytoken.inference.engine import Engine
from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.sampling import Sampling
from anytoken.segments import Segment

GREEDY = {
    "image": Sampling(temperature=0.0),
    "text": Sampling(temperature=0.0),
    "tone": Sampling(temperature=0.0),
}
PLANS = [("image",), ("tone", "image"), ("text", "image"), ("image", "tone")]


@pytest.fixture(scope="module")
def grid(toys: Any) -> AnyToken:
    """A random model whose grid positions matter."""
    model = toys.make_model(grid_positions={"row": 8, "column": 8, "step": 8, "codebook": 4})
    torch.manual_seed(1)
    with torch.no_grad():
        for table in model.lm.model.grid_positions.tables.values():
            table.weight[1:] = torch.randn_like(table.weight[1:])
    return model


@pytest.fixture(scope="module")
def prompts(grid: AnyToken, toys: Any) -> list[list[int]]:
    image = grid.generate("red", "image", seed=0, sizes={"image": (2, 3)}).images[0]
    some: list[Any] = [
        "red apple",
        [image, "What is this?"],
        [toys.Tone([(1, 2), (3, 4)]), "a"],
        [image, image],
    ]
    return [grid.encode_prompt(one) for one in some]


@pytest.fixture(scope="module")
def expected(grid: AnyToken, prompts: list[list[int]]) -> list[list[int]]:
    """What a plain loop replies."""
    grammar = grid.processor.grammar
    return [
        reference(grid.lm, grammar, prompt, plan, 60) for prompt, plan in zip(prompts, PLANS, strict=True)
    ]


def engine_of(model: AnyToken, decoder: str) -> Engine:
    """An engine that decodes in this way."""
    engine = Engine(model.lm, model.processor.grammar)
    head = engine.head()
    assert head.decoder is not None
    if decoder == "graphs":
        head.decoder.graphs = StepGraphs(head.decoder, Recorder())
    elif decoder == "own forward":
        head.decoder = None
    return engine


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("decoder", ["flat", "graphs", "own forward"])
def test_the_engine_decodes_what_a_plain_loop_decodes(
    grid: AnyToken, prompts: list[list[int]], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    decoder: str, chunk: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(batch_module, "CHUNK", chunk)
    engine, prefixes = engine_of(grid, decoder), PrefixCache(4)
    for options in ({}, {"prefixes": prefixes}, {"prefixes": prefixes}):  # at last, prompts are in the cache
        found = engine.generate(asked(prompts, PLANS, GREEDY, 60, **options))
        assert [one.ids for one in found] == expected


@pytest.mark.parametrize("limit", [1, 5])
@pytest.mark.parametrize("decoder", ["flat", "graphs", "own forward"])
def test_prompts_that_are_read_in_pieces_get_the_same_replies(
    grid: AnyToken, prompts: list[list[int]], expected: list[list[int]], decoder: str, limit: int
) -> None:
    """Pieces end within an image; one prompt comes twice, and is read once."""
    scheduler = engine_of(grid, decoder).scheduler(max_prefill_tokens=limit)
    jobs, found, reading = [2, 1, 1, 3, 0], dict[int, list[int]](), 0
    requests = asked(prompts, PLANS, GREEDY, 60)
    waiting, numbers = list(jobs), []
    for step in count():
        if waiting and step % 5 == 0:
            numbers.append(scheduler.submit(requests[waiting.pop(0)]))
        if not len(scheduler):
            break
        for token in scheduler.step():
            found.setdefault(token.row, []).append(token.id)
        reading += len(scheduler._batch.slots) > len(scheduler._batch.decoded) > 0
    assert [found[number] for number in numbers] == [expected[job] for job in jobs]
    assert reading > len(prompts[1]) // limit, "a prompt was read while others were decoded"


def test_positions_have_a_say_in_what_is_decoded(grid: AnyToken, prompts: list[list[int]], toys: Any) -> None:
    plain = toys.make_model()
    weights = {name: one for name, one in grid.lm.state_dict().items() if "grid_positions" not in name}
    plain.lm.load_state_dict(weights)
    models = (grid, plain)
    ids = [one.engine.generate(asked(prompts, PLANS, GREEDY, 60))[0].ids for one in models]
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}]
)
def test_generate_of_transformers(grid: AnyToken, settings: dict[str, Any]) -> None:
    prompts = ["red apple", "a"]
    inputs = grid.lm_inputs(prompts, output="image", batch=True)
    found = grid.lm.generate(**inputs, do_sample=False, **settings)[:, inputs["input_ids"].shape[1] :]
    for prompt, row in zip(prompts, found.tolist(), strict=True):
        ids = row[: row.index(grid.token_space.end) + 1]
        if settings.get("num_beams"):
            likelihood = grid.score_details(prompt, grid.detokenize(ids))
            assert likelihood
        else:
            greedy = {"image": Sampling(temperature=0.0)}
            assert ids == grid.generate(prompt, "image", sampling=greedy).ids


@pytest.mark.parametrize("part", [1, 512])
def test_scores_equal_a_plain_forward(
    grid: AnyToken, toys: Any, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr("anytoken.inference.score.PART", part)
    images: list[Segment] = [
        grid.generate(name, "image", seed=seed).images[0] for seed, name in enumerate("ab")
    ]
    answers: list[Any] = [*images, ["red", images[0]], ["red", images[1]], toys.Tone([(1, 2), (3, 4)]), "red"]
    prompt = [images[0], "What is this?"]
    start = grid.encode_prompt(prompt)
    grammar = grid.processor.grammar
    scores = grid.score_details(prompt, answers)
    for answer, score in zip(answers, scores, strict=True):
        ids = grid.processor.encode_reply(answer)
        logits = grid.lm(input_ids=torch.tensor([[*start, *ids]])).logits[0, len(start) - 1 : -1]
        allowed = torch.stack(
            [grammar.mask(grammar.class_ranges[n]) for n in grammar.loss_rows(torch.tensor(ids)).tolist()]
        )
        expected = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        found = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(score.logprobs), found.detach(), rtol=0, atol=1e-4)
    monkeypatch.setattr(best_module, "MOST_STEPS", 10_000)
    best = grid.rerank(prompt, answers, "none", top=len(answers))
    assert [value for _, value in best] == pytest.approx(
        sorted((one.total for one in scores), reverse=True), abs=1e-3
    )


@pytest.mark.slow
def test_the_compiled_step_is_the_same(grid: AnyToken, prompts: list[list[int]]) -> None:
    engines = [Engine(grid.lm, grid.processor.grammar, compiled) for compiled in (False, True)]
    plain, compiled = (engine.generate(asked(prompts, PLANS, GREEDY, 60)) for engine in engines)
    assert [one.ids for one in plain] == [one.ids for one in compiled]
