"""The official client, unmodified, for every endpoint: what it gets is what `generate` gives for the same seed."""

import base64
import io
from functools import partial

import httpx
import numpy as np
import openai
import pytest
from PIL import Image as Picture

from anytoken import Image, Speech, recipes
from anytoken.inference.streaming import SegmentDelta, SegmentFinished
from anytoken.serving.chat_api import Deltas
from anytoken.serving.content import audio_bytes, b64, saved

PNG = (recipes.assets() / "images" / "sample.png").read_bytes()


def data_url(data, kind="image/png"):
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{b64(data)}"}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def clip():
    path = next((recipes.assets() / "audio").rglob("*.flac"))
    return Speech.open(path)


def opened(part):
    return np.asarray(Picture.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))))


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "mini" and {"text", "image", "speech"} <= set(model.modalities)
    assert client.models.retrieve("mini").id == "mini"
    assert model.limits["max_seconds"] == 600 and "api_keys" not in model.limits


def test_text_about_an_image(client, mini):
    prompt = user(data_url(PNG), {"type": "text", "text": "What is this?"})
    answer = client.chat.completions.create(model="mini", messages=prompt, modalities=["text"], seed=3)
    expected = mini.generate([Image.open(PNG), "What is this?"], output="text", seed=3)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        expected.usage.prompt_tokens,
        expected.usage.new_tokens,
    )


def test_an_image_and_n_choices(client, mini):
    answer = client.chat.completions.create(
        model="mini", messages=user({"type": "text", "text": "a fox, 3d"}), modalities=["image"], seed=1, n=2
    )
    expected = mini.generate("a fox, 3d", output="image", seed=1, num_return=2)
    for choice, reply in zip(answer.choices, expected, strict=True):
        assert np.array_equal(opened(choice.message.images[0]), reply.images[0].pixels)
        assert choice.message.content is None
    assert answer.usage.completion_tokens_details.by_modality["image"] == 2 * (3 + 64)


def test_speech_in_a_message_and_back_as_history(client, clip):
    message = user(
        {"type": "input_audio", "input_audio": {"data": b64(saved(clip, ".wav")), "format": "wav"}}
    )
    answer = client.chat.completions.create(
        model="mini",
        messages=message,
        modalities=["text", "audio"],
        audio={"format": "wav", "voice": "any"},
        seed=0,
    )
    spoken = answer.choices[0].message.audio
    assert Speech.open(base64.b64decode(spoken.data)).seconds > 0
    assert spoken.transcript == answer.choices[0].message.content
    drawn = client.chat.completions.create(
        model="mini", messages=user({"type": "text", "text": "a fox"}), modalities=["image"], seed=0
    )
    history = [*user({"type": "text", "text": "a fox"}), drawn.choices[0].message.model_dump(), *message]
    follow = client.chat.completions.create(model="mini", messages=history, modalities=["text"], seed=0)
    assert follow.usage.prompt_tokens > answer.usage.prompt_tokens + 64


def test_video_and_dna_as_parts(client):
    clips = sorted((recipes.assets() / "videos").glob("*.webp"))
    part = {"type": "video_url", "video_url": {"url": f"data:image/webp;base64,{b64(clips[0].read_bytes())}"}}
    answer = client.chat.completions.create(model="mini", messages=user(part), modalities=["video"], seed=0)
    assert answer.choices[0].message.segments[0]["type"] == "video_url"
    answer = client.chat.completions.create(
        model="mini", messages=user({"type": "dna", "dna": "ATGAAACGT"}), modalities=["dna"], seed=0
    )
    assert set(answer.choices[0].message.segments[0]["dna"]) <= set("ACGT")


def test_a_stream_joins_to_the_whole_reply(client, mini):
    options = {"model": "mini", "messages": user({"type": "text", "text": "a fox"}), "seed": 5}
    chunks = list(
        client.chat.completions.create(
            **options, modalities=["text", "image"], stream=True, stream_options={"include_usage": True}
        )
    )
    expected = mini.generate("a fox", output=["text", "image"], seed=5)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    images = [one for c in chunks if c.choices for one in getattr(c.choices[0].delta, "images", None) or []]
    assert text == expected.text
    assert np.array_equal(opened(images[0]), expected.images[0].pixels)
    assert chunks[-1].usage.completion_tokens == expected.usage.new_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_streamed_speech_joins_to_the_clip_resampled_at_once(client, mini):
    chunks = client.chat.completions.create(
        model="mini",
        messages=user({"type": "text", "text": "fox, voice slt"}),
        modalities=["audio"],
        seed=0,
        stream=True,
    )
    pieces = [c.choices[0].delta.audio.data for c in chunks if getattr(c.choices[0].delta, "audio", None)]
    clip = mini.generate("fox, voice slt", output="speech", seed=0, best_of=1).speech[0]
    found = np.frombuffer(b"".join(map(base64.b64decode, pieces)), "<i2").astype(int)
    expected = np.frombuffer(audio_bytes(clip, "pcm16"), "<i2")
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 2


def test_pieces_of_audio_have_no_seams():
    """A tone in pieces of a fifth of a second, two clips in one reply."""
    tone = np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000).astype(np.float32)
    clip, deltas, sent = Speech(tone), Deltas(), b""
    for _ in range(2):
        events = [SegmentDelta("speech", partial(Speech, piece)) for piece in np.split(tone, 5)]
        for event in [*events, SegmentFinished(clip)]:
            delta = deltas.of(event)
            sent += base64.b64decode(delta["audio"]["data"]) if delta else b""
    assert (
        np.abs(
            np.frombuffer(sent, "<i2").astype(int)
            - np.tile(np.frombuffer(audio_bytes(clip, "pcm16"), "<i2"), 2)
        ).max()
        <= 1
    )


def test_stop_strings_end_the_text(client, mini):
    prompt = user(data_url(PNG), {"type": "text", "text": "What is this?"})
    whole = mini.generate([Image.open(PNG), "What is this?"], output="text", seed=3).text
    stop = whole[3:5]
    answer = client.chat.completions.create(
        model="mini", messages=prompt, modalities=["text"], seed=3, stop=[stop, "never"]
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    pieces = client.chat.completions.create(
        model="mini", messages=prompt, modalities=["text"], seed=3, stop=stop, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == whole[: whole.index(stop)]


def test_images_generations(client, mini):
    found = client.images.generate(
        model="mini", prompt="a fox, 3d", n=1, size="64x64", extra_body={"seed": 1}
    )
    expected = mini.generate("a fox, 3d", output="image", seed=1, best_of=1, sizes={"image": (8, 8)}).images[
        0
    ]
    assert np.array_equal(
        np.asarray(Picture.open(io.BytesIO(base64.b64decode(found.data[0].b64_json)))), expected.pixels
    )


@pytest.mark.parametrize("name", ["wav", "mp3", "flac"])
def test_audio_speech(client, name):
    data = client.audio.speech.create(model="mini", voice="slt", input="fox", response_format=name).read()
    assert Speech.open(data).seconds > 0.1


def test_audio_transcriptions(client, mini, clip):
    file = ("said.wav", saved(clip, ".wav"))
    found = client.audio.transcriptions.create(model="mini", file=file, temperature=0)
    assert found.text == mini.generate(Speech.open(file[1]), output="text", temperature=0).text
    assert client.audio.transcriptions.create(
        model="mini", file=file, temperature=0, response_format="text"
    ) == (found.text + "\n")
    for change, said in (
        ({"stream": True}, "stream is not supported"),
        ({"extra_body": {"steam": 1}}, "Unknown parameter 'steam'"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client.audio.transcriptions.create(model="mini", file=file, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "gpt-4o"}, "There is no model 'gpt-4o'"),
        ({"modalities": ["smell"]}, "smell"),
        ({"n": 99}, "n is at most 8"),
        ({"max_tokens": 10**6}, "at most 4096 tokens"),
        ({"frequency_penalty": 1.5}, "frequency_penalty is not supported"),
        ({"extra_body": {"stepz": 3}}, "Unknown parameter 'stepz'"),
        ({"messages": user({"type": "image_url", "image_url": {"url": "http://x/cat.png"}})}, "fetches nothing"),
        ({"messages": user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})}, "fetches nothing"),
        ({"messages": user({"type": "text", "path": "/etc/passwd"})}, "text is a string"),
        ({"messages": user(data_url(b"no image"))}, "content"),
        ({"messages": user(data_url(PNG[:200]))}, "content"),
        ({"messages": user({"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}})}, "valid base64"),
        ({"messages": user({"type": ["text"]})}, "has the type ['text']; allowed: text, image_url"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"messages": []}, "messages"),
        ({"temperature": 99}, "temperature"),
        ({"modalities": ["text"] * 65}, "modalities: List should have at most 64 items"),
        ({"stop": ["x"] * 17}, "stop: at most 16 strings of at most 256 characters"),
        ({"stop": "x" * 257}, "stop: at most 16 strings of at most 256 characters"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_clear_error(client, change, said):
    options = {
        "model": "mini",
        "messages": user({"type": "text", "text": "a fox"}),
        "modalities": ["text"],
        **change,
    }
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        client.chat.completions.create(**options)
    assert said in error.value.body["message"] and "Traceback" not in str(error.value.body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"model": "mini"', "The body is not valid JSON: Expecting ',' delimiter at character 16."),
        ("", "The body is not a JSON object"),
        ("[]", "The body is not a JSON object"),
        ('{"model": "mini"}', "messages: Field required"),
    ],
)
def test_bodies_that_are_no_request(server, body, said):
    answer = httpx.post(
        f"{server}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_one_token_is_enough_to_check_a_model(client):
    """What monitors and gateways ask for to see whether a model answers."""
    answer = client.chat.completions.create(
        model="mini", messages=user({"type": "text", "text": "hi"}), modalities=["text"], max_tokens=1
    )
    assert answer.choices[0].message.content and answer.usage.completion_tokens == 2


def test_the_document_describes_content_parts(server):
    """So that `/docs` shows them, and requests made up from the document have media."""
    schemas = httpx.get(f"{server}/openapi.json").json()["components"]["schemas"]
    [parts] = [one["items"] for one in schemas["Message"]["properties"]["content"]["anyOf"] if "items" in one]
    kinds = [one["properties"]["type"]["const"] for one in parts["anyOf"]]
    assert kinds == ["text", "image_url", "input_audio", "video_url", "dna"]
    answers = schemas["ScoreBody"]["properties"]["answers"]["items"]["anyOf"]
    assert parts in [one.get("items") for one in answers]
