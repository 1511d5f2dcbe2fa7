"""A server that stays up: full queues, slow and vanished clients, failing steps, keys, sizes, SIGTERM."""

import asyncio
import json
import signal
import socket
import threading
import time

import httpx
import pytest
import websockets.sync.client as websocket

from anytoken.benchmarks.serve import running_server
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.scheduler import Scheduler
from anytoken.serving.service import Service
from anytoken.serving.settings import (
    ServerSettings,
    check_exposure,
    read_keys,
)
from anytoken.serving.worker import Worker
from anytoken.utils.errors import ConfigError

LONG = {
    "model": "mini",
    "messages": [{"role": "user", "content": "fox, voice slt"}],
    "modalities": ["video"] * 8,
}
SHORT = {
    "model": "mini",
    "messages": [{"role": "user", "content": "a fox"}],
    "modalities": ["image"],
    "seed": 0,
}
CHAT = "/v1/chat/completions"


def idle(app, seconds=10.0):
    """Wait until no request runs or waits."""
    until = time.monotonic() + seconds
    while app.state.service.worker.load != (0, 0):
        assert time.monotonic() < until, app.state.service.worker.load
        time.sleep(0.02)


def metric(url, name):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)]


def test_a_full_queue_refuses_and_loses_nothing(mini, start):
    with start(mini, max_rows=2, max_waiting=2) as (url, app):

        async def run():
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                return await asyncio.gather(
                    *(client.post(CHAT, json={**SHORT, "seed": n}) for n in range(12))
                )

        answers = asyncio.run(run())
        idle(app)
    codes = [one.status_code for one in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= 4
    assert all(one.headers["Retry-After"] for one in answers if one.status_code == 429)
    assert all(one.json()["choices"][0]["message"]["images"] for one in answers if one.status_code == 200)


def test_many_clients_get_what_one_gets(mini, server):
    with httpx.Client(base_url=server, timeout=120) as client:
        alone = [client.post(CHAT, json={**SHORT, "seed": n}).json() for n in range(6)]

    async def run():
        async with httpx.AsyncClient(base_url=server, timeout=120) as client:
            return await asyncio.gather(*(client.post(CHAT, json={**SHORT, "seed": n}) for n in range(6)))

    together = [one.json() for one in asyncio.run(run())]
    for a, b in zip(alone, together, strict=True):
        assert a["choices"][0]["message"]["images"] == b["choices"][0]["message"]["images"]


def test_a_short_reply_waits_for_no_segment_of_a_long_one(mini, start):
    """A text and a score come while the first of eight videos is being made."""
    short = {**SHORT, "modalities": ["text"], "max_tokens": 4}
    score = {"model": "mini", "messages": short["messages"], "answers": ["fox", "owl"]}
    videos = []
    with start(mini) as (url, app):

        def watch():
            with httpx.stream(
                "POST", url + CHAT, json={**LONG, "stream": True, "seed": 0}, timeout=120
            ) as answer:
                videos.extend(line for line in answer.iter_lines() if "segments" in line)

        thread = threading.Thread(target=watch)
        thread.start()
        while app.state.service.worker.load != (1, 0):
            time.sleep(0.005)
        assert httpx.post(url + CHAT, json=short, timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/score", json=score, timeout=60).status_code == 200
        assert len(videos) <= 1 and app.state.service.worker.load == (1, 0)
        thread.join(120)
    assert len(videos) == 8


def test_a_long_prompt_is_read_in_pieces_while_a_reply_streams(mini, start, monkeypatch):
    """Between any two tokens of the running reply the model is fed at most one piece of the other's prompt."""
    gaps, original = [0], ModelRunner.features

    def features(self, ids, *rest):
        gaps[-1] += sum(map(len, ids))
        return original(self, ids, *rest)

    hand_out = Worker._hand_out

    def delivered(self, job, token):
        if len(job.request.prompt) < 100:
            gaps.append(0)
        hand_out(self, job, token)

    monkeypatch.setattr(ModelRunner, "features", features)
    monkeypatch.setattr(Worker, "_hand_out", delivered)
    long = {**SHORT, "messages": [{"role": "user", "content": "a fox and an owl, " * 60}]}
    with start(mini, max_prefill_tokens=32) as (url, app):
        with httpx.stream(
            "POST", url + CHAT, json={**LONG, "stream": True, "seed": 0}, timeout=120
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            while app.state.service.worker.load != (1, 0):
                time.sleep(0.005)
            alone = httpx.post(url + CHAT, json=long, timeout=60)
        idle(app)
        assert alone.status_code == 200 and max(gaps) <= 32 + 8
        assert (
            alone.json()["usage"]["prompt_tokens"] > 10 * 32 and len([gap for gap in gaps if gap > 16]) > 10
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(mini, start, stream):
    with start(mini, max_rows=1, max_waiting=0) as (url, app):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
            if stream:
                with client.stream("POST", url + CHAT, json={**LONG, "stream": True}) as answer:
                    next(answer.iter_lines())
                    raise httpx.ReadTimeout("gone")
            client.post(url + CHAT, json=LONG)
        idle(app)
        assert httpx.post(url + CHAT, json=SHORT, timeout=60).status_code == 200


def test_a_failing_step_ends_only_the_request_that_causes_it(mini, start, monkeypatch):
    """Any step with the poisoned prompt in its batch fails; its neighbours get what they get alone."""
    poisoned = mini.encode_prompt("a poisoned fox")
    step = Scheduler.step

    def failing(self):
        if any(row.slot.ids[: len(poisoned)] == poisoned and len(row.ids) > 20 for row in self._rows):
            raise RuntimeError("secret detail")
        return step(self)

    expected = mini.generate("a fox", output="image", seed=0).images[0]
    monkeypatch.setattr(Scheduler, "step", failing)
    bad = {**SHORT, "messages": [{"role": "user", "content": "a poisoned fox"}]}
    with start(mini, max_rows=4) as (url, app):

        async def run():
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                return await asyncio.gather(*(client.post(CHAT, json=one) for one in (SHORT, bad, SHORT)))

        first, failed, second = asyncio.run(run())
        idle(app)
        assert httpx.post(url + CHAT, json=SHORT, timeout=60).status_code == 200
    assert failed.status_code == 500 and "secret" not in failed.text and failed.json()["error"]["message"]
    from anytoken.serving.content import png

    for one in (first, second):
        url_ = one.json()["choices"][0]["message"]["images"][0]["image_url"]["url"]
        assert url_.endswith(png(expected))


def test_a_request_has_a_deadline(mini, start):
    with start(mini, deadline=0.2) as (url, app):
        answer = httpx.post(url + CHAT, json=LONG, timeout=60)
        idle(app)
        with httpx.stream("POST", url + CHAT, json={**LONG, "stream": True}, timeout=60) as stream:
            lines = list(stream.iter_lines())
    assert answer.status_code == 504 and answer.json()["error"]["type"] == "timeout_error"
    assert "timeout_error" in lines[-2] and "[DONE]" not in "".join(lines)


def test_a_body_over_the_limit_is_refused(mini, start):
    with start(mini, max_body_bytes=2000) as (url, _):
        big = {**SHORT, "messages": [{"role": "user", "content": "x" * 4000}]}
        assert httpx.post(url + CHAT, json=big).status_code == 413

        def pieces():  # without a Content-Length
            yield b"{" + b" " * 3000
            yield b"}"

        headers = {"Content-Type": "application/json"}
        assert httpx.post(url + CHAT, content=pieces(), headers=headers).status_code == 413
        assert httpx.post(url + CHAT, json=SHORT, timeout=60).status_code == 200


def test_slow_clients_do_not_hold_up_others(mini, start):
    with start(mini, body_timeout=1) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        slow = [socket.create_connection((host, int(port))) for _ in range(20)]
        for number, one in enumerate(slow):
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
            )
            one.sendall((head + ("\r\n{" if number % 2 else "")).encode())
        assert httpx.post(url + CHAT, json=SHORT, timeout=60).status_code == 200
        slow[1].settimeout(10)
        assert b" 408 " in slow[1].recv(4096).split(b"\r\n")[0]
        for one in slow:
            one.close()


def test_headers_have_to_arrive_in_time():
    """Clients that never end their headers lose the connection, also on one that served a request; others keep it."""
    with running_server("mini", "--set", "body_timeout=1") as (url, _):
        host, port = url.removeprefix("http://").split(":")
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"

        def connect():
            one = socket.create_connection((host, int(port)))
            one.settimeout(20)
            return one

        def served(one):
            one.sendall(request + b"\r\n")
            found = b""
            while b"ok" not in found.partition(b"\r\n\r\n")[2]:
                found += one.recv(4096)
            return found.startswith(b"HTTP/1.1 200")

        silent, dripping, second, steady = (connect() for _ in range(4))
        dripping.sendall(request)
        assert served(second) and served(steady)
        second.sendall(request)
        for _ in range(3):
            time.sleep(0.5)
            assert served(steady)
        assert all(one.recv(4096) == b"" for one in (silent, dripping, second))
        with websocket.connect(f"ws://{host}:{port}/v1/realtime") as line:
            line.recv()
            time.sleep(1.5)
            line.send("{}")
            assert "error" in line.recv()


def test_keys(mini, start):
    with start(mini, api_keys=("first", "second")) as (url, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/metrics").status_code == 401
        wrong = httpx.post(url + CHAT, json=SHORT, headers={"Authorization": "Bearer third"})
        assert wrong.status_code == 401 and wrong.json()["error"]["type"] == "authentication_error"
        assert wrong.headers["WWW-Authenticate"] == "Bearer"
        for key in ("first", "second"):
            assert (
                httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
            )
        assert httpx.get(f"{url}/healthz").status_code == httpx.get(f"{url}/readyz").status_code == 200


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYTOKEN_API_KEYS", "a,b")
    assert read_keys(None) == ("a", "b")
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys(file) == ("one", "two")
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_keys(file)
    assert "hidden" not in repr(ServerSettings(api_keys=("hidden",)))


def test_an_open_server_stays_on_this_machine():
    check_exposure("127.0.0.1", (), False)
    check_exposure("0.0.0.0", ("key",), False)
    check_exposure("0.0.0.0", (), True)
    with pytest.raises(ConfigError, match="without an API key"):
        check_exposure("0.0.0.0", (), False)


def test_cors_is_off_unless_configured(mini, start):
    origin = {"Origin": "https://page.example"}
    with start(mini) as (url, _):
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=origin).headers
    with start(mini, cors_origins=("https://page.example",)) as (url, _):
        answer = httpx.get(f"{url}/v1/models", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-stainless-lang"}
        assert httpx.options(url + CHAT, headers={**origin, **asks}).status_code == 200
        stranger = {"Origin": "https://other.example", **asks}
        assert httpx.options(url + CHAT, headers=stranger).status_code == 400
    with start(mini, cors_origins=("https://page.example",), api_keys=("key",)) as (url, _):
        refused = httpx.get(f"{url}/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_a_page_can_read_an_error_that_nobody_foresaw(mini, start, monkeypatch):
    async def fails(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Service, "encode", fails)
    with start(mini, cors_origins=("https://page.example",)) as (url, _):
        answer = httpx.post(url + CHAT, json=SHORT, headers={"Origin": "https://page.example"})
        assert (
            'anytoken_requests_total{path="/v1/chat/completions",status="500"} 1.0'
            in httpx.get(f"{url}/metrics").text
        )
    assert answer.status_code == 500 and answer.json()["error"]["message"] and "secret" not in answer.text
    assert answer.headers["access-control-allow-origin"] == "https://page.example"


def test_metrics_count_requests_and_tokens(server):
    before = sum(metric(server, 'anytoken_tokens_total{direction="out",modality="image"}'))
    httpx.post(server + CHAT, json=SHORT, timeout=60)
    assert sum(metric(server, 'anytoken_tokens_total{direction="out",modality="image"}')) - before == 3 + 64
    assert httpx.get(f"{server}/nowhere").status_code == 404
    assert not [line for line in httpx.get(f"{server}/metrics").text.splitlines() if "nowhere" in line]


def test_sigterm_answers_what_runs_and_ends(tmp_path):
    with (tmp_path / "log").open("w+") as log:
        with running_server("mini", log=log, log_level="info") as (url, process):
            answers = []
            thread = threading.Thread(
                target=lambda: answers.append(httpx.post(url + CHAT, json=LONG, timeout=120))
            )
            thread.start()
            while sum(metric(url, "anytoken_running")) < 1:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            thread.join(120)
            assert process.wait(60) in (0, -signal.SIGTERM)
        assert answers[0].status_code == 200
        assert len(answers[0].json()["choices"][0]["message"]["segments"]) == 8
        log.seek(0)
        lines = [json.loads(line) for line in log.read().splitlines()]
    access = [line["message"] for line in lines if line["logger"] == "anytoken.serving.access"]
    assert any(line.startswith(f"POST {CHAT} 200") for line in access) and not any(
        "fox" in line for line in access
    )
