"""What the endpoints share: the model behind its worker, checks of requests, and counting."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request

from anytoken.inference.api import AnyToken
from anytoken.inference.outputs import GenerationOutput
from anytoken.serving.content import checked_limits, read_messages
from anytoken.serving.errors import BadRequest, DeadlinePassed, NotFound, Unavailable
from anytoken.serving.middleware import Metrics
from anytoken.serving.remote import RemoteWorker
from anytoken.serving.replies import PendingReply, gather
from anytoken.serving.schemas import Message, RequestMediaLimits, SamplingBody
from anytoken.serving.settings import REQUEST_LIMITS, ServerSettings
from anytoken.serving.worker import Steps, Worker

T = TypeVar("T")


class Service:
    """One model under a name, with its worker, limits and metrics."""

    def __init__(
        self,
        model: AnyToken,
        name: str,
        settings: ServerSettings,
        metrics: Metrics,
        worker: Worker | RemoteWorker | None = None,
    ) -> None:
        self.model, self.name, self.settings, self.metrics = model, name, settings, metrics
        self.worker = worker or Worker(
            model, settings.max_rows, settings.max_waiting, settings.max_prefill_tokens
        )
        self.created = int(time.time())

    def describe(self, name: str) -> dict[str, Any]:
        """The entry of a name in /v1/models; `parent` is the model that an adapter changes."""
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "anytoken",
            "parent": self.name if name != self.name else None, "modalities": self.model.kinds,
            "context": self.model.engine.context,
            "limits": self.settings.model_dump(include=REQUEST_LIMITS),
        }  # fmt: skip

    @property
    def models(self) -> list[str]:
        """Names that can be asked for: the model's, and "model:adapter" for each adapter."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.model.adapters.names)]

    def check_model(self, name: str) -> str | None:
        """The adapter that a name asks for, None for the bare model; NotFound for another name."""
        if name not in self.models:
            raise NotFound(
                f"There is no model {name!r}; this server has {', '.join(map(repr, self.models))}.",
                "model", "model_not_found",
            )  # fmt: skip
        return name[len(self.name) + 1 :] or None

    async def encode(
        self, messages: Sequence[Message], limits: RequestMediaLimits | None = None
    ) -> list[int]:
        """The prompt's ids; BadRequest says which part cannot be read. Media are decoded off the event loop.

        limits: those of the request.
        """
        own = checked_limits(limits, self.settings)
        plain = [message.model_dump() for message in messages]

        def read() -> list[int]:
            return self.model.encode_prompt(read_messages(plain, self.settings, own))

        try:
            return await asyncio.to_thread(read)
        except ValueError as error:
            raise BadRequest(str(error), "messages") from error

    async def submit(
        self,
        body: SamplingBody,
        prompt: Sequence[int],
        output: Sequence[str] | None,
        count: int = 1,
        limit: int | None = None,
        stops: Sequence[str] = (),
        sizes: dict[str, tuple[int, ...]] | None = None,
    ) -> list[PendingReply]:
        """Hand `count` replies to the worker; TooManyRequests if they would have to wait too long."""
        settings, adapter = self.settings, self.check_model(body.model)
        if count > settings.max_choices:
            raise BadRequest(f"n is at most {settings.max_choices}; received {count}.", "n")
        if limit is not None and limit > settings.max_new_tokens:
            raise BadRequest(
                f"A reply has at most {settings.max_new_tokens} tokens; {limit} were asked for.", "max_tokens"
            )
        try:
            request = self.model.request(prompt, output, sizes=sizes, max_new_tokens=limit, **body.sampling())
        except ValueError as error:
            raise BadRequest(str(error)) from error
        request = replace(
            request,
            max_new_tokens=min(request.max_new_tokens or settings.max_new_tokens, settings.max_new_tokens),
            # fixed, so that a reply can be decoded a second time; see `Worker`
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )
        pending = [
            PendingReply(self.model, replace(request, draw=number), settings.deadline, stops, adapter)
            for number in range(count)
        ]
        if not self.worker.alive:
            raise Unavailable()
        self.worker.submit([one.job for one in pending])
        return pending

    async def run(self, steps: Steps[T], name: str, request: Request) -> T:
        """What work in parts returns, done with the adapter that a name asks for; errors as answers to a request."""
        work = asyncio.ensure_future(self.worker.work(steps, self.check_model(name)))
        gone = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait(
                {work, gone}, timeout=self.settings.deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if work.done():
                with _as_answers():
                    return work.result()
            if gone.done():
                raise asyncio.CancelledError
            raise DeadlinePassed()
        finally:
            work.cancel()
            gone.cancel()

    async def change(self, function: Callable[[], None]) -> None:
        """Change the model or its adapters once nothing else runs; errors as answers to a request."""
        with _as_answers():
            await self.worker.call(function, alone=True)

    async def replies(self, pending: Sequence[PendingReply], request: Request) -> list[GenerationOutput]:
        """The finished replies; their places are freed if the client goes away."""
        replies = await gather(self.worker, pending, disconnected(request))
        for one, reply in zip(pending, replies, strict=True):
            self.count(len(one.job.request.prompt), reply)
        return replies

    def count(self, prompt_tokens: int, reply: GenerationOutput) -> None:
        """Add a reply to the metrics."""
        self.metrics.tokens.labels("in", "all").inc(prompt_tokens)
        for modality, number in reply.usage.tokens.items():
            self.metrics.tokens.labels("out", modality).inc(number)


@contextmanager
def _as_answers() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise BadRequest(str(error)) from error


async def disconnected(request: Request) -> None:
    """Return once the client has gone away."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def service_of(request: Request) -> Service:
    """The service behind a request."""
    service: Service = request.app.state.service
    return service
