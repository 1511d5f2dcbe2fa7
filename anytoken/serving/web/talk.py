"""The talk button: the page's own /v1/realtime, and the script that feeds it with the microphone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.websockets import WebSocket

from anytoken.serving.middleware import Metrics, may_connect
from anytoken.serving.realtime_api import realtime
from anytoken.serving.service import Service
from anytoken.serving.settings import ServerSettings
from anytoken.serving.web.shared import SharedModel

SCRIPT = Path(__file__).with_name("talk.js").read_text(encoding="utf-8")
PANEL = """<button type="button" aria-pressed="false">Talk</button> <span role="status">Speak and be answered while you
speak.</span><ol aria-live="polite" aria-label="Spoken replies"></ol>"""
STYLE = """
#talk{padding:0}#talk ol{margin:.3rem 0 0;max-height:9rem;overflow-y:auto;list-style:none;padding:0}
#talk ol:empty{display:none}#talk img{width:96px;border-radius:6px}
#talk button{border:1px solid var(--border-color-primary);border-radius:8px;padding:.2rem .8rem;
background:var(--button-secondary-background-fill);color:var(--button-secondary-text-color)}
#talk button[aria-pressed=true]{background:var(--color-accent);color:#fff}
#talk [role=status]{font-size:.85rem;margin-left:.4rem}
"""


def add_realtime(app: Any, model: SharedModel, name: str, settings: ServerSettings) -> None:
    """Serve /v1/realtime from a page's application, to its own visitors only: with keys, to those who have logged in.

    Replies join the batch of the page's others. app: Gradio's, while it runs.
    """
    app.state.service = Service(model, name, settings, Metrics(), model.worker)

    async def talk(socket: WebSocket) -> None:
        cookies = (socket.cookies.get(f"access-token-{kind}{app.cookie_id}") for kind in ("", "unsecure-"))
        known = app.auth is None or any(cookie in app.tokens for cookie in cookies)
        if known and may_connect(socket.scope, ()):
            await realtime(socket)
        else:
            await socket.close(1008)

    app.add_api_websocket_route("/v1/realtime", talk)
