"""The thread that owns the model: requests join its running batch, and their tokens leave it one by one.

Web handlers run elsewhere and never touch the model. They submit a job and get tokens through a callback. All
endpoints share one continuous batch (`inference/scheduler.py`), so a request waits for a free row, never for another
one's reply. If a decoding step fails, every running job is decoded again on its own: the one that fails alone is
answered with an error, the others continue, since a reply depends on its own seed only.

A long prompt is read in pieces, one before each decoding step of the others.
Work that is no generation (scores) comes as an iterator and is done in parts, one after each decoding step, so that it
never holds up the replies of others for longer than a part takes. An adapter is a state of the weights, so jobs and
work of different adapters never run together: requests start in the order they came, those of the adapter in use may
overtake others for TURN seconds, and then what runs is finished before the weights change.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from anytoken.inference.api import AnyToken
from anytoken.inference.request import GenerationRequest, Token
from anytoken.inference.scheduler import Scheduler
from anytoken.inference.score import Steps
from anytoken.serving.errors import DeadlinePassed, Unavailable, busy

log = logging.getLogger(__name__)
T = TypeVar("T")
Deliver = Callable[[Token | Exception], None]
TURN = 1.0  # seconds that requests of the adapter in use may overtake those of another


@dataclass(eq=False)
class Job:
    """One reply in the making. `deliver` gets each token, or the error that ended the job, on the worker's thread."""

    request: GenerationRequest
    deliver: Deliver
    deadline: float
    adapter: str | None = None
    delivered: int = 0
    number: int | None = None
    over: bool = False


@dataclass(eq=False)
class Work:
    """Something else that uses the model, in parts; `settle` gets the result or the error.

    alone: it changes the model or its adapters, so nothing else may run.
    """

    steps: Steps[Any]
    settle: Callable[[Exception | None, Any], None]
    adapter: str | None = None
    alone: bool = False


class Worker:
    """Runs the scheduler of one model on a thread of its own."""

    def __init__(
        self, model: AnyToken, max_rows: int, max_waiting: int, max_prefill_tokens: int | None = None
    ) -> None:
        self.model = model
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.max_prefill_tokens = max_prefill_tokens
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0  # jobs and works that are not over
        self._waiting: deque[Job | Work] = deque()  # in the order they came
        self._jobs: dict[int, Job] = {}  # those that run
        self._works: deque[Work] = deque()  # those that run, a part each in turn
        self._scheduler: Scheduler | None = None
        self._turn = 0.0  # when the adapter in use was put in
        self._stopping = False
        self._thread: threading.Thread | None = None

    # ---- called from any thread ----

    def start(self) -> None:
        """Start the thread; also after `stop`."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="anytoken-worker", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End the thread; jobs that are not over get `Unavailable`."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run and how many wait."""
        return min(self._open, self.max_rows), max(0, self._open - self.max_rows)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs, all or none; TooManyRequests if they are more than may wait."""
        self._count(len(jobs))
        for job in jobs:
            self._inbox.put(lambda job=job: self._admit(job))  # type: ignore[misc]

    def _count(self, number: int) -> None:
        with self._lock:
            if number > 0 and self._open + number > self.max_rows + self.max_waiting:
                raise busy(self._open)
            self._open += number

    async def call(self, function: Callable[[], T], alone: bool = False) -> T:
        """What a function that uses the model returns, run between two decoding steps.

        alone: it changes the model, so it waits until nothing else runs.
        """

        def steps() -> Steps[T]:
            return function()
            yield

        return await self.work(steps(), alone=alone)

    async def work(self, steps: Steps[T], adapter: str | None = None, alone: bool = False) -> T:
        """What a generator that uses the model returns; a decoding step of others runs between any two of its parts.

        Cancelling the call drops what is left of it. TooManyRequests and Unavailable as for jobs.
        """
        if not self.alive:
            raise Unavailable()
        self._count(1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(error: Exception | None, result: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future, error, result)

        work = Work(steps, settle, adapter, alone)
        self._inbox.put(lambda: self._waiting.append(work))
        try:
            return await future
        finally:
            self._count(-1)
            if not future.done() or future.cancelled():
                self._inbox.put(lambda: self._drop(work))

    def cancel(self, job: Job) -> None:
        """Drop a job and free its place; nothing is delivered any more."""
        self._inbox.put(lambda: self._finish(job))

    # ---- on the worker's thread ----

    def _run(self) -> None:
        while not self._stopping:
            self._read_inbox(wait=not (self._jobs or self._works or self._waiting))
            if self._stopping:
                break
            self._expire()
            self._take()
            if self._jobs:
                self._step()
            if self._works:
                self._do_part(self._works[0])
        self._end()

    def _end(self) -> None:
        while not self._inbox.empty():  # jobs that came in meanwhile
            if (command := self._inbox.get()) is not None:
                command()
        stopped = Unavailable()
        for one in [*self._jobs.values(), *self._works, *self._waiting]:
            if isinstance(one, Job):
                self._fail(one, stopped)
            else:
                one.settle(stopped, None)
        self._works.clear()
        self._waiting.clear()

    def _read_inbox(self, wait: bool) -> None:
        while wait or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return
            command()
            wait = False

    def _admit(self, job: Job) -> None:
        if not job.over:
            self._waiting.append(job)

    def _take(self) -> None:
        """Start what waits, in the order it came, as far as the adapter in use and free rows allow."""
        left: deque[Job | Work] = deque()
        blocked = False  # something of another adapter has waited long enough
        for one in list(self._waiting):
            running = bool(self._jobs or self._works)
            alone = isinstance(one, Work) and one.alone
            fits = not running or (
                not alone and not self._alone() and one.adapter == self.model.adapters.active
            )
            if blocked or not fits:
                blocked = blocked or alone or self._alone() or time.monotonic() - self._turn > TURN
                left.append(one)
            elif isinstance(one, Work):
                self._begin(one)
            elif len(self._jobs) < self.max_rows:
                self._start(one)
            else:
                left.append(one)
        self._waiting = left

    def _alone(self) -> bool:
        return any(work.alone for work in self._works)

    def _start(self, job: Job) -> None:
        try:
            self._use(job.adapter)
            if self._scheduler is None or self._scheduler.grammar is not self.model.processor.grammar:
                self._scheduler = self.model.engine.scheduler(self.max_rows, self.max_prefill_tokens)
            job.number = self._scheduler.submit(job.request)
            self._jobs[job.number] = job
        except Exception as error:  # a prompt that does not fit is the request's own fault
            self._fail(job, error)

    def _begin(self, work: Work) -> None:
        try:
            if not work.alone:
                self._use(work.adapter)
            self._works.append(work)
        except Exception as error:
            work.settle(error, None)

    def _use(self, adapter: str | None) -> None:
        """Put an adapter into the weights; only called where it is in use already or nothing runs."""
        if adapter != self.model.adapters.active:
            self.model.use_adapter(adapter)
            self._turn = time.monotonic()
        elif not (self._jobs or self._works):
            self._turn = time.monotonic()

    def _do_part(self, work: Work) -> None:
        self._works.rotate(-1)
        try:
            next(work.steps)
        except StopIteration as end:
            self._works.remove(work)
            work.settle(None, end.value)
        except Exception as error:
            self._works.remove(work)
            work.settle(error, None)

    def _drop(self, work: Work) -> None:
        for queue_ in (self._works, self._waiting):
            if work in queue_:
                queue_.remove(work)
        work.steps.close()

    def _step(self) -> None:
        assert self._scheduler is not None
        try:
            tokens = self._scheduler.step()
        except Exception:
            log.exception("A decoding step failed; its requests are decoded again one by one")
            self._isolate()
            return
        for token in tokens:
            self._hand_out(self._jobs[token.row], token)

    def _hand_out(self, job: Job, token: Token) -> None:
        if job.over:
            return
        job.delivered += 1
        job.deliver(token)
        if token.finish_reason is not None:
            self._finish(job)

    def _isolate(self) -> None:
        """Decode each running job alone, skipping the tokens it has delivered; whoever fails gets the error."""
        jobs, self._jobs, self._scheduler = list(self._jobs.values()), {}, None
        for job in jobs:
            known = job.delivered
            try:
                for token in self.model.engine.stream([job.request]):
                    if time.monotonic() > job.deadline:
                        raise DeadlinePassed()
                    if known:
                        known -= 1
                    else:
                        self._hand_out(job, token)
                    self._read_inbox(wait=False)
                    if job.over:
                        break
            except Exception as error:
                self._fail(job, error)

    def _expire(self) -> None:
        now = time.monotonic()
        jobs = [one for one in [*self._jobs.values(), *self._waiting] if isinstance(one, Job)]
        for job in [job for job in jobs if now > job.deadline]:
            self._fail(job, DeadlinePassed())

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.over:
            job.deliver(error)
        self._finish(job)

    def _finish(self, job: Job) -> None:
        if job.over:
            return
        job.over = True
        self._count(-1)
        if job in self._waiting:
            self._waiting.remove(job)
        if job.number is not None and self._jobs.get(job.number) is job:
            del self._jobs[job.number]
            if self._scheduler is not None:
                self._scheduler.cancel(job.number)


def _settle(future: asyncio.Future[Any], error: Exception | None, result: Any) -> None:
    if future.done():  # whoever waited has gone
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
