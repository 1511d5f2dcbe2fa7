"""The thread that owns the model: requests join its running batch, and their tokens leave it one by one.

Web handlers run elsewhere and never touch the model. They submit a job and get tokens through a callback. All
endpoints share one continuous batch (`inference/scheduler.py`), so a request waits for a free row, never for another
one's reply. If a decoding step fails, every running job is decoded again on its own: the one that fails alone is
answered with an error, the others go on where they were, since a reply depends on its own seed only.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anytoken.inference.api import AnyToken
from anytoken.inference.scheduler import Scheduler, Token

log = logging.getLogger(__name__)
T = TypeVar("T")
Deliver = Callable[[Token | Exception], None]


class QueueFull(RuntimeError):
    """More requests wait than the server allows."""


class DeadlineExceeded(RuntimeError):
    """A request took longer than the server allows."""


class Stopped(RuntimeError):
    """The server is shutting down."""


@dataclass(eq=False)
class Job:
    """One reply in the making. `deliver` gets each token, or the error that ended the job, on the worker's thread."""

    prompt: Sequence[int]
    options: Mapping[str, Any]
    deliver: Deliver
    deadline: float
    delivered: int = 0
    number: int | None = None
    over: bool = False
    submitted: float = field(default_factory=time.monotonic)


class Worker:
    """Runs the scheduler of one model on a thread of its own."""

    def __init__(self, model: AnyToken, max_rows: int, max_waiting: int) -> None:
        self.model = model
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0  # jobs that are not over
        self._jobs: dict[int, Job] = {}
        self._scheduler: Scheduler | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    # ---- called from any thread ----

    def start(self) -> None:
        """Start the thread; also after `stop`."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="anytoken-worker", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End the thread; jobs that are not over get `Stopped`."""
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
        """How many jobs run and how many wait."""
        return min(self._open, self.max_rows), max(0, self._open - self.max_rows)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs, all or none; QueueFull if they are more than may wait."""
        with self._lock:
            if self._open + len(jobs) > self.max_rows + self.max_waiting:
                raise QueueFull(f"{self._open} requests are running or waiting.")
            self._open += len(jobs)
        for job in jobs:
            self._inbox.put(lambda job=job: self._admit(job))  # type: ignore[misc]

    async def call(self, function: Callable[[], T]) -> T:
        """What a function that uses the model returns, run between two decoding steps."""
        if not self.alive:
            raise Stopped("The server is shutting down.")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                loop.call_soon_threadsafe(_settle, future, error, None)
            else:
                loop.call_soon_threadsafe(_settle, future, None, result)

        self._inbox.put(run)
        return await future

    def cancel(self, job: Job) -> None:
        """Drop a job and free its place; nothing is delivered any more."""
        self._inbox.put(lambda: self._finish(job))

    # ---- on the worker's thread ----

    def _run(self) -> None:
        while not self._stopping:
            self._read_inbox(wait=not self._jobs)
            if self._stopping:
                break
            self._expire()
            if self._jobs:
                self._step()
        for job in list(self._jobs.values()):
            self._fail(job, Stopped("The server is shutting down."))
        while not self._inbox.empty():  # jobs that came in meanwhile
            if (command := self._inbox.get()) is not None:
                command()

    def _read_inbox(self, wait: bool) -> None:
        while wait or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return
            command()
            wait = False

    def _admit(self, job: Job) -> None:
        if job.over:
            return
        if self._stopping:
            self._fail(job, Stopped("The server is shutting down."))
            return
        try:
            self._schedule(job)
        except Exception as error:  # a prompt that does not fit is the request's own fault
            self._fail(job, error)

    def _schedule(self, job: Job) -> None:
        if self._scheduler is None:
            self._scheduler = Scheduler(self.model.engine, self.max_rows)
        job.number = self._scheduler.submit(job.prompt, **job.options)
        self._jobs[job.number] = job

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
                for token in self.model.engine.stream([job.prompt], **_as_stream(job.options)):
                    if time.monotonic() > job.deadline:
                        raise DeadlineExceeded("The request took too long.")
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
        for job in [job for job in self._jobs.values() if now > job.deadline]:
            self._fail(job, DeadlineExceeded("The request took too long."))

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.over:
            job.deliver(error)
        self._finish(job)

    def _finish(self, job: Job) -> None:
        if job.over:
            return
        job.over = True
        with self._lock:
            self._open -= 1
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


def _as_stream(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `Scheduler.submit` as those of `Engine.stream` for one prompt."""
    same = {key: value for key, value in options.items() if key not in ("plan", "draw")}
    return {**same, "plans": [options["plan"]], "rows": [options["draw"]]}
