"""One model for all visitors of a page: their replies are decoded together, in the batch of one worker."""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Unpack

from anytoken.inference.api import AnyToken
from anytoken.inference.generation import Options, Output
from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.outputs import GenerationOutput
from anytoken.inference.request import GenerationRequest, Token
from anytoken.inference.streaming import Event
from anytoken.serving.settings import ServerSettings
from anytoken.serving.worker import Job, Worker

MAX_REPLIES = 8  # decoded together; further visitors wait in the page's queue
REPLY_SECONDS = 600.0  # the longest that a reply may take


class SharedModel(AnyToken):
    """A model whose streamed replies join the running batch of a worker; all else is the model's own."""

    def __init__(self, model: AnyToken) -> None:
        """Starts the worker, a daemon thread that waits for replies to make."""
        assert model.engine and model.adapters  # made at first use: here, so that they are shared
        vars(self).update(vars(model))
        self.worker = Worker(model, MAX_REPLIES, MAX_REPLIES, ServerSettings().max_prefill_tokens)
        self.worker.start()

    def stream_ids(
        self,
        prompt: Sequence[int],
        output: Output = None,
        prefixes: PrefixCache | None = None,
        **options: Unpack[Options],
    ) -> Generator[Event, None, GenerationOutput]:
        """As `AnyToken.stream_ids`, but what does not fit is raised by the first event."""
        request = replace(self.request(prompt, output, **options), prefixes=prefixes)
        if request.seed is None:  # the worker may decode it again, which has to give the same ids
            request = replace(request, seed=secrets.randbits(63))
        return self._events(request, self._tokens(request))

    def _tokens(self, request: GenerationRequest) -> Generator[Token, None, None]:
        tokens: queue.SimpleQueue[Token | Exception] = queue.SimpleQueue()
        job = Job(request, tokens.put, time.monotonic() + REPLY_SECONDS, self.adapters.active)
        self.worker.submit([job])
        finished = False
        try:
            while not finished:
                token = tokens.get()
                if isinstance(token, Exception):
                    raise token
                finished = token.finish_reason is not None
                yield token
        finally:  # also when the visitor stops it or leaves
            self.worker.cancel(job)
