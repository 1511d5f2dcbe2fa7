"""Run a function over many jobs in other processes, on this machine or on a Ray cluster.

Results are yielded as they finish. Only a few jobs are queued ahead of the workers, so that a source of any size never
has to fit in memory. Every worker computes with one thread, and so does a run without workers: sums over another
number of threads differ in their last bits, which can change a code.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import Any, Literal, TypeVar

import torch

from anytoken.utils.errors import DataError

Engine = Literal["local", "ray"]
Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2  # jobs in flight for each worker
_shared: list[Any] = []  # what this process was started with


def run(
    work: Callable[[Any, Job], Result], shared: Any, jobs: Iterable[Job], workers: int, engine: str = "local"
) -> Iterator[Result]:
    """Yield ``work(shared, job)`` for each job, as they finish; ``shared`` is sent to each worker once.

    workers: processes on this machine, or concurrent tasks on the cluster that RAY_ADDRESS names (without it, Ray
    starts on this machine). RequestError for an unknown engine, or if Ray is not installed.
    """
    if engine == "ray":
        return _run_on_ray(work, shared, jobs, workers)
    if engine != "local":
        raise DataError(f"unknown engine {engine!r}; choose from local, ray")
    return _run_here(work, shared, jobs) if workers == 1 else _run_in_pool(work, shared, jobs, workers)


def _run_here(work: Callable[[Any, Job], Result], shared: Any, jobs: Iterable[Job]) -> Iterator[Result]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            yield work(shared, job)
    finally:
        torch.set_num_threads(threads)


def _run_in_pool(
    work: Callable[[Any, Job], Result], shared: Any, jobs: Iterable[Job], workers: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # forking after torch used its threads can deadlock
    left = iter(jobs)
    with ProcessPoolExecutor(workers, context, _start_worker, (shared,)) as pool:
        flying: set[Future[Result]] = set()
        try:
            while True:
                flying |= {
                    pool.submit(_work, work, job) for job in islice(left, AHEAD * workers - len(flying))
                }
                if not flying:
                    return
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                for one in done:
                    yield one.result()
        finally:
            for one in flying:
                one.cancel()


def _start_worker(shared: Any) -> None:
    torch.set_num_threads(1)
    _shared[:] = [shared]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent: a killed parent cannot stop its workers, which would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(work: Callable[[Any, Job], Result], job: Job) -> Result:
    return work(_shared[0], job)


def _run_on_ray(
    work: Callable[[Any, Job], Result], shared: Any, jobs: Iterable[Job], workers: int
) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise DataError("the engine ray needs Ray: pip install 'anytoken[ray]'") from error
    if not ray.is_initialized():
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **here)
    remote = ray.remote(num_cpus=1)(_work_on_ray)
    flying: list[Any] = []
    sent, left = ray.put(shared), iter(jobs)
    while True:
        flying += [remote.remote(work, sent, job) for job in islice(left, AHEAD * workers - len(flying))]
        if not flying:
            return
        done, flying = ray.wait(flying)
        yield from ray.get(done)


def _work_on_ray(work: Callable[[Any, Job], Result], shared: Any, job: Job) -> Result:
    torch.set_num_threads(1)
    return work(shared, job)
