"""Limits of media in requests: a 400 in OpenAI's form that names the limit, before the medium has been decoded."""

import io

import httpx
import numpy as np
import openai
import pytest
import soundfile
from PIL import Image as Picture
from typer.testing import CliRunner

from anytoken.cli import app as commands
from anytoken.segments import Video
from anytoken.serving.app import create_app
from anytoken.serving.content import b64, read_part, saved
from anytoken.serving.errors import BadRequest
from anytoken.serving.settings import ServerSettings

SETTINGS = ServerSettings(max_pixels=10_000, max_seconds=2, max_frames=20)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Picture.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seconds: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(8_000 * seconds)), 8_000, format="WAV")
    return buffer.getvalue()


def film(frames: int, rate: float, side: int = 16) -> bytes:
    return saved(Video(np.zeros((frames, side, side, 3), np.uint8), rate), ".mp4")


def image(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(data)}"}}


def audio(data: bytes) -> dict:
    return {"type": "input_audio", "input_audio": {"data": b64(data), "format": "wav"}}


def video(data: bytes) -> dict:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{b64(data)}"}}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (image(png(101, 100)), "holds 10,100 pixels; at most 10,000 are taken by this server (max_pixels)."),
        (
            video(film(3, 4, 128)),
            "holds 16,384 pixels; at most 10,000 are taken by this server (max_pixels).",
        ),
        (audio(wav(2.5)), "holds 2.5 or more seconds; at most 2 are taken by this server (max_seconds)."),
        (video(film(10, 4)), "holds 2.5 seconds; at most 2 are taken by this server (max_seconds)."),
        (video(film(25, 25)), "holds 21 or more frames; at most 20 are taken by this server (max_frames)."),
    ],
)
def test_a_medium_over_a_limit_is_a_bad_request(part: dict, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_part(part, "messages[0].content[0]", SETTINGS)
    body = caught.value.body()["error"]
    assert body["message"] == f"messages[0].content[0] {said}"
    assert (caught.value.status, body["type"], body["code"]) == (
        400,
        "invalid_request_error",
        "media_too_large",
    )


def test_media_within_the_limits_are_read() -> None:
    for part in (image(png(100, 100)), audio(wav(2)), video(film(8, 4)), video(film(20, 25))):
        assert read_part(part, "here", SETTINGS)


def test_the_endpoints_answer_with_the_limit(mini, start) -> None:
    message = [{"role": "user", "content": [image(png(101, 100))]}]
    with start(mini, max_pixels=10_000, max_seconds=2) as (url, _):
        chat = httpx.post(f"{url}/v1/chat/completions", json={"model": "mini", "messages": message})
        heard = httpx.post(
            f"{url}/v1/audio/transcriptions", data={"model": "mini"}, files={"file": ("a.wav", wav(3))}
        )
    for answer, limit in ((chat, "max_pixels"), (heard, "max_seconds")):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert limit in error["message"] and error["code"] == "media_too_large"


def chat(client, part: dict, **limits: float):
    return client.chat.completions.create(
        model="mini", messages=[{"role": "user", "content": [part]}], modalities=["text"], max_tokens=4,
        extra_body={"media_limits": limits},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("part", "limits", "said"),
    [
        (
            image(png(101, 100)),
            {"max_pixels": 10_000},
            "10,100 pixels; at most 10,000 are taken by this request (media_limits.max_pixels), 25,000,000 by this "
            "server.",
        ),
        (
            audio(wav(2.5)),
            {"max_seconds": 2},
            "2.5 or more seconds; at most 2 are taken by this request (media_limits.max_seconds), 600 by this server.",
        ),
        (video(film(6, 4)), {"max_seconds": 1}, "1.5 seconds; at most 1 are taken by this request"),
        (video(film(6, 4)), {"max_frames": 5}, "6 or more frames; at most 5 are taken by this request"),
        ({"type": "dna", "dna": "ACGT"}, {"max_letters": 3}, "4 letters; at most 3 are taken by this request"),
        ({"type": "text", "text": "a fox"}, {"max_letters": 3}, "5 letters; at most 3 are taken by this request"),
        (image(png(9, 9)), {"max_bytes": 10}, "bytes; at most 10 are taken by this request"),
    ],
)  # fmt: skip
def test_a_request_sets_limits_of_its_own(client, part: dict, limits: dict, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, part, **limits)
    error = caught.value.body
    assert isinstance(error, dict) and said in error["message"]
    assert (error["param"], error["code"]) == ("messages[0].content[0]", "media_too_large")
    assert chat(client, part).choices[0].message.content is not None


def test_a_request_cannot_widen_a_limit(mini, start) -> None:
    with start(mini, max_seconds=2) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        chat(client, audio(wav(1)), max_seconds=2)
        for seconds, said in (
            (3, "max_seconds is at most 2, this server's limit; received 3."),
            (0, "greater"),
        ):
            with pytest.raises(openai.BadRequestError, match=said):
                chat(client, audio(wav(1)), max_seconds=seconds)
        with pytest.raises(openai.BadRequestError, match=r"Unknown parameter 'media_limits\.max_size'"):
            chat(client, audio(wav(1)), max_size=3)
        with pytest.raises(
            openai.BadRequestError, match=r"at most 2 are taken by this server \(max_seconds\)"
        ):
            chat(client, audio(wav(3)), max_seconds=2)


def test_limits_of_a_request_at_the_other_endpoints(client) -> None:
    """Also as the fields of a form, as the client sends them."""
    short, clip = {"media_limits": {"max_seconds": 0.5}}, wav(1)
    said = "1 or more seconds|0.5 or more seconds"
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.audio.transcriptions.create(model="mini", file=("a.wav", clip), extra_body=short)
    assert "this request (media_limits.max_seconds), 600 by this server" in str(caught.value)
    long = {"media_limits": {"max_seconds": 601}}
    with pytest.raises(openai.BadRequestError, match="at most 600, this server's limit; received 601"):
        client.audio.transcriptions.create(model="mini", file=("a.wav", clip), extra_body=long)
    inputs: list = [[audio(clip)]]
    with pytest.raises(openai.BadRequestError, match=said):
        client.embeddings.create(model="mini", input=inputs, extra_body=short)
    message = [{"role": "user", "content": [audio(clip)]}]
    body = {"model": "mini", "messages": message, "answers": ["a fox"], **short}
    with pytest.raises(openai.BadRequestError, match=said):
        client.post("/score", body=body, cast_to=object)
    body = {"model": "mini", "messages": "a fox", "answers": [[audio(clip)]], **short}
    body["messages"] = [{"role": "user", "content": "a fox"}]
    with pytest.raises(openai.BadRequestError, match=said):
        client.post("/score", body=body, cast_to=object)


def test_the_document_has_the_limits(mini) -> None:
    schemas = create_app(mini, "mini").openapi()["components"]["schemas"]
    assert set(schemas["RequestMediaLimits"]["properties"]) == {
        "max_bytes", "max_pixels", "max_frames", "max_seconds", "max_letters",
    }  # fmt: skip
    for name in ("ChatBody", "ScoreBody", "EmbeddingsBody"):
        assert "RequestMediaLimits" in str(schemas[name]["properties"]["media_limits"])
    (form,) = [one for name, one in schemas.items() if "transcriptions" in name]
    assert "media_limits[max_seconds]" in form["properties"]


def test_the_command_sets_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("anytoken.serving.server.run", lambda *given: started.append(given[2]))
    monkeypatch.setattr("anytoken.commands.serving.load", lambda *given: None)
    words = ["serve", "mini", "--max-pixels", "5000", "--max-seconds", "1.5", "--set", "max_frames=7"]
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 0, done.output
    (settings,) = started
    limits = settings.media_limits
    assert (limits.max_pixels, limits.max_seconds, limits.max_frames) == (5_000, 1.5, 7)
    assert limits.max_bytes == settings.max_body_bytes
    assert CliRunner().invoke(commands, ["serve", "mini", "--max-seconds", "-1"]).exit_code == 2
