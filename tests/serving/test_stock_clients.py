"""Requests of LiteLLM, Open WebUI and LibreChat, replayed: each gets what its client reads from the answer."""

import base64
import io
import json
from pathlib import Path

import httpx
import pytest
from PIL import Image as Picture

from anytoken import Speech, recipes
from anytoken.serving.content import b64

REQUESTS = json.loads(Path(__file__).with_name("client_requests.json").read_text())["requests"]


def recording():
    """A clip as a browser records it."""
    av = pytest.importorskip("av")
    clip, file = (
        Speech.open(next((recipes.assets() / "audio").rglob("*.flac"))).resample(48_000),
        io.BytesIO(),
    )
    with av.open(file, "w", "webm") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(clip.samples[None], "fltp", "mono")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


@pytest.fixture(scope="module")
def media():
    """What the placeholders stand for."""
    assets = recipes.assets()
    flac = next((assets / "audio").rglob("*.flac")).read_bytes()
    return {"$PNG": (assets / "images" / "sample.png").read_bytes(), "$FLAC": flac, "$WEBM": recording()}


def send(server, request, media):
    headers = {"Authorization": "Bearer none", **request.get("headers", {})}
    with httpx.Client(base_url=server, headers=headers, timeout=60) as client:
        if "file" in request:
            name, content, kind = request["file"]
            file = (name, media[content]) if kind is None else (name, media[content], kind)
            return client.post(request["path"], files={"file": file}, data=request["form"])
        if "json" not in request:
            return client.get(request["path"])
        body = json.dumps(request["json"])
        for name, data in media.items():
            body = body.replace(name, b64(data))
        return client.post(request["path"], content=body, headers={"Content-Type": "application/json"})


def read_stream(text):
    """Chunks of server-sent events, which end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def check_chat(body, answer):
    if not body.get("stream"):
        (choice,) = answer.json()["choices"]
        message = choice["message"]
        assert message["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
        assert (
            message["content"]
            or message.get("images")
            or Speech.open(base64.b64decode(message["audio"]["data"]))
        )
        return
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = read_stream(answer.text)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] > 0
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0]["role"] == "assistant" and any(
        one.get("content") or one.get("images") or one.get("audio") for one in deltas
    )


def check_image(body, answer):
    (image,) = answer.json()["data"]
    picture = Picture.open(io.BytesIO(base64.b64decode(image["b64_json"])))
    width, height = map(int, body.get("size", "64x64").split("x"))
    assert picture.size == (width, height) and len(picture.getcolors(width * height)) > 8


def check_embeddings(body, answer):
    vectors = [one["embedding"] for one in answer.json()["data"]]
    assert len(vectors) == len(body["input"]) and abs(sum(x * x for x in vectors[0]) - 1) < 1e-3


CHECKS = {
    "/v1/models": lambda body, answer: [one["id"] for one in answer.json()["data"]].index("mini"),
    "/v1/chat/completions": check_chat,
    "/v1/images/generations": check_image,
    "/v1/audio/speech": lambda body, answer: Speech.open(answer.content),
    "/v1/audio/transcriptions": lambda body, answer: answer.json()["text"].strip()[0],
    "/v1/embeddings": check_embeddings,
}


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: f"{one['client']} {one['path'][4:]}")
def test_requests_of_stock_clients_are_answered(server, media, request_):
    answer = send(server, request_, media)
    assert answer.status_code == 200, answer.text
    CHECKS[request_["path"]](request_.get("json", {}), answer)


def test_sizes_of_images(server):
    def ask(size):
        body = {"model": "mini", "prompt": "a fox, 3d", "size": size, "seed": 1}
        return httpx.post(f"{server}/v1/images/generations", json=body, timeout=60)

    wide = Picture.open(io.BytesIO(base64.b64decode(ask("256x128").json()["data"][0]["b64_json"])))
    assert wide.size == (256, 128)
    edges = [wide.getpixel((x, y)) for x in (0, 32, 63) for y in (0, 64, 127)]
    assert len(set(edges)) == 1, "beside a square image there is one color"
    for size in ("4096x64", "0x64"):
        answer = ask(size)
        assert answer.status_code == 400 and "2048" in answer.json()["error"]["message"]
