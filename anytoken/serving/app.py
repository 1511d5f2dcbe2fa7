"""The server: OpenAI's endpoints over one model, as a FastAPI application.

    anytoken serve mini --port 8000
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
      -d '{"model": "mini", "messages": [{"role": "user", "content": "a fox, 3d"}], "modalities": ["image"]}'
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

import anytoken
from anytoken.inference.api import AnyToken
from anytoken.serving.adapters_api import router as adapters_router
from anytoken.serving.chat_api import router as chat_router
from anytoken.serving.embeddings_api import router as embeddings_router
from anytoken.serving.errors import FAILURES, ApiError, BadRequest, NotFound
from anytoken.serving.media_api import router as media_router
from anytoken.serving.middleware import Gate, Metrics
from anytoken.serving.realtime_api import router as realtime_router
from anytoken.serving.remote import RemoteWorker
from anytoken.serving.service import Service
from anytoken.serving.settings import ServerSettings


def create_app(
    model: AnyToken, name: str, settings: ServerSettings | None = None, worker: RemoteWorker | None = None
) -> FastAPI:
    """The application that serves a model under a name; also for a server of your own (`uvicorn.run(app)`).

    worker: where tokens come from, if not from the model itself.
    """
    settings = settings or ServerSettings()
    metrics = Metrics()
    service = Service(model, name, settings, metrics, worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(
        title="AnyToken",
        version=anytoken.__version__,
        summary="Text, images, speech, video and DNA in and out, in the terms of OpenAI's API.",
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(chat_router)
    app.include_router(embeddings_router)
    app.include_router(media_router)
    app.include_router(realtime_router)
    if settings.adapter_folder is not None and settings.api_keys:
        app.include_router(adapters_router)
    _add_operations(app, service)
    _add_error_handlers(app)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    if settings.cors_origins:  # around the gate, so that a page can read its answers, too
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"],  # OpenAI's client sends headers of its own
        )  # fmt: skip
    return app


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operations"])
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"], responses={503: {"description": "Not ready."}})
    async def ready() -> Response:
        """Whether requests are taken: the model is loaded and the server is not shutting down."""
        alive = service.worker.alive
        return JSONResponse({"status": "ready" if alive else "not ready"}, 200 if alive else 503)

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        running, waiting = service.worker.load
        service.metrics.running.set(running)
        service.metrics.waiting.set(waiting)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The models that can be asked for."""
        return {"object": "list", "data": [service.describe(name) for name in service.models]}

    @app.get("/v1/models/{name}", tags=["models"], responses=FAILURES)
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        service.check_model(name)
        return service.describe(name)


def _add_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = _invalid(error)
        if isinstance(error, ApiError):
            return JSONResponse(error.body(), error.status, headers=error.extra)
        assert isinstance(error, HTTPException)
        kind = NotFound if error.status_code == 404 else BadRequest
        found = kind(f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(found.body(), error.status_code, headers=error.headers)

    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> BadRequest:
    """The first thing that is wrong with a body, in one sentence, without repeating its content."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return BadRequest(f"The body is not valid JSON: {reason} at character {first['loc'][-1]}.")
    if first["loc"] == ("body",) and first["type"] != "value_error":
        return BadRequest("The body is not a JSON object: send one with Content-Type: application/json.")
    names = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "extra_forbidden":
        place = ".".join(names)
        return BadRequest(f"Unknown parameter {place!r}.", place, "unknown_parameter")
    # pydantic also names the alternative of a union that it tried
    place = ".".join(name for name in names if name != "str" and not name.startswith("list["))
    message = str(first["msg"]).removeprefix("Value error, ")
    return BadRequest(f"{place}: {message}" if place else message, place or None)
