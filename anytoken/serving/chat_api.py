"""Chat completions and scores.

A reply's text is `message.content`; images are `message.images`, the first clip `message.audio` as in OpenAI's API;
`message.segments` has all parts in order, of every kind. Without `modalities` the model decides what it answers with.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from anytoken.inference.outputs import GenerationOutput
from anytoken.inference.streaming import Event, SegmentDelta, SegmentFinished, TextDelta
from anytoken.segments import Image, Segment, Speech, Text
from anytoken.serving.content import (
    PCM_RATE_HZ,
    audio_bytes,
    b64,
    checked_limits,
    pcm16,
    read_messages,
    read_part,
    write_part,
)
from anytoken.serving.errors import FAILURES, ApiError, BadRequest
from anytoken.serving.replies import PendingReply
from anytoken.serving.schemas import ChatBody, ScoreBody
from anytoken.serving.service import Service, service_of

router = APIRouter(prefix="/v1", tags=["chat"])
HELD_SAMPLES = 64  # of 24 kHz, more than the resampling filter reaches
AUDIO_KEPT_SECONDS = 3600  # OpenAI's API names a time until which audio may be referred to


@router.post("/chat/completions", responses=FAILURES)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation with text, images, speech, video or DNA; as one body or as server-sent events."""
    service = service_of(request)
    service.check_model(body.model)
    audio_format = _audio_format(body)
    prompt = await service.encode(body.messages, body.media_limits)
    sizes = {kind: tuple(size) for kind, size in body.sizes.items()} if body.sizes else None
    pending = await service.submit(body, prompt, body.output, body.n, body.limit, body.stops, sizes)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        chunks = _chunks(service, body, pending, {**head, "object": "chat.completion.chunk"})
        return StreamingResponse(
            chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    replies = await service.replies(pending, request)

    def build() -> dict[str, Any]:
        choices = [_choice(number, reply, audio_format) for number, reply in enumerate(replies)]
        return {**head, "object": "chat.completion", "choices": choices, "usage": usage(len(prompt), replies)}

    return JSONResponse(await asyncio.to_thread(build))


def _audio_format(body: ChatBody) -> str:
    wanted = body.audio.format if body.audio else "pcm16" if body.stream else "wav"
    if body.stream and wanted not in ("pcm16",) and "speech" in (body.output or ()):
        raise BadRequest(
            "A stream brings audio as pcm16: leave audio.format out, or do not stream.", "audio.format"
        )
    return wanted


def _choice(number: int, reply: GenerationOutput, audio_format: str) -> dict[str, Any]:
    return {
        "index": number, "message": message(reply.segments, audio_format), "finish_reason": reply.finish_reason,
        "logprobs": None,
    }  # fmt: skip


def message(segments: Sequence[Segment], audio_format: str) -> dict[str, Any]:
    """A reply as an assistant's message."""
    text = "".join(one.text for one in segments if isinstance(one, Text))
    found: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
    if images := [write_part(one) for one in segments if isinstance(one, Image)]:
        found["images"] = images
    clip = next((one for one in segments if isinstance(one, Speech)), None)
    if clip is not None:
        found["audio"] = {
            "id": f"audio_{uuid.uuid4().hex}", "data": b64(audio_bytes(clip, audio_format)), "transcript": text,
            "expires_at": int(time.time()) + AUDIO_KEPT_SECONDS,
        }  # fmt: skip
    found["segments"] = [write_part(one, audio_format) for one in segments]
    return found


def usage(prompt_tokens: int, replies: Sequence[GenerationOutput]) -> dict[str, Any]:
    """Token counts as OpenAI's API gives them, and by modality."""
    new = sum(reply.usage.new_tokens for reply in replies)
    by_kind: dict[str, int] = {}
    for reply in replies:
        for kind, count in reply.usage.tokens.items():
            by_kind[kind] = by_kind.get(kind, 0) + count
    details = {"audio_tokens": by_kind.get("speech", 0), "reasoning_tokens": 0, "by_modality": by_kind}
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new,
        "completion_tokens_details": details,
    }  # fmt: skip


# ---- streaming ----


async def _chunks(
    service: Service, body: ChatBody, pending: Sequence[PendingReply], head: dict[str, Any]
) -> AsyncIterator[str]:
    """Server-sent events: a chunk for every piece of any choice, usage if asked for, and [DONE]."""
    queue: asyncio.Queue[tuple[int, Event | ApiError | None]] = asyncio.Queue()

    async def follow(number: int, one: PendingReply) -> None:
        try:
            async for event in one:
                queue.put_nowait((number, event))
            queue.put_nowait((number, None))
        except ApiError as error:
            queue.put_nowait((number, error))

    deltas = [Deltas() for _ in pending]
    tasks = [asyncio.ensure_future(follow(number, one)) for number, one in enumerate(pending)]
    try:
        for number in range(len(pending)):
            yield _chunk(head, number, {"role": "assistant", "content": ""})
        left = len(pending)
        while left:
            number, event = await queue.get()
            if isinstance(event, ApiError):
                yield _event(event.body())
                return
            if event is None:
                left -= 1
                reply = pending[number].reply
                assert reply is not None
                service.count(len(pending[number].job.request.prompt), reply)
                yield _chunk(head, number, {}, reply.finish_reason)
            elif (delta := await asyncio.to_thread(deltas[number].of, event)) is not None:
                yield _chunk(head, number, delta)
        if body.stream_options and body.stream_options.include_usage:
            replies = [one.reply for one in pending if one.reply is not None]
            yield _event({**head, "choices": [], "usage": usage(len(pending[0].job.request.prompt), replies)})
        yield "data: [DONE]\n\n"
    finally:  # also when the client goes away
        for task, one in zip(tasks, pending, strict=True):
            task.cancel()
            service.worker.cancel(one.job)


class Deltas:
    """What the events of one reply add to its message.

    Clips are resampled as far as they are known, and only samples that no later piece changes are sent: joined, the
    pieces are the clip resampled at once, without seams.
    """

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._sent = 0

    def of(self, event: Event) -> dict[str, Any] | None:
        """The delta of an event, None if it adds nothing."""
        if isinstance(event, TextDelta):
            return {"content": event.text}
        if isinstance(event, SegmentDelta) and isinstance(event.segment, Speech):
            self._pieces.append(event.segment.samples)
            known = Speech(np.concatenate(self._pieces), event.segment.sample_rate_hz)
            return self._audio(known, hold_back=HELD_SAMPLES)
        if not isinstance(event, SegmentFinished) or isinstance(event.segment, Text):
            return None
        if isinstance(event.segment, Speech):
            rest = self._audio(event.segment)
            self._pieces, self._sent = [], 0
            return rest
        part = write_part(event.segment)
        images = {"images": [part]} if isinstance(event.segment, Image) else {}
        return {**images, "segments": [part]}

    def _audio(self, clip: Speech, hold_back: int = 0) -> dict[str, Any] | None:
        samples = clip.resample(PCM_RATE_HZ).samples
        stop = max(self._sent, len(samples) - hold_back)
        new, self._sent = samples[self._sent : stop], stop
        return {"audio": {"data": b64(pcm16(new))}} if len(new) else None


def _chunk(head: dict[str, Any], number: int, delta: dict[str, Any], reason: str | None = None) -> str:
    return _event(
        {**head, "choices": [{"index": number, "delta": delta, "finish_reason": reason, "logprobs": None}]}
    )


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


# ---- scores ----


@router.post("/score", responses=FAILURES)
async def score(body: ScoreBody, request: Request) -> dict[str, Any]:
    """Log-likelihoods of answers to a conversation, in nats; each answer is a string or a list of content parts."""
    service = service_of(request)
    service.check_model(body.model)
    settings, messages = service.settings, [one.model_dump() for one in body.messages]
    own = checked_limits(body.media_limits, settings)

    def parts(answer: str | list[Any], where: str) -> list[Any]:
        if len(answer) > settings.max_parts and not isinstance(answer, str):
            raise BadRequest(f"{where} has more than {settings.max_parts} content parts.", "answers")
        return [answer] if isinstance(answer, str) else answer

    def read() -> tuple[list[int], list[list[int]]]:
        prompt = read_messages(messages, settings, own)
        answers = [
            [read_part(part, where, settings, own) for part in parts(one, where)]
            for where, one in ((f"answers[{number}]", one) for number, one in enumerate(body.answers))
        ]
        return service.model.encode_prompt(prompt), [
            service.model.processor.encode_reply(one) for one in answers
        ]

    try:
        ids = await asyncio.to_thread(read)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    found = await service.run(service.model.score_steps(*ids, body.normalize), body.model, request)
    scores = [one.value(body.normalize) for one in found]
    data = [{"index": number, "object": "score", "score": value} for number, value in enumerate(scores)]
    return {"object": "list", "model": body.model, "data": data}
