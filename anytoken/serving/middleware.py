"""What every request passes before it is read: a key, a size, a time to arrive; and what is counted of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anytoken.serving.errors import ApiError, RequestTimeout, TooLarge, Unauthorized
from anytoken.serving.settings import ServerSettings

OPEN_PATHS = ("/healthz", "/readyz")  # what an orchestrator asks without a key
KEY_PROTOCOL = "openai-insecure-api-key."
log = logging.getLogger("anytoken.serving.access")


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "anytoken_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "anytoken_request_seconds", "Time from request to the end of the answer.", ["path"],
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120), registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "anytoken_tokens",
            "Tokens read and written, by modality.",
            ["direction", "modality"],
            registry=registry,
        )
        self.running = Gauge("anytoken_running", "Replies that are being decoded.", registry=registry)
        self.waiting = Gauge("anytoken_waiting", "Replies that wait for a place.", registry=registry)


class Gate:
    """ASGI middleware: refuses requests without a key or with too large or too slow a body, logs and counts the rest.

    The log has method, path, status and time of a request, never its content.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, started = time.perf_counter(), 500, False

        async def watched(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            self._check_key(scope)
            await self.app(scope, _Body(scope, receive, self.settings), watched)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, headers=error.extra)(scope, receive, watched)
        except Exception:
            if started:
                raise
            log.exception("A request failed")
            await JSONResponse(ApiError().body(), ApiError.status)(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - began
            route = scope.get("route")
            path = getattr(route, "path", "other")  # an unknown path would be a label of its own
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            log.info("%s %s %d %.3f s", scope["method"], path, status, seconds)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Browsers send no key with a WebSocket and let pages of any origin open one: both are checked here."""
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        try:
            if not may_connect(scope, self.settings.cors_origins):
                raise Unauthorized(
                    f"Pages of {origin} may not connect: start the server with --cors {origin}."
                )
            self._check_key(scope)
        except ApiError as error:
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})
            log.info("WEBSOCKET %s refused", scope["path"])
            return
        log.info("WEBSOCKET %s", scope["path"])
        await self.app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not self.settings.api_keys or scope["path"] in OPEN_PATHS or scope.get("method") == "OPTIONS":
            return
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scope["type"] == "websocket" and not scheme:  # how browsers send a key, in OpenAI's API
            protocols = (
                headers.get(b"sec-websocket-protocol", b"").decode("latin-1").replace(" ", "").split(",")
            )
            keys = [one.removeprefix(KEY_PROTOCOL) for one in protocols if one.startswith(KEY_PROTOCOL)]
            scheme, key = "bearer", keys[0] if keys else ""
        if scheme.lower() != "bearer" or not self.settings.knows_key(key.strip()):
            raise Unauthorized("A valid API key is needed: send it as 'Authorization: Bearer KEY'.")


def may_connect(scope: Scope, origins: Sequence[str]) -> bool:
    """Whether the page that opens a WebSocket, if it is a page, is the server's own or of an allowed origin."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin", b"").decode("latin-1")
    own = origin.partition("://")[2] == headers.get(b"host", b"").decode("latin-1")
    return not origin or own or origin in origins


class _Body:
    """The receiving side of a request, within the limits of size and time."""

    def __init__(self, scope: Scope, receive: Receive, settings: ServerSettings) -> None:
        self._receive, self._settings = receive, settings
        self._left = settings.max_body_bytes
        self._until = time.monotonic() + settings.body_timeout
        self._whole = False
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._left:
            raise self._too_large()

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is the client going away
            return await self._receive()
        try:
            message: Any = await asyncio.wait_for(self._receive(), max(0.0, self._until - time.monotonic()))
        except TimeoutError:
            raise RequestTimeout(
                f"The request's body did not arrive within {self._settings.body_timeout:g} s."
            ) from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._left < 0:
                raise self._too_large()
        return message

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The request's body is over the limit of {self._settings.max_body_bytes} bytes.")
