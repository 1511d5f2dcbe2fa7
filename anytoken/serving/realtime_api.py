"""Speak and be answered: OpenAI's Realtime API over a WebSocket, at /v1/realtime?model=NAME.

    client   session.update, input_audio_buffer.append | commit | clear, conversation.item.create, response.create,
             response.cancel
    server   session.created, input_audio_buffer.committed, response.created, response.output_audio.delta,
             response.output_text.delta, response.done, error, ...

Audio is 16-bit PCM at 24 kHz in base64, both ways; speech leaves piece by piece while it is generated. Clients that
send the header `OpenAI-Beta: realtime=v1` get the names events had then (response.audio.delta). A reply that is
interrupted is no part of the conversation: its message counts as unanswered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from anytoken.inference.chat import Chat, Turn
from anytoken.inference.outputs import GenerationOutput
from anytoken.inference.streaming import SegmentFinished, SegmentStarted
from anytoken.segments import Segment, Speech, Text
from anytoken.serving.chat_api import Deltas
from anytoken.serving.content import PCM_RATE_HZ, decoded, read_part, write_part
from anytoken.serving.errors import ApiError, BadRequest, NotFound
from anytoken.serving.realtime_settings import RealtimeSettings
from anytoken.serving.replies import PendingReply
from anytoken.serving.schemas import SEED_LIMIT, SamplingBody
from anytoken.serving.service import Service
from anytoken.serving.voice_activity import VoiceActivity

log = logging.getLogger(__name__)
router = APIRouter()
BETA = {  # names of the present API, and those of its beta
    "response.output_text": "response.text", "response.output_audio": "response.audio",
    "conversation.item.added": "conversation.item.created", "output_text": "text", "output_audio": "audio",
}  # fmt: skip
MIN_COMMIT_SECONDS = 0.1
SESSION_SECONDS = 3600  # as OpenAI's
PARTS = {"input_text": "text", "text": "text", "output_text": "text"}


@router.websocket("/v1/realtime")
async def realtime(socket: WebSocket, model: str = "") -> None:
    """One conversation; it ends with the connection, or after an hour."""
    service: Service = socket.app.state.service
    offered = socket.headers.get("sec-websocket-protocol", "").replace(" ", "").split(",")
    await socket.accept("realtime" if "realtime" in offered else None)
    beta = socket.headers.get("openai-beta", "") == "realtime=v1"
    session = RealtimeSession(service, model or service.name, beta, lambda event: socket.send_text(event))
    # The client has gone, perhaps while it was sent something.
    with suppress(WebSocketDisconnect, RuntimeError):
        try:
            async with asyncio.timeout(SESSION_SECONDS):
                await session.open()
                while True:
                    await session.take(await _received(socket))
        except (TimeoutError, NotFound) as error:
            await socket.close(1008, str(error)[:100] or "The session is over.")
        finally:
            await session.close()


class RealtimeSession:
    """What one connection holds: settings, audio that was not committed, the conversation, the running response."""

    def __init__(self, service: Service, name: str, beta: bool, send: Callable[[str], Any]) -> None:
        self.service, self.name, self.beta = service, name, beta
        self.id = f"sess_{uuid.uuid4().hex}"
        kinds = ("speech",) if "speech" in service.model.kinds else None
        self.settings = RealtimeSettings(kinds)
        self.chat: Chat = service.model.chat()
        self._send_text = send
        self._audio = bytearray()
        self._voice: VoiceActivity | None = None
        self._dropped = 0  # samples before the buffer's first
        self._response: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None  # begins a response once the running one has ended
        self._handlers: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": lambda event: self._commit(),
            "input_audio_buffer.clear": self._clear,
            "conversation.item.create": self._create_item,
            "conversation.item.truncate": self._truncate,
            "response.create": self._create_response,
            "response.cancel": self._cancel,
        }

    # ---- in and out ----

    async def open(self) -> None:
        """Greet the client; NotFound for a model that is not there."""
        try:
            self.service.check_model(self.name)
        except NotFound as error:
            await self.send("error", error=error.body()["error"])
            raise
        await self.send("session.created", session=self._session())

    async def take(self, text: str) -> None:
        """Do what one event says; a mistake is answered with an error event, and the session stays open."""
        event: Any = None
        try:
            event = _parsed(text)
            kind = event.get("type")
            if not isinstance(kind, str) or kind not in self._handlers:
                known = ", ".join(self._handlers)
                raise BadRequest(f"There is no event {kind!r:.60}; allowed: {known}.", "type")
            await self._handlers[kind](event)
        except WebSocketDisconnect:
            raise
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("An event failed")
                error = ApiError()
            given = event.get("event_id") if isinstance(event, dict) else None
            await self.send("error", error={**error.body()["error"], "event_id": given})

    async def send(self, kind: str, **fields: Any) -> None:
        """Send one event, in the names of the version that the client speaks."""
        if self.beta:
            stem, _, end = kind.rpartition(".")
            kind = f"{BETA[stem]}.{end}" if stem in BETA else BETA.get(kind, kind)
        await self._send_text(json.dumps({"type": kind, "event_id": f"event_{uuid.uuid4().hex}", **fields}))

    async def announce(self, item: Mapping[str, Any]) -> None:
        """Say that an item is part of the conversation."""
        await self.send("conversation.item.added", item=item, previous_item_id=None)
        if not self.beta:
            await self.send("conversation.item.done", item=item, previous_item_id=None)

    def remember(self, reply: GenerationOutput, after: Turn) -> None:
        """Put a reply after the message that it answers; more may have been said since."""
        turns = self.chat.turns
        place = next((number for number, turn in enumerate(turns, 1) if turn is after), len(turns))
        self.chat.turns = turns[:place]
        self.chat.remember(reply)
        self._keep([*self.chat.turns[:-1], replace(self.chat.turns[-1], content=[]), *turns[place:]])

    def _keep(self, turns: list[Turn]) -> None:
        """Make these the conversation, without turns so far outside of the context that they are never read."""
        most = 2 * self.service.model.engine.context
        begins = [place for place, turn in enumerate(turns) if place and turn.role == "user"]
        while begins and sum(len(turn.ids) for turn in turns) > most:
            head = turns[:1] if turns[0].role == "system" else []
            dropped = begins[0] - len(head)
            turns = [*head, *turns[begins[0] :]]
            begins = [place - dropped for place in begins[1:]]
        self.chat.turns = turns

    async def close(self) -> None:
        """Stop what runs."""
        if self._next is not None:
            self._next.cancel()
        if self._response is not None:
            self._response.cancel()
            await asyncio.wait([self._response])

    def _session(self) -> dict[str, Any]:
        return {"id": self.id, "model": self.name, **self.settings.shown()}

    # ---- events of the client ----

    async def _update(self, event: Mapping[str, Any]) -> None:
        settings = self.settings.changed(_object(event, "session"))
        self._check(settings)
        if settings.voice != self.settings.voice:
            self._voice = None if settings.voice is None else VoiceActivity(PCM_RATE_HZ, settings.voice)
            self._dropped = 0
            self._audio.clear()
        self.settings = settings
        said = [turn for turn in self.chat.turns if turn.role != "system"]
        system = self.service.model.chat(settings.instructions or None).turns
        self.chat.turns = [*system, *said]
        await self.send("session.updated", session=self._session())

    async def _append(self, event: Mapping[str, Any]) -> None:
        data = _pcm(event.get("audio"), "audio")
        size = len(self._audio) + len(data)
        self._check_length(size, "The audio buffer", "audio")
        if size > self.service.settings.max_body_bytes:
            raise BadRequest("The audio buffer is full: commit or clear it.", "audio")
        self._audio += data
        if self._voice is None:
            return
        for what, sample in self._voice.push(_samples(data)):
            await self._heard(what, sample)
        quiet = self._voice.start is None
        if quiet:  # only what may be the beginning of speech is kept
            self._forget(len(self._audio) // 2 - int(self._voice.settings.prefix_padding * PCM_RATE_HZ))

    def _check_length(self, size: int, what: str, param: str) -> None:
        """BadRequest for more bytes of 16-bit audio than one medium may have seconds."""
        seconds, most = size / (2 * PCM_RATE_HZ), self.service.settings.max_seconds
        if seconds > most:
            raise BadRequest(
                f"{what} holds {seconds:,.12g} seconds; at most {most:,.12g} are taken by this server (max_seconds).",
                param, "media_too_large",
            )  # fmt: skip

    def _forget(self, samples: int) -> None:
        """Drop the first samples of the buffer."""
        if samples > 0:
            del self._audio[: 2 * samples]
            self._dropped += samples

    async def _heard(self, what: str, sample: int) -> None:
        """Somebody began or ceased to speak."""
        place = round(1000 * sample / PCM_RATE_HZ)
        if what == "started":
            await self.send("input_audio_buffer.speech_started", audio_start_ms=place)
            self._forget(sample - self._dropped)
            if self.settings.interrupt:
                self._stop()
            return
        await self.send("input_audio_buffer.speech_stopped", audio_end_ms=place)
        await self._commit()
        if not self.settings.respond:
            return
        if self._response is None or self._response.done() or self._response.cancelling():
            await self._create_response({})
        else:
            self._next = asyncio.create_task(self._respond_after(self._response))

    async def _respond_after(self, running: asyncio.Task[None]) -> None:
        """Answer what was said while a response was running, once that has ended."""
        await asyncio.wait([running])
        if self._response is not running:  # another one answers it
            return
        try:
            await self._create_response({})
        except ApiError as error:
            await self.send("error", error=error.body()["error"])

    async def _commit(self) -> None:
        samples = _samples(self._audio)
        if len(samples) < MIN_COMMIT_SECONDS * PCM_RATE_HZ:
            raise BadRequest(
                f"The audio buffer holds {1000 * len(samples) / PCM_RATE_HZ:.0f} ms; send at least "
                f"{1000 * MIN_COMMIT_SECONDS:.0f} ms before you commit it.", code="input_audio_buffer_commit_empty",
            )  # fmt: skip
        self._forget(len(samples))
        item = await self._say(
            "user", [Speech(samples, PCM_RATE_HZ)], [{"type": "input_audio", "transcript": None}]
        )
        await self.send("input_audio_buffer.committed", item_id=item["id"], previous_item_id=None)
        await self.announce(item)

    async def _clear(self, event: Mapping[str, Any]) -> None:
        self._forget(len(self._audio) // 2)
        await self.send("input_audio_buffer.cleared")

    async def _create_item(self, event: Mapping[str, Any]) -> None:
        given = _object(event, "item")
        role, content = given.get("role"), given.get("content")
        if given.get("type") != "message" or role not in ("user", "system") or not isinstance(content, list):
            raise BadRequest(
                'item is {"type": "message", "role": "user" or "system", "content": [...]}.', "item"
            )
        segments = [await asyncio.to_thread(self._segment, part, n) for n, part in enumerate(content)]
        item = await self._say(role, segments, content, given.get("id"))
        await self.announce(item)

    def _segment(self, part: Any, number: int) -> Segment:
        where = f"item.content[{number}]"
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise BadRequest(f'{where} is an object such as {{"type": "input_text", "text": "..."}}.', where)
        kind = part["type"]
        if kind == "input_audio":
            data = _pcm(part.get("audio"), f"{where}.audio")
            self._check_length(len(data), where, where)
            return Speech(_samples(data), PCM_RATE_HZ)
        if kind == "input_image":
            part = {"type": "image_url", "image_url": part.get("image_url")}
        elif kind in PARTS:
            part = {**part, "type": "text"}
        return read_part(part, where, self.service.settings)

    async def _truncate(self, event: Mapping[str, Any]) -> None:
        """How much of an interrupted reply was played: replies are not cut here, so nothing changes."""
        fields = {key: event.get(key) for key in ("item_id", "content_index", "audio_end_ms")}
        await self.send("conversation.item.truncated", **fields)

    async def _say(
        self, role: str, segments: list[Segment], content: list[Any], given: Any = None
    ) -> dict[str, Any]:
        """Add a message to the conversation; BadRequest for one that the model cannot read."""
        said = self.service.model.chat()
        try:
            await asyncio.to_thread(said.say, [{"role": role, "content": segments}])
        except ValueError as error:
            raise BadRequest(str(error), "item") from error
        # the conversation may have got a reply meanwhile; media are not kept, as only ids are read
        self._keep([*self.chat.turns, *(replace(turn, content=[]) for turn in said.turns)])
        return _item(given if isinstance(given, str) else None, role, content, "completed")

    async def _cancel(self, event: Mapping[str, Any]) -> None:
        if not self._stop():
            raise BadRequest("There is no response to cancel.", code="response_cancel_not_active")

    def _stop(self) -> bool:
        """Stop the running response, if there is one; it says so itself."""
        running = self._response is not None and not self._response.done()
        if running and self._response is not None:
            self._response.cancel()
        return running

    # ---- responses ----

    async def _create_response(self, event: Mapping[str, Any]) -> None:
        if self._response is not None and self._response.cancelling():
            await asyncio.wait([self._response])  # it was stopped and is about to say so
        if self._response is not None and not self._response.done():
            raise BadRequest(
                "A response is being made already.", code="conversation_already_has_active_response"
            )
        settings = self.settings.changed(_object(event, "response") if event.get("response") else {})
        try:
            limits = {} if settings.max_tokens is None else {"max_new_tokens": settings.max_tokens}
            prompt = self.chat.prompt_ids(settings.kinds, **limits)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        kinds = None if settings.kinds is None else list(settings.kinds)
        [pending] = await self.service.submit(self._body(settings), prompt, kinds, limit=settings.max_tokens)
        self._response = asyncio.create_task(_Response(self, pending, self.chat.turns[-1]).run())
        await asyncio.sleep(0)  # it runs from here on, so that cancelling it is answered

    def _check(self, settings: RealtimeSettings) -> None:
        most = self.service.settings.max_text
        if len(settings.instructions) > most:
            raise BadRequest(
                f"instructions has {len(settings.instructions)} characters; at most {most} are taken.",
                "session.instructions",
            )
        try:
            self.service.model.request((), None if settings.kinds is None else list(settings.kinds))
            self._body(settings)
        except ValueError as error:
            raise BadRequest(str(error), "session") from error

    def _body(self, settings: RealtimeSettings) -> SamplingBody:
        seed = None if settings.seed is None else settings.seed % SEED_LIMIT
        return SamplingBody(model=self.name, temperature=settings.temperature, seed=seed)


class _Response:
    """One response as events, from response.created to response.done."""

    def __init__(self, session: RealtimeSession, pending: PendingReply, said: Turn) -> None:
        self.session, self.pending, self.said = session, pending, said
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"item_{uuid.uuid4().hex}"
        self.content: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Tell the client of everything; also when it is cancelled."""
        status, reply = "cancelled", None
        try:
            await self._send("response.created", response=self._shown("in_progress"))
            await self._send("response.output_item.added", item=self._item("in_progress"), output_index=0)
            deltas = Deltas()
            async for event in self.pending:
                if isinstance(event, SegmentStarted):
                    await self._begin(event.kind)
                elif (delta := await asyncio.to_thread(deltas.of, event)) is not None:
                    await self._delta(delta)
                if isinstance(event, SegmentFinished):
                    await self._finish(event.segment)
            reply = self.pending.reply
            assert reply is not None
            self.session.remember(reply, self.said)
            self.session.service.count(len(self.pending.job.request.prompt), reply)
            status = "completed" if reply.finish_reason == "stop" else "incomplete"
        except ApiError as error:
            status = "failed"
            await self.session.send("error", error=error.body()["error"])
        finally:
            self.session.service.worker.cancel(self.pending.job)
            with suppress(WebSocketDisconnect, RuntimeError):  # the client has gone
                await self._send("response.output_item.done", item=self._item(status), output_index=0)
                await self._send("response.done", response=self._shown(status, reply))

    async def _begin(self, kind: str) -> None:
        name = {"text": "output_text", "speech": "output_audio"}.get(kind, kind)
        self.content.append({"type": BETA.get(name, name) if self.session.beta else name})
        await self._send("response.content_part.added", part=self.content[-1], **self._place())

    async def _delta(self, delta: Mapping[str, Any]) -> None:
        if "content" in delta:
            await self._send("response.output_text.delta", delta=delta["content"], **self._place())
        elif "audio" in delta:
            await self._send("response.output_audio.delta", delta=delta["audio"]["data"], **self._place())

    async def _finish(self, segment: Segment) -> None:
        if isinstance(segment, Text):
            self.content[-1]["text"] = segment.text
            await self._send("response.output_text.done", text=segment.text, **self._place())
        elif isinstance(segment, Speech):
            self.content[-1]["transcript"] = ""
            await self._send("response.output_audio.done", **self._place())
        else:
            self.content[-1] = await asyncio.to_thread(write_part, segment)
        await self._send("response.content_part.done", part=self.content[-1], **self._place())

    async def _send(self, kind: str, **fields: Any) -> None:
        await self.session.send(kind, response_id=self.id, **fields)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item, "output_index": 0, "content_index": len(self.content) - 1}

    def _item(self, status: str) -> dict[str, Any]:
        return _item(
            self.item, "assistant", self.content, "completed" if status == "completed" else "incomplete"
        )

    def _shown(self, status: str, reply: GenerationOutput | None = None) -> dict[str, Any]:
        reason = {"cancelled": "client_cancelled", "incomplete": "max_output_tokens"}.get(status)
        found: dict[str, Any] = {
            "id": self.id, "object": "realtime.response", "status": status, "usage": None,
            "status_details": {"type": status, "reason": reason} if reason else None,
            "output": [] if status == "in_progress" else [self._item(status)],
        }  # fmt: skip
        if reply is not None:
            before, tokens = len(self.pending.job.request.prompt), reply.usage.tokens
            found["usage"] = {
                "input_tokens": before, "output_tokens": reply.usage.new_tokens,
                "total_tokens": before + reply.usage.new_tokens,
                "output_token_details": {"text_tokens": tokens.get("text", 0), "audio_tokens": tokens.get("speech", 0)},
            }  # fmt: skip
        return found


def _item(name: str | None, role: str, content: list[Any], status: str) -> dict[str, Any]:
    kept = [{key: value for key, value in part.items() if key != "audio"} for part in content]
    return {
        "id": name or f"item_{uuid.uuid4().hex}", "object": "realtime.item", "type": "message", "role": role,
        "status": status, "content": kept,
    }  # fmt: skip


async def _received(socket: WebSocket) -> str:
    """The next event's text; the text of a binary frame is empty, so that it is answered like other bad events."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message["code"], message.get("reason"))
    return message.get("text") or ""


def _parsed(text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError as error:
        raise BadRequest("An event is a JSON object.") from error
    if not isinstance(event, dict):
        raise BadRequest("An event is a JSON object.")
    return event


def _object(event: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = event.get(key)
    if not isinstance(value, Mapping):
        raise BadRequest(f"{key} is an object.", key)
    return value


def _pcm(audio: Any, where: str) -> bytes:
    data = decoded(audio, where)
    if len(data) % 2:
        raise BadRequest(f"{where} is 16-bit PCM: an even number of bytes.", where)
    return data


def _samples(data: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(bytes(data), dtype="<i2").astype(np.float32) / 32768
