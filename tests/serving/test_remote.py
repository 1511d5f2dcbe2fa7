"""Tokens from an engine elsewhere: a stub of vLLM's completions, with the bundled model's weights behind it."""

import asyncio
import json
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from local_server import listening
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from transformers import LogitsProcessorList
from typer.testing import CliRunner

from anytoken.cli import app as command
from anytoken.inference.request import GenerationRequest
from anytoken.serving.app import create_app
from anytoken.serving.content import png
from anytoken.serving.remote import RemoteWorker, Stretch, open_remote
from anytoken.serving.settings import ServerSettings

CHAT = "/v1/chat/completions"


class Engine:
    """POST /v1/completions as vLLM answers it, greedily; `fault` makes it misbehave."""

    def __init__(self, lm):
        self.lm, self.requests, self.fault, self.dropped = lm, [], None, threading.Event()
        self.app = Starlette(routes=[Route("/v1/completions", self.complete, methods=["POST"])])

    async def complete(self, request):
        body = await request.json()
        self.requests.append((body, request.headers.get("authorization")))
        if self.fault == "status":
            return JSONResponse({"error": "secret"}, 500)
        return StreamingResponse(self.chunks(body), media_type="text/event-stream")

    async def chunks(self, body):
        if self.fault == "slow":
            try:
                await asyncio.sleep(30)
            finally:
                self.dropped.set()
        ids = await asyncio.to_thread(self.generate, body)
        if self.fault == "illegal":
            ids = [body["prompt"][0]]
        stopped = ids[-1] in body["stop_token_ids"]
        if self.fault == "no stop ids" and stopped:
            ids, stop = ids[:-1], ids[-1]
        else:
            stop = ids[-1] if stopped else None
        for start in range(0, len(ids), 7):
            yield self.line({"token_ids": ids[start : start + 7], "text": "", "finish_reason": None})
        yield self.line(
            {"token_ids": [], "finish_reason": "stop" if stopped else "length", "stop_reason": stop}
        )
        yield "data: [DONE]\n\n"

    @staticmethod
    def line(choice):
        return f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"

    @torch.inference_mode()
    def generate(self, body):
        assert body["stream"] and body["return_token_ids"] and body["ignore_eos"] and body["temperature"] == 0
        allowed = torch.tensor(body["allowed_token_ids"])

        def only(ids, scores):
            return torch.full_like(scores, -torch.inf).index_copy(1, allowed, scores[:, allowed])

        prompt = torch.tensor([body["prompt"]])
        made = self.lm.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=body["max_tokens"],
            do_sample=False, eos_token_id=body["stop_token_ids"] or None, pad_token_id=0,
            logits_processor=LogitsProcessorList([only]),
        )  # fmt: skip
        return made[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="module")
def remote():
    return open_remote("mini")


@pytest.fixture(scope="module")
def served(mini, remote):
    """Address of the server in front of the engine, the engine, and the worker between them."""
    engine = Engine(mini.lm)
    with listening(engine.app) as url:
        worker = RemoteWorker(remote, f"{url}/v1", "there", 4, 4, key="secret")
        with listening(create_app(remote, "mini", ServerSettings(deadline=60), worker)) as front:
            yield front, engine, worker


@pytest.fixture
def engine(served):
    yield served[1]
    served[1].fault = None
    served[1].requests.clear()


def ask(url, kinds, **options):
    message = {"role": "user", "content": "a fox, 3d"}
    body = {
        "model": "mini",
        "messages": [message],
        "modalities": kinds,
        "temperature": 0,
        "seed": 0,
        **options,
    }
    return httpx.post(url + CHAT, json=body, timeout=60)


def test_no_weights_are_loaded(remote):
    assert {parameter.device.type for parameter in remote.lm.parameters()} == {"meta"}
    assert all(one.cfg_scale == 1 for one in remote.sampling.values())


@pytest.mark.parametrize("fault", [None, "no stop ids"])
def test_replies_are_those_of_our_own_engine(mini, served, engine, fault):
    engine.fault = fault
    kinds = ["text", "image", "speech"]
    expected = mini.generate(
        "a fox, 3d", output=kinds, temperature=0, cfg_scale=1, seed=0, max_new_tokens=110
    )
    answer = ask(served[0], kinds, max_tokens=110).json()["choices"][0]
    parts = answer["message"]["segments"]
    assert [part["type"] for part in parts] == ["text", "image_url", "audio"]
    assert parts[0]["text"] == expected.text
    assert parts[1]["image_url"]["url"].endswith(png(expected.images[0]))
    assert answer["finish_reason"] == expected.finish_reason
    bodies = [body for body, _ in engine.requests]
    codes = [body for body in bodies if body["max_tokens"] == 64]
    assert len(codes) == 1 and not codes[0]["stop_token_ids"], "all codes of an image are one request"
    assert all(body["model"] == "there" for body in bodies) and len(bodies) < 12
    assert {header for _, header in engine.requests} == {"Bearer secret"}


def test_a_cascade_asks_the_engine_with_each_step_as_the_prompt(mini, served, engine):
    [image] = mini.generate("a fox, 3d", output="video", temperature=0, cfg_scale=1, seed=0).steps
    answer = ask(served[0], ["video"]).json()["choices"][0]
    assert [part["type"] for part in answer["message"]["segments"]] == ["video_url"]
    space, prompt = mini.token_space, engine.requests[-1][0]["prompt"]
    begin, end = prompt.index(space.open_token("image")), prompt.index(space.close_token("image")) + 1
    assert prompt[:begin] == [space.bos, space.user]
    [drawn] = mini.detokenize(prompt[begin:end])
    assert np.array_equal(drawn.pixels, image.pixels)


def test_other_endpoints_and_the_models_choice(served, engine):
    image = httpx.post(
        f"{served[0]}/v1/images/generations",
        json={"model": "mini", "prompt": "a fox", "temperature": 0},
        timeout=60,
    )
    assert image.status_code == 200 and image.json()["data"][0]["b64_json"]
    free = ask(served[0], None)
    assert free.status_code == 200 and free.json()["choices"][0]["message"]["segments"]


def test_what_an_engine_cannot_do_is_refused(served, engine):
    guided = ask(served[0], ["image"], cfg_scale=3)
    assert guided.status_code == 400 and "guidance" in guided.text
    body = {"model": "mini", "messages": [{"role": "user", "content": "a"}], "answers": ["b"]}
    scored = httpx.post(f"{served[0]}/v1/score", json=body, timeout=60)
    assert scored.status_code == 400 and "engine" in scored.text
    long = ask(served[0], ["image"], max_tokens=5)
    assert long.status_code == 400
    assert engine.requests == []


@pytest.mark.parametrize("fault", ["status", "illegal"])
def test_a_faulty_engine_is_an_error_without_its_details(served, engine, fault):
    engine.fault = fault
    answer = ask(served[0], ["image"])
    assert answer.status_code == 503 and "engine" in answer.text and "secret" not in answer.text
    engine.fault = None
    assert ask(served[0], ["text"]).status_code == 200


def test_a_client_that_goes_away_stops_the_engine(served, engine):
    engine.fault = "slow"
    message = {"model": "mini", "messages": [{"role": "user", "content": "a fox"}], "modalities": ["image"]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served[0] + CHAT, json=message, timeout=0.5)
    assert engine.dropped.wait(10)
    until = time.monotonic() + 10
    while served[2].load != (0, 0):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_no_engine_at_all(remote):
    worker = RemoteWorker(remote, "http://127.0.0.1:9/v1", "there", 1, 0)
    with listening(create_app(remote, "mini", ServerSettings(), worker)) as url:
        answer = ask(url, ["image"])
        assert answer.status_code == 503 and "does not answer" in answer.text


def test_requests_ask_for_as_much_as_stays_allowed(remote):
    """The grammar's own walk, with any ids: stretches end where other ids become allowed, and the reply is legal."""
    random = np.random.default_rng(0)
    grammar = remote.processor.grammar
    for plan in (("text", "speech"), ("video",), None):
        request = GenerationRequest(remote.encode_prompt("a fox"), plan, max_new_tokens=300)
        stretch = Stretch(request, grammar, 2048)
        stretch.settle()
        while not stretch.finished:
            body = stretch.body()
            allowed, stops = body["allowed_token_ids"], set(body["stop_token_ids"])
            assert 1 <= body["max_tokens"] <= stretch.budget
            for _ in range(body["max_tokens"]):
                token = int(random.choice(allowed))
                stretch.append(token)
                if token in stops:
                    break
            stretch.settle()
        pieces = grammar.parse(stretch.ids[:-1])
        assert plan is None or tuple(piece.kind for piece in pieces) == plan


def test_adapters_are_the_engines(tmp_path):
    done = CliRunner().invoke(
        command, ["serve", "mini", "--engine", "http://127.0.0.1:9/v1", "--adapter", "a=b"]
    )
    assert done.exit_code == 2 and "adapters are the engine's" in done.stderr


def test_prompts_are_read_by_the_engine():
    words = ["serve", "mini", "--engine", "http://127.0.0.1:9/v1", "--set", "max_prefill_tokens=9"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2 and "leave out max_prefill_tokens" in " ".join(done.stderr.split())
