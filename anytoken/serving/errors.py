"""Errors of the API: a status and a body in OpenAI's form, never a traceback."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from anytoken.utils.errors import MediaLimitError
from anytoken.utils.limits import MediaLimits

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The request cannot be served as it is.", 401: "A valid API key is missing.", 404: "No such model.",
        408: "The body came too slowly.", 413: "The body is too large.", 429: "The queue is full.",
        503: "The server is shutting down.", 504: "The reply took too long.",
    }.items()
}  # fmt: skip


RETRY = {"Retry-After": "1"}  # seconds


class ApiError(HTTPException):
    """An answer other than success: `status`, and what OpenAI's clients show of it; `default`: its usual message."""

    status = 500
    kind = "server_error"
    default = "The server failed to answer this request."

    def __init__(self, message: str = "", param: str | None = None, code: str | None = None) -> None:
        self.message, self.param, self.code = message or self.default, param, code
        super().__init__(self.status, self.message)

    @property
    def extra(self) -> dict[str, str] | None:
        """Headers of the answer that tell a client what to do."""
        return {401: {"WWW-Authenticate": "Bearer"}, 429: RETRY, 503: RETRY}.get(self.status)

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class BadRequest(ApiError):
    """A request that cannot be served as it is."""

    status, kind = 400, "invalid_request_error"


def media_error(where: str, error: ValueError, limits: MediaLimits) -> BadRequest:
    """What is wrong with a medium of a request; of one over a limit, which limit it is and who set it.

    limits: those of the server.
    """
    if isinstance(error, MediaLimitError):
        most = getattr(limits, error.limit)
        by = f"this server ({error.limit})"
        if error.allowed < most:
            by = f"this request (media_limits.{error.limit}), {most:,.12g} by this server"
        return BadRequest(f"{where} {error.fact} by {by}.", where, "media_too_large")
    return BadRequest(f"{where}: {error}", where)


class Unauthorized(ApiError):
    """A missing or unknown key."""

    status, kind = 401, "authentication_error"


class NotFound(ApiError):
    """A model or path that is not there."""

    status, kind = 404, "not_found_error"


class RequestTimeout(ApiError):
    """A body that did not arrive in time."""

    status, kind = 408, "timeout_error"


class TooLarge(ApiError):
    """A body over the limit."""

    status, kind = 413, "invalid_request_error"


class TooManyRequests(ApiError):
    """A full queue; the answer says when to try again."""

    status, kind = 429, "rate_limit_error"


def busy(requests: int) -> TooManyRequests:
    """The error where this many requests run or wait already."""
    return TooManyRequests(
        f"The server is busy: {requests} requests are running or waiting. Try again later."
    )


class Unavailable(ApiError):
    """A server that is shutting down."""

    status, kind = 503, "server_error"
    default = "The server is shutting down."


class DeadlinePassed(ApiError):
    """A request that took longer than the server allows."""

    status, kind = 504, "timeout_error"
    default = "The request took too long."
