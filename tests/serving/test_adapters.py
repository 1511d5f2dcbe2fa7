"""Adapters by name are never mixed and can be loaded while the server runs; scores are made in parts."""

import asyncio
import threading
import time
from itertools import pairwise

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model

import anytoken
from anytoken.serving.errors import TooManyRequests, Unavailable
from anytoken.serving.settings import (
    check_adapter_folder,
)
from anytoken.serving.worker import Job, Worker
from anytoken.utils.errors import ConfigError

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer key"}


def chat(model, seed=0):
    return {"model": model, "messages": [{"role": "user", "content": "a fox, 3d"}], "modalities": ["speech"],
            "seed": seed, "temperature": 1.0, "max_tokens": 60}  # fmt: skip


def made(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["audio"]["data"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two random adapters of the bundled model."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        wrapped = get_peft_model(
            anytoken.load("mini").lm, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        wrapped.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def model(adapters):
    """A model of its own: these tests change what is in its weights."""
    model = anytoken.load("mini")
    for name in ("one", "two"):
        model.load_adapter(adapters / name, name)
    return model


def test_interleaved_adapters_answer_as_each_alone(model, start):
    names = ["mini", "mini:one", "mini:two"]
    with start(model, max_rows=4) as (url, _):
        alone = {
            (name, seed): made(httpx.post(url + CHAT, json=chat(name, seed), timeout=120))
            for name in names
            for seed in range(2)
        }

        async def run():
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                wanted = [(name, seed) for seed in range(2) for name in names]
                answers = await asyncio.gather(*(client.post(CHAT, json=chat(*one)) for one in wanted))
                return dict(zip(wanted, map(made, answers), strict=True))

        together = asyncio.run(run())
        assert together == alone
        assert len({alone[name, 0] for name in names}) == 3, "the adapters change nothing"
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [(one["id"], one["parent"]) for one in listed] == [
            ("mini", None), ("mini:one", "mini"), ("mini:two", "mini"),
        ]  # fmt: skip
        unknown = httpx.post(url + CHAT, json=chat("mini:three"))
        assert unknown.status_code == 404 and "mini:two" in unknown.text
        assert httpx.post(f"{url}/v1/load_lora_adapter", json={}).status_code == 404, "not enabled"
    model.use_adapter(None)


def test_a_stream_of_requests_for_one_adapter_does_not_starve_another(model):
    """Jobs of the bare model never end to arrive; the one for an adapter is answered all the same."""
    worker = Worker(model, max_rows=2, max_waiting=50)
    worker.start()
    try:
        prompt = model.encode_prompt("a fox")
        other, stop = threading.Event(), time.monotonic() + 60

        def submit(adapter, done):
            def deliver(token):
                if getattr(token, "finish_reason", None):  # no error, as when the worker is stopped
                    done()

            asked = model.request(prompt, "text", seed=0, max_new_tokens=20)
            worker.submit([Job(asked, deliver, stop, adapter)])

        def again():
            if not other.is_set() and time.monotonic() < stop:
                submit(None, again)

        for _ in range(3):
            again()
        submit("one", other.set)
        assert other.wait(50)
    finally:
        worker.stop()
        model.use_adapter(None)


def test_adapters_are_loaded_and_unloaded_while_it_runs(adapters, start):
    model = anytoken.load("mini")
    outside = adapters.parent
    with (
        start(model, api_keys=("key",), adapter_folder=adapters) as (url, _),
        httpx.Client(base_url=url, headers=KEY, timeout=120) as client,
    ):
        load = {"lora_name": "mine", "lora_path": "one"}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=load).status_code == 401
        assert client.post("/v1/load_lora_adapter", json=load).status_code == 200
        assert client.post("/v1/load_lora_adapter", json=load).status_code == 400, "the name is taken"
        assert made(client.post(CHAT, json=chat("mini:mine"))) != made(client.post(CHAT, json=chat("mini")))
        for path in ("..", "../..", str(outside), "nowhere", "one/adapter_config.json", "\0"):
            bad = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
            assert bad.status_code == 400 and "within" in bad.text
        (adapters / "empty").mkdir(exist_ok=True)
        bad = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "empty"})
        assert bad.status_code == 400 and "empty/adapter_config.json is missing" in bad.text
        assert str(adapters) not in bad.text, "where the server keeps its adapters is no client's business"
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 404
        assert client.post(CHAT, json=chat("mini:mine")).status_code == 404
    with pytest.raises(ConfigError, match="needs API keys"):
        check_adapter_folder(adapters, ())
    with pytest.raises(ConfigError, match="not a folder"):
        check_adapter_folder(adapters / "nowhere", ("key",))


def test_scores_come_in_parts_between_the_steps_of_others(mini):
    """A long scoring and a reply run side by side: tokens keep coming between its parts, and both are right."""
    worker = Worker(mini, max_rows=2, max_waiting=2)
    log = []
    prompt = mini.encode_prompt("a fox")
    asked = mini.request(prompt, "image", seed=0, max_new_tokens=100)
    replies = [mini.processor.encode_reply(f"{n} " + "a fox " * 40) for n in range(30)]

    def parts():
        steps = mini.score_steps(prompt, replies)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            log.append("part")
            yield

    async def run():
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def deliver(token):
            log.append("token")
            if token.finish_reason:
                loop.call_soon_threadsafe(ended.set_result, None)

        worker.submit([Job(asked, deliver, time.monotonic() + 60)])
        scores = await worker.work(parts())
        await ended
        return scores

    worker.start()
    try:
        scores = asyncio.run(run())
    finally:
        worker.stop()
    places = [n for n, one in enumerate(log) if one == "part"]
    last_token = len(log) - 1 - log[::-1].index("token")
    between = [b - a for a, b in pairwise(places) if b < last_token]
    assert len(between) >= 4 and min(between) > 1, "two parts ran without a decoding step between them"
    assert scores[0].total == pytest.approx(mini.score("a fox", ["0 " + "a fox " * 40])[0], abs=1e-3)


def test_work_that_is_cancelled_or_fails_or_comes_too_late(mini):
    worker = Worker(mini, max_rows=1, max_waiting=1)

    def endless():
        while True:
            time.sleep(0.01)
            yield

    def failing():
        raise ValueError("bad work")
        yield

    async def run():
        with pytest.raises(Unavailable):
            await worker.work(failing())
        worker.start()
        with pytest.raises(ValueError, match="bad work"):
            await worker.work(failing())
        tasks = [asyncio.ensure_future(worker.work(endless())) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(TooManyRequests):
            await worker.work(failing())
        tasks[0].cancel()
        await asyncio.sleep(0.1)
        assert worker.load == (1, 0)
        await asyncio.to_thread(worker.stop)
        with pytest.raises(Unavailable):
            await tasks[1]
        assert worker.load == (0, 0)

    asyncio.run(run())
