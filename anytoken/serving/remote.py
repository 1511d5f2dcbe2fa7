"""Tokens from an engine elsewhere: this process turns media into ids and ids into media, and decodes nothing itself.

    vllm serve CHECKPOINT --skip-tokenizer-init --port 8001        (model/vllm_plugin.py brings the model to vLLM)
    anytoken serve CHECKPOINT --engine http://127.0.0.1:8001/v1    (no weights of the language model are loaded)

All endpoints of the server are there. The engine needs an OpenAI-style completions endpoint with vLLM's additions: ids
as prompt, `allowed_token_ids`, `stop_token_ids`, `return_token_ids`. The grammar stays on this side: one request is
made for each stretch of a reply in which the same ids are allowed (the codes of an image, a text), ids without a choice
are appended here, so replies are as well-formed as those of our own engine. Several codebooks, which take turns, cost
a request an id. Guidance is not available, and a repetition penalty counts the prompt, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anytoken.grammar import Grammar
from anytoken.grammar_tables import Ranges
from anytoken.inference.api import AnyToken
from anytoken.inference.chains import load_chains
from anytoken.inference.checkpoint import find_checkpoint
from anytoken.inference.request import GenerationRequest, GrammarWalk, Token
from anytoken.inference.sampling import Sampling, load_sampling
from anytoken.inference.score import Steps
from anytoken.processor import Processor
from anytoken.serving.errors import DeadlinePassed, Unavailable, busy
from anytoken.serving.worker import Job
from anytoken.utils.errors import TokenSpaceError

log = logging.getLogger(__name__)
T = TypeVar("T")
LONGEST = 4096  # ids of one request
CONNECT_SECONDS = 10.0
NO_MODEL = "Tokens come from an engine here, and nothing but generation is asked of it."
SEEDS = 2**31  # engines take 32-bit seeds


class EngineFailure(Unavailable):
    """The token engine failed: it does not answer, or answers with what was not asked for."""


def open_remote(name_or_path: str | Path) -> AnyToken:
    """Processor, configuration and sampling defaults of a checkpoint, with a language model that has no memory.

    Guidance is taken out of the defaults, as engines have none. CheckpointError and the like as for `anytoken.load`.
    """
    folder = find_checkpoint(name_or_path)
    processor = Processor.from_pretrained(folder)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    defaults = load_sampling(folder / "sampling.json")
    guided = [kind for kind, one in defaults.items() if one.cfg_scale != 1]
    if guided:
        log.info("Engines have no guidance: %s is generated without", ", ".join(guided))
    plain = {kind: Sampling(**{**vars(one), "cfg_scale": 1.0}) for kind, one in defaults.items()}
    model = AnyToken(lm, processor, plain)
    model.chains = load_chains(folder)
    return model


class Stretch(GrammarWalk):
    """A reply in the making: what to ask an engine for next, and what follows by itself."""

    def __init__(self, request: GenerationRequest, grammar: Grammar, context: int) -> None:
        super().__init__(request, grammar, context)
        self._controls = sorted(
            chain.from_iterable(
                range(one.start, one.stop) for one in grammar.token_space.ranges if one.kind == "control"
            )
        )
        if any(one.cfg_scale != 1 for one in request.sampling.values()):
            raise ValueError(
                "cfg_scale is not available here: the engine that makes the tokens has no guidance."
            )

    def body(self) -> dict[str, Any]:
        """What to ask for: ids up to a control id, or as many as the same ones are allowed for."""
        ranges = (*self.ranges, *self.grammar.exits(self.state))
        ids = [token for start, stop in ranges for token in range(start, stop)]
        inside, one = set(ids), self.setting
        stops = [token for token in self._controls if token in inside]
        return {
            "prompt": self.context_ids, "allowed_token_ids": ids, "stop_token_ids": stops,
            "max_tokens": self._length(self.ranges, set(stops)), "ignore_eos": True, "temperature": one.temperature,
            "top_p": one.top_p, "top_k": one.top_k or -1, "min_p": one.min_p,
            "repetition_penalty": one.repetition_penalty,
        }  # fmt: skip

    def append(self, token: int, logprob: float = 0.0) -> Token:
        """Add an id; one that would end a text in another way than planned stands for the planned one."""
        if any(start <= token < stop for start, stop in self.grammar.exits(self.state)):
            token = self.grammar.allowed(self.state)[-1][1] - 1
        return super().append(token, logprob)

    def _length(self, ranges: Ranges, controls: set[int]) -> int:
        """How many ids in a row may be chosen among `ranges`, if none of them is a control."""
        plain = next(
            (token for start, stop in ranges for token in range(start, stop) if token not in controls), None
        )
        if plain is None:
            return 1
        state, budget, count = self.state, self.budget, 0
        while count < LONGEST and self.grammar.allowed(state, budget) == ranges:
            state, budget, count = self.grammar.advance(state, plain), budget - 1, count + 1
            if budget < self.grammar.min_remaining(state) or self.grammar.finished(state):
                break
        return count


class RemoteWorker:
    """Takes the place of `Worker`: its jobs are requests to an engine, as many at once as there are rows.

    url: of the engine's API, such as http://127.0.0.1:8001/v1; name: the model's name there; key: its API key, if any.
    """

    def __init__(
        self, model: AnyToken, url: str, name: str, max_rows: int, max_waiting: int, key: str | None = None
    ) -> None:
        self.model, self.url, self.name = model, url.rstrip("/"), name
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context = model.engine.context

    # ---- as `Worker` ----

    def start(self) -> None:
        """Take jobs, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._rows = asyncio.Semaphore(self.max_rows)
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self._client = httpx.AsyncClient(headers=self._headers, timeout=timeout, trust_env=False)

    def stop(self, timeout: float | None = None) -> None:
        """End; jobs that are not over get `Unavailable`. Called from another thread than the loop's."""
        loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result(timeout)

    async def _close(self) -> None:
        for job, task in list(self._tasks.items()):
            task.cancel()
            job.deliver(Unavailable())
        await self._client.aclose()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._loop is not None

    @property
    def load(self) -> tuple[int, int]:
        """How many jobs run and how many wait."""
        return min(len(self._tasks), self.max_rows), max(0, len(self._tasks) - self.max_rows)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs, all or none; TooManyRequests if they are more than may wait."""
        if len(self._tasks) + len(jobs) > self.max_rows + self.max_waiting:
            raise busy(len(self._tasks))
        for job in jobs:
            task = self._tasks[job] = asyncio.ensure_future(self._run(job))
            task.add_done_callback(lambda _, job=job: self._tasks.pop(job, None))  # type: ignore[misc]

    def cancel(self, job: Job) -> None:
        """Drop a job; closing its request makes the engine stop."""
        task = self._tasks.get(job)
        if task is not None and not job.over:
            task.cancel()

    async def call(self, function: Callable[[], T], alone: bool = False) -> T:
        """There is no model here to work with: ValueError."""
        raise ValueError(NO_MODEL)

    async def work(self, steps: Steps[T], adapter: str | None = None, alone: bool = False) -> T:
        """As `call`."""
        raise ValueError(NO_MODEL)

    # ---- one reply ----

    async def _run(self, job: Job) -> None:
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()), self._rows:
                await self._reply(job)
        except TimeoutError:
            job.deliver(DeadlinePassed())
        except Exception as error:  # also a prompt that does not fit: the request's own fault
            job.deliver(error)
        finally:
            job.over = True

    async def _reply(self, job: Job) -> None:
        stretch = Stretch(job.request, self.model.processor.grammar, self._context)
        assert job.request.seed is not None
        seed = int(job.request.seed) + 1_000_003 * job.request.draw
        for one in stretch.settle():
            job.deliver(one)
        while not stretch.finished:
            seed, before = (seed * 31 + 7) % SEEDS, len(stretch.ids)
            body = {**stretch.body(), "seed": seed}
            async for token in self._tokens(body):
                if len(stretch.ids) == before + body["max_tokens"]:
                    raise EngineFailure("The token engine sent more ids than were asked for.")
                try:
                    job.deliver(stretch.append(token))
                except TokenSpaceError as error:
                    raise EngineFailure("The token engine sent an id that was not allowed.") from error
            if len(stretch.ids) == before:
                raise EngineFailure("The token engine sent no ids; it has to support return_token_ids.")
            for one in stretch.settle():
                job.deliver(one)

    async def _tokens(self, body: Mapping[str, Any]) -> AsyncIterator[int]:
        """The ids of one completion, as they come."""
        request = {"model": self.name, "stream": True, "return_token_ids": True, **body}
        try:
            async with self._client.stream("POST", f"{self.url}/completions", json=request) as answer:
                if answer.status_code != 200:
                    log.error(
                        "The token engine answered %d: %.500s", answer.status_code, await answer.aread()
                    )
                    raise EngineFailure(f"The token engine answered with status {answer.status_code}.")
                last = None
                async for line in answer.aiter_lines():
                    for choice in _choices(line):
                        for last in choice.get("token_ids") or ():
                            yield last
                        stop = choice.get("stop_reason")
                        if isinstance(stop, int) and stop != last:  # engines that leave the stop id out
                            yield stop
        except (httpx.HTTPError, ValueError) as error:
            log.error("The token engine at %s failed: %s", self.url, error)
            raise EngineFailure("The token engine does not answer.") from error


def _choices(line: str) -> list[dict[str, Any]]:
    """The choices in a line of server-sent events."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return []
    found = json.loads(data)
    if "error" in found:
        raise ValueError(str(found["error"])[:500])
    return found.get("choices", [])
