"""From a job's tokens to what clients read: whole replies, or events of a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from anytoken.inference.api import AnyToken
from anytoken.inference.outputs import GenerationOutput, count_usage
from anytoken.inference.request import GenerationRequest, Token
from anytoken.inference.streaming import Event, SegmentFinished, SegmentStream, TextDelta
from anytoken.segments import Segment, Text
from anytoken.serving.errors import ApiError, BadRequest
from anytoken.serving.remote import RemoteWorker
from anytoken.serving.worker import Job, Worker


class PendingReply:
    """A reply that the worker is making, seen from the event loop.

    `async for event in pending` gives its events; then `reply` is the whole. Leaving early, `cancel` frees the place.
    stops: the first of these strings ends the text, and the reply, without being part of it.
    """

    def __init__(
        self,
        model: AnyToken,
        request: GenerationRequest,
        deadline: float,
        stops: Sequence[str] = (),
        adapter: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._model, self._stops = model, list(stops)
        self._began = time.perf_counter()
        self.job = Job(request, self._deliver, time.monotonic() + deadline, adapter)
        self.reply: GenerationOutput | None = None

    def _deliver(self, item: Token | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[Event]:
        segments = SegmentStream(self._model.processor)
        held = _StopText(self._stops)
        finished: list[Segment] = []
        ids: list[int] = []
        reason: str | None = None
        while reason is None:
            items, tokens = [await self._queue.get()], []
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            for item in items:
                if isinstance(item, Exception):
                    raise _as_api_error(item)
                tokens.append(item)
                ids.append(item.id)
                reason = item.finish_reason or reason
            # decoding a medium takes long enough to keep others waiting
            events = await asyncio.to_thread(_push, segments, tokens)
            for event in held.pass_on(events):
                if isinstance(event, SegmentFinished):
                    finished.append(event.segment)
                yield event
            if held.found:
                reason = "stop"
                break
        if held.found and held.text:
            finished.append(Text(held.text))
        usage = count_usage(
            self._model.token_space, len(self.job.request.prompt), ids, time.perf_counter() - self._began
        )
        self.reply = GenerationOutput(finished, ids, usage, reason or "stop", segments.steps)


def _push(segments: SegmentStream, tokens: Sequence[Token]) -> list[Event]:
    return [event for token in tokens for event in segments.push(token.id, token.step)]


class _StopText:
    """Passes text on up to a stop string; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._waiting = ""
        self.text = ""  # of the running text segment, as passed on
        self.found = False

    def pass_on(self, events: Sequence[Event]) -> list[Event]:
        """The events up to a stop string."""
        if not self._stops:
            return list(events)
        passed: list[Event] = []
        for event in events:
            if self.found:
                break
            if isinstance(event, TextDelta):
                passed += self._text(event.text)
            elif isinstance(event, SegmentFinished) and isinstance(event.segment, Text):
                passed += self._flush(self._waiting)
                passed.append(event)
                self.text = self._waiting = ""
            else:
                passed.append(event)
        return passed

    def _text(self, piece: str) -> list[Event]:
        self._waiting += piece
        places = [place for stop in self._stops if (place := self._waiting.find(stop)) >= 0]
        if places:
            self.found = True
            return self._flush(self._waiting[: min(places)])
        keep = max(
            (
                length
                for stop in self._stops
                for length in range(1, len(stop))
                if self._waiting.endswith(stop[:length])
            ),
            default=0,
        )
        return self._flush(self._waiting[: len(self._waiting) - keep])

    def _flush(self, text: str) -> list[Event]:
        self._waiting = self._waiting[len(text) :]
        self.text += text
        return [TextDelta(text)] if text else []


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):  # a prompt or a setting that does not fit the model
        return BadRequest(str(error))
    return ApiError("The reply could not be generated.")


async def whole(pending: PendingReply) -> GenerationOutput:
    """The finished reply."""
    async for _ in pending:
        pass
    assert pending.reply is not None
    return pending.reply


async def gather(
    worker: Worker | RemoteWorker, pending: Sequence[PendingReply], gone: Any
) -> list[GenerationOutput]:
    """The finished replies, in order; all are cancelled when one fails or `gone` (a coroutine) ends first."""
    tasks = [asyncio.ensure_future(whole(one)) for one in pending]
    watch = asyncio.ensure_future(gone)
    try:
        everything = asyncio.gather(*tasks)
        await asyncio.wait({everything, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            raise asyncio.CancelledError
        return await everything
    finally:
        watch.cancel()
        for task, one in zip(tasks, pending, strict=True):
            task.cancel()
            worker.cancel(one.job)
