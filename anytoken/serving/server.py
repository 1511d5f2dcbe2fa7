"""Running the application with uvicorn: addresses, time-outs, shutting down."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import uvicorn
from pydantic import ValidationError

from anytoken.inference.api import AnyToken
from anytoken.serving.app import create_app
from anytoken.serving.protocol import impatient
from anytoken.serving.remote import RemoteWorker
from anytoken.serving.settings import ServerSettings
from anytoken.utils.errors import ConfigError
from anytoken.utils.hints import choices, explain

LEVELS = ("critical", "error", "warning", "info", "debug")
KEEP_ALIVE = 5  # seconds that an idle connection is kept


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


def settings_from(
    changes: Sequence[str],
    keys: tuple[str, ...],
    origins: tuple[str, ...],
    adapter_folder: Path | None = None,
) -> ServerSettings:
    """Settings with changes such as "max_waiting=16"; ConfigError names a key or value that cannot be."""
    values: dict[str, object] = {"api_keys": keys, "cors_origins": origins, "adapter_folder": adapter_folder}
    known = [name for name in ServerSettings.model_fields if name not in values]
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"--set takes KEY=VALUE; received {change!r}{choices(key, known)}.")
        values[key] = tuple(value.split(",")) if key == "voices" else value
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"--set: {explain(error, ServerSettings)}.") from None


def run(
    model: AnyToken,
    name: str,
    settings: ServerSettings,
    address: Address,
    log_level: str,
    worker: RemoteWorker | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests that run then are answered first, up to their deadline."""
    if log_level not in LEVELS:
        raise ConfigError(f"--log-level is one of {', '.join(LEVELS)}; received {log_level!r}.")
    _log_lines(log_level)
    config = uvicorn.Config(
        create_app(model, name, settings, worker),
        host=address.host,
        port=address.port,
        http=impatient(settings.body_timeout),
        log_level=log_level,
        log_config=None,
        access_log=False,  # the application writes its own, without content
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        ws_max_size=settings.max_body_bytes,
        timeout_graceful_shutdown=int(settings.deadline) + 1,
        limit_concurrency=16 * (settings.max_rows + settings.max_waiting) + 64,
    )
    uvicorn.Server(config).run()


class _JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record), "level": record.levelname, "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _log_lines(log_level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name in ("anytoken", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(log_level.upper())
        logger.propagate = False
