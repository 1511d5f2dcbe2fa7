"""Speak and be answered, over a real WebSocket: with OpenAI's client, and event by event."""

import asyncio
import base64
import contextlib
import json
import time

import numpy as np
import openai
import pytest
import websockets

from anytoken import Image, Speech, recipes
from anytoken.serving.content import pcm16
from anytoken.serving.errors import BadRequest
from anytoken.serving.middleware import Metrics
from anytoken.serving.realtime_api import RealtimeSession
from anytoken.serving.realtime_settings import RealtimeSettings
from anytoken.serving.service import Service
from anytoken.serving.settings import ServerSettings
from anytoken.serving.voice_activity import VoiceActivity, VoiceSettings

RATE = 24_000
BETA = {"OpenAI-Beta": "realtime=v1"}


@pytest.fixture(scope="module")
def clip():
    return Speech.open(next((recipes.assets() / "audio").rglob("*.flac"))).resample(RATE)


def pieces(samples, count=5):
    return [base64.b64encode(pcm16(one)).decode() for one in np.array_split(samples, count)]


def socket_url(url, model="mini"):
    return f"ws{url.removeprefix('http')}/v1/realtime?model={model}"


class Line:
    """A connection: sends events, and reads them up to one of a type."""

    def __init__(self, socket):
        self.socket, self.seen = socket, []

    async def send(self, kind, **fields):
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def until(self, kind):
        while True:
            event = json.loads(await asyncio.wait_for(self.socket.recv(), 300))
            self.seen.append(event)
            if event["type"] == kind:
                return event


@contextlib.asynccontextmanager
async def connected(url, **options):
    async with websockets.connect(socket_url(url), max_size=None, **options) as socket:
        line = Line(socket)
        await line.until("session.created")
        yield line


def test_openais_client_speaks_and_is_answered(mini, server, clip):
    """The speech that comes in pieces is the whole clip that `generate` makes."""

    async def run():
        client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="unused")
        async with client.realtime.connect(model="mini") as connection:
            await connection.session.update(
                session={
                    "type": "realtime",
                    "output_modalities": ["audio"],
                    "seed": 0,
                    "max_output_tokens": 50,
                }
            )
            for piece in pieces(clip.samples):
                await connection.input_audio_buffer.append(audio=piece)
            await connection.input_audio_buffer.commit()
            await connection.response.create()
            events = []
            async for event in connection:
                events.append(event)
                if event.type == "response.done":
                    return events

    events = asyncio.run(run())
    kinds = [event.type for event in events]
    assert kinds[:2] == ["session.created", "session.updated"] and "error" not in kinds
    audio = b"".join(
        base64.b64decode(one.delta) for one in events if one.type == "response.output_audio.delta"
    )
    heard = Speech(np.frombuffer(pcm16(clip.samples), "<i2").astype(np.float32) / 32768, RATE)
    expected = mini.generate(heard, output="speech", seed=0, max_new_tokens=50)
    assert audio == pcm16(expected.speech[0].resample(RATE).samples)
    done = events[-1].response
    assert done.status == {"stop": "completed", "length": "incomplete"}[expected.finish_reason]
    assert kinds.count("response.output_audio.delta") > 1 and done.output[0].content[0].type == "output_audio"
    assert done.usage.output_tokens == expected.usage.new_tokens


def test_a_conversation_remembers_and_events_of_the_beta(mini, server):
    async def run():
        async with connected(server, additional_headers=BETA) as line:
            await line.send("session.update", session={"modalities": ["text"], "seed": 0})
            for words in ("a fox, 3d", "and now?"):
                item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": words}]}
                await line.send("conversation.item.create", item=item)
                await line.send("response.create")
                await line.until("response.done")
            return line.seen

    seen = asyncio.run(run())
    chat = mini.chat()
    expected = [chat.send("a fox, 3d", "text", seed=0), chat.send("and now?", "text", seed=0)]
    done = [event["response"] for event in seen if event["type"] == "response.done"]
    assert [one["output"][0]["content"][0]["text"] for one in done] == [one.text for one in expected]
    assert [one["usage"]["input_tokens"] for one in done] == [one.usage.prompt_tokens for one in expected]
    kinds = {event["type"] for event in seen}
    assert {
        "response.text.delta",
        "conversation.item.created",
    } <= kinds and "response.output_text.delta" not in kinds


def test_an_image_is_shown_and_drawn(server):
    async def run():
        async with connected(server) as line:
            data = base64.b64encode((recipes.assets() / "images" / "sample.png").read_bytes()).decode()
            part = {"type": "input_image", "image_url": f"data:image/png;base64,{data}"}
            await line.send(
                "conversation.item.create", item={"type": "message", "role": "user", "content": [part]}
            )
            await line.send("response.create", response={"output_modalities": ["image"]})
            return await line.until("response.done")

    (part,) = asyncio.run(run())["response"]["output"][0]["content"]
    assert Image.open(base64.b64decode(part["image_url"]["url"].partition(",")[2])).width == 64


@pytest.mark.parametrize("by", ["cancel", "speaking"])
def test_an_interruption_stops_generation_within_200_ms(mini, start, by):
    """Of the time of this process, which is that of the server: it is the same on a machine that is busy otherwise."""
    loud = 0.3 * np.sin(np.arange(RATE // 5) / 10)

    async def run(url, app):
        worker = app.state.service.worker
        async with connected(url) as line:
            turns = {"type": "server_vad", "create_response": False}
            await line.send(
                "session.update", session={"turn_detection": turns, "output_modalities": ["video"] * 8}
            )
            await line.until("session.updated")
            took = []
            for _ in range(3):
                item = {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "a fox"}],
                }
                await line.send("conversation.item.create", item=item)
                await line.send("response.create")
                await line.until("response.content_part.added")
                assert worker.load == (1, 0)
                began = time.process_time()
                if by == "cancel":
                    await line.send("response.cancel")
                else:
                    await line.send("input_audio_buffer.append", audio=pieces(loud, 1)[0])
                done = await line.until("response.done")
                while worker.load != (0, 0):
                    await asyncio.sleep(0.005)
                took.append(time.process_time() - began)
                assert done["response"]["status"] == "cancelled"
                await line.send("input_audio_buffer.append", audio=pieces(np.zeros(RATE), 1)[0])
                if by == "speaking":
                    await line.until("input_audio_buffer.committed")
            return took

    with start(mini, max_rows=2) as (url, app):
        assert min(asyncio.run(run(url, app))) < 0.2


def test_a_response_may_follow_a_stopped_one_at_once(server):
    async def run():
        async with connected(server) as line:
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a fox"}]}
            await line.send("conversation.item.create", item=item)
            await line.send("response.create", response={"output_modalities": ["video"] * 8})
            await line.until("response.content_part.added")
            await line.send("response.cancel")
            await line.send("response.create", response={"output_modalities": ["text"]})
            done = [await line.until("response.done") for _ in range(2)]
            return [one["response"]["status"] for one in done], line.seen

    states, seen = asyncio.run(run())
    assert states == ["cancelled", "completed"] and not [one for one in seen if one["type"] == "error"]


def test_what_is_said_while_a_reply_is_spoken_is_the_next_turn(server, clip):
    """Without interruption the reply goes on, and the answer to what was said comes after it."""
    quiet = np.zeros(RATE, dtype=np.float32)

    async def run():
        async with connected(server) as line:
            turns = {"type": "server_vad", "threshold": 0.2, "interrupt_response": False}
            settings = {"turn_detection": turns, "output_modalities": ["video"] * 3, "seed": 0}
            await line.send("session.update", session=settings)
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a fox"}]}
            await line.send("conversation.item.create", item=item)
            await line.send("response.create")
            await line.until("response.content_part.added")
            for piece in pieces(np.concatenate([clip.samples, quiet]), 8):
                await line.send("input_audio_buffer.append", audio=piece)
            return [(await line.until("response.done"))["response"] for _ in range(2)], line.seen

    (first, second), seen = asyncio.run(run())
    kinds = [one["type"] for one in seen]
    assert first["status"] == second["status"] == "completed" and "error" not in kinds
    assert kinds.index("input_audio_buffer.committed") < kinds.index("response.done"), "heard while it spoke"
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


def test_turns_are_taken_by_listening(server, clip):
    """With server_vad a client sends sound and nothing else."""
    quiet = np.zeros(RATE, dtype=np.float32)

    async def run():
        async with connected(server) as line:
            await line.send(
                "session.update", session={"turn_detection": {"type": "server_vad", "threshold": 0.2}}
            )
            await line.until("session.updated")
            for piece in pieces(np.concatenate([quiet, clip.samples, quiet]), 20):
                await line.send("input_audio_buffer.append", audio=piece)
            await line.until("response.done")
            return line.seen

    seen = asyncio.run(run())
    kinds = [event["type"] for event in seen]
    order = [
        "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "input_audio_buffer.committed",
        "response.created", "response.output_audio.delta", "response.done",
    ]  # fmt: skip
    places = [kinds.index(one) for one in order]
    assert places == sorted(places) and "error" not in kinds
    started = next(event for event in seen if event["type"] == order[0])
    assert 600 <= started["audio_start_ms"] <= 1000


def create_item(part):
    item = {"type": "message", "role": "user", "content": [part]}
    return json.dumps({"type": "conversation.item.create", "item": item})


def update_vad(**fields):
    turns = {"type": "server_vad", **fields}
    return json.dumps({"type": "session.update", "session": {"turn_detection": turns}})


def test_mistakes_are_error_events_and_the_session_goes_on(server):
    bad = [
        ("not json", "JSON object"),
        ("[1]", "JSON object"),
        (b"\x00\x01", "JSON object"),
        ('{"type": []}', "no event []"),
        ('{"type": "bogus", "event_id": "mine"}', "no event"),
        ('{"type": "session.update"}', "session is an object"),
        ('{"type": "session.update", "session": {"bogus": 1}}', "Unknown parameter"),
        ('{"type": "session.update", "session": {"tools": [{}]}}', "not supported"),
        ('{"type": "session.update", "session": {"output_modalities": ["smell"]}}', "smell"),
        ('{"type": "session.update", "session": {"temperature": "hot"}}', "wrong type"),
        ('{"type": "session.update", "session": {"audio": {"input": {"format": "g711"}}}}', "16-bit PCM"),
        (
            json.dumps({"type": "session.update", "session": {"output_modalities": ["text"] * 65}}),
            "more than 64 entries",
        ),
        ('{"type": "session.update", "session": {"audio": []}}', "audio is an object"),
        ('{"type": "session.update", "session": {"max_output_tokens": -1}}', "at least 1"),
        (f'{{"type": "session.update", "session": {{"instructions": "{"x" * 100_001}"}}}}', "at most 100000"),
        (update_vad(threshold=9), "threshold is from 0 to 1; received 9"),
        (create_item({"type": []}), "item.content[0] is an object such as"),
        (create_item("words"), "item.content[0] is an object such as"),
        (create_item({"type": "input_audio", "audio": "AAAA"}), "item.content[0].audio is 16-bit PCM"),
        ('{"type": "input_audio_buffer.append", "audio": "???"}', "base64"),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "even number"),
        ('{"type": "input_audio_buffer.commit"}', "at least 100 ms"),
        ('{"type": "conversation.item.create", "item": {"type": "function_call"}}', "item is"),
        ('{"type": "response.create"}', "Nothing has been said"),
        ('{"type": "response.cancel"}', "no response to cancel"),
    ]

    async def run():
        async with connected(server) as line:
            for text, says in bad:
                await line.socket.send(text)
                event = await line.until("error")
                assert says in event["error"]["message"], event
                assert "mine" not in str(text) or event["error"]["event_id"] == "mine"
            await line.send("input_audio_buffer.clear")
            await line.until("input_audio_buffer.cleared")

    asyncio.run(run())


def test_audio_has_the_length_of_other_media(mini, start):
    clip = base64.b64encode(bytes(2 * RATE)).decode()
    said = "holds 2 seconds; at most 1.5 are taken by this server (max_seconds)."

    async def run(url):
        async with connected(url) as line:
            await line.send("input_audio_buffer.append", audio=clip)
            await line.send("input_audio_buffer.append", audio=clip)
            assert (await line.until("error"))["error"]["message"] == f"The audio buffer {said}"
            await line.send("input_audio_buffer.commit")
            await line.until("input_audio_buffer.committed")
            part = {"type": "input_audio", "audio": base64.b64encode(bytes(4 * RATE)).decode()}
            await line.send(
                "conversation.item.create", item={"type": "message", "role": "user", "content": [part]}
            )
            error = (await line.until("error"))["error"]
            assert error["message"] == f"item.content[0] {said}" and error["code"] == "media_too_large"

    with start(mini, max_seconds=1.5) as (url, _):
        asyncio.run(run(url))


def test_keys_origins_and_unknown_models(mini, start):
    async def refused(url, **options):
        with pytest.raises(websockets.InvalidStatus) as failed:
            async with websockets.connect(socket_url(url), **options):
                pass
        assert failed.value.response.status_code == 403

    async def run(url):
        await refused(url)
        await refused(url, additional_headers={"Authorization": "Bearer other"})
        await refused(url, additional_headers={"Authorization": "Bearer key"}, origin="https://evil.example")
        async with connected(
            url, additional_headers={"Authorization": "Bearer key"}, origin="https://page.example"
        ):
            pass
        browser = ["realtime", "openai-insecure-api-key.key"]
        async with connected(url, subprotocols=browser, origin=url) as line:
            assert line.socket.subprotocol == "realtime"
        with pytest.raises(websockets.ConnectionClosed):
            async with websockets.connect(
                socket_url(url, "other"), additional_headers={"Authorization": "Bearer key"}
            ) as one:
                assert "no model 'other'" in await one.recv()
                await one.recv()

    with start(mini, api_keys=("key",), cors_origins=("https://page.example",)) as (url, _):
        asyncio.run(run(url))


def test_a_client_that_goes_away_frees_its_place(mini, start):
    async def run(url, app):
        async with connected(url) as line:
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a fox"}]}
            await line.send("conversation.item.create", item=item)
            await line.send("response.create", response={"output_modalities": ["video"] * 8})
            await line.until("response.content_part.added")
        for _ in range(500):
            if app.state.service.worker.load == (0, 0):
                return True
            await asyncio.sleep(0.02)

    with start(mini) as (url, app):
        assert asyncio.run(run(url, app))


def test_voice_activity_follows_loudness():
    settings = VoiceSettings(0.5, prefix_padding=0.1, silence=0.2)
    voice = VoiceActivity(1000, settings)
    quiet, loud = np.zeros(300, np.float32), np.full(300, 0.5, np.float32)
    assert voice.push(quiet) == [] and voice.start is None
    assert voice.push(loud[:7]) == [], "a frame is 20 samples here"
    assert voice.push(loud) == [("started", 200)] and voice.start == 200
    assert voice.push(quiet[:100]) == []
    assert [what for what, _ in voice.push(quiet)] == ["stopped"]
    assert VoiceActivity(1000, VoiceSettings(threshold=1.0)).push(loud * 0.05) == []


def test_settings_of_both_versions_mean_the_same():
    now = {"type": "realtime", "output_modalities": ["audio"], "max_output_tokens": 50,
           "audio": {"input": {"format": {"type": "audio/pcm", "rate": RATE}, "turn_detection": None}}}  # fmt: skip
    beta = {
        "modalities": ["audio"],
        "max_response_output_tokens": 50,
        "input_audio_format": "pcm16",
        "turn_detection": None,
    }
    assert RealtimeSettings(None).changed(now) == RealtimeSettings(None).changed(beta)
    shown = (
        RealtimeSettings()
        .changed({"turn_detection": {"type": "server_vad", "silence_duration_ms": 300}})
        .shown()
    )
    assert shown["audio"]["input"]["turn_detection"]["silence_duration_ms"] == 300
    with pytest.raises(BadRequest, match="from 0 to 60000"):
        RealtimeSettings().changed({"turn_detection": {"type": "server_vad", "silence_duration_ms": -1}})


@pytest.fixture
def session(mini):
    """A session without a connection, and the events that it sends."""
    service, sent = Service(mini, "mini", ServerSettings(), Metrics()), []

    async def send(text):
        sent.append(json.loads(text))

    return RealtimeSession(service, "mini", False, send), sent


def say(words):
    return create_item({"type": "input_text", "text": words})


def test_a_failure_that_nobody_foresaw_ends_no_session(session, monkeypatch):
    session, sent = session
    monkeypatch.setattr(session.service.model.processor, "encode_chat", lambda *given: 1 / 0)
    asyncio.run(session.take(say("a fox")))
    assert sent[-1]["error"]["type"] == "server_error" and "division" not in str(sent)


def test_a_reply_that_ends_while_a_message_is_read_is_not_lost(session, mini, monkeypatch):
    session, _ = session
    asyncio.run(session.take(say("a fox")))
    reply, encode = mini.generate("a fox", output="text", seed=0), mini.processor.encode_chat

    def slow(*given):
        session.remember(reply, session.chat.turns[0])
        return encode(*given)

    monkeypatch.setattr(mini.processor, "encode_chat", slow)
    asyncio.run(session.take(say("a cat")))
    assert [turn.role for turn in session.chat.turns] == ["user", "assistant", "user"]
    assert session.chat.turns[1].ids[1:] == reply.ids


def test_a_long_conversation_stays_small(session, mini):
    session, _ = session

    async def run():
        await session.take('{"type": "session.update", "session": {"instructions": "Be brief."}}')
        for number in range(60):
            await session.take(say(f"{number} " + "word " * 100))

    asyncio.run(run())
    turns, context = session.chat.turns, mini.engine.context
    assert turns[0].role == "system" and turns[1].role == "user"
    assert context <= sum(len(turn.ids) for turn in turns) <= 2 * context
    assert all(turn.content == [] for turn in turns[1:]), "media are read once and not kept"
