"""uvicorn's HTTP protocol with a time limit for what comes before a request's body.

uvicorn itself waits forever for the end of a request's line and headers, so clients that send them a byte at a time
(slow loris) would keep their connections.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

Base: Any = AutoHTTPProtocol


def impatient(seconds: float) -> type[asyncio.Protocol]:
    """A protocol that closes connections whose next headers take longer than this."""

    class ImpatientProtocol(Base):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # a request has begun
                self._stop_waiting()
            elif self._timer is None and before is not None and before.response_complete:
                self._wait()  # for the rest of the next one

        def handle_websocket_upgrade(self, *given: Any) -> None:
            self._stop_waiting()
            super().handle_websocket_upgrade(*given)

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(error)

        def _wait(self) -> None:
            self._timer = self.loop.call_later(seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return ImpatientProtocol
