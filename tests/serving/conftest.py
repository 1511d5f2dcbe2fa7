"""A server on a free port of this machine, with the bundled model; and clients for it."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import uvicorn

import anytoken
from anytoken.serving.app import create_app
from anytoken.serving.settings import ServerSettings


@pytest.fixture(scope="session")
def mini():
    torch.set_num_threads(1)
    return anytoken.load("mini")


@contextmanager
def serving(model, **settings) -> Iterator[tuple[str, object]]:
    """Base URL and application of a running server."""
    app = create_app(model, "mini", ServerSettings(**settings))
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(mini):
    with serving(mini, max_rows=4, max_waiting=8, deadline=60) as (url, _):
        yield url


@pytest.fixture(scope="session")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="session")
def start():
    """`serving`, for tests that need a server of their own."""
    return serving
