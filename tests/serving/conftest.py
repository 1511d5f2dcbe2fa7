"""A server on a free port of this machine, with the bundled model; and clients for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from local_server import listening

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
    with listening(app) as url:
        yield url, app


@pytest.fixture(scope="session")
def server(mini):
    with serving(mini, max_rows=4, max_waiting=8, deadline=600) as (url, _):
        yield url


@pytest.fixture(scope="session")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="session")
def start():
    """`serving`, for tests that need a server of their own."""
    return serving
