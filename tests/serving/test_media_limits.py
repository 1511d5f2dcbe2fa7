"""Limits of media in requests: a 400 in OpenAI's form that names the limit, before the medium has been decoded."""

import io

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image as Picture
from typer.testing import CliRunner

from anytoken.cli import app as commands
from anytoken.segments import Video
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
