"""A server on this machine under load: throughput and latency of one client and of many, and more than it can take.

The server is a process of its own (`anytoken serve`), reached through its loopback address only. Requests are fixed in
number: first one client, then many clients in parallel, then for a while twice as many a second as the many got
answered, so that the queue fills up: the rest is refused with 429, and none may be lost.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import quantiles
from typing import IO, Any

from anytoken.benchmarks.harness import Figures
from anytoken.utils.errors import EvaluationError

START_SECONDS = 120
OVERLOAD = 16  # requests for each place, sent at twice the sustainable rate: half of them are more than can be answered


@contextmanager
def running_server(
    model: str, *options: str, log: IO[str] | None = None, log_level: str = "error"
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Base URL and process of a server with these options of `anytoken serve`; log: where stderr goes."""
    import httpx

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "anytoken", "serve", model, "--port", str(port), *options]
    process = subprocess.Popen([*command, "--log-level", log_level], stdout=subprocess.DEVNULL, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise EvaluationError(f"The server did not start: {' '.join(command)}")
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def bench_serve(model: str, prompt: str, kind: str, clients: int, requests: int) -> Figures:
    """One row per load; EvaluationError if any request is lost or fails otherwise than by 429.

    memory_mb: the server's resident memory before, halfway through and after the many clients' requests.
    """
    limits = ["--set", f"max_rows={clients}", "--set", f"max_waiting={clients}"]
    with running_server(model, "--name", "bench", *limits) as (url, process):
        asyncio.run(_load(url, prompt, kind, clients, 2 * clients))  # warm-up
        alone = asyncio.run(_load(url, prompt, kind, 1, max(2, requests // clients)))
        memory = [_megabytes(process.pid)]
        together = asyncio.run(
            _load(url, prompt, kind, clients, requests, lambda: memory.append(_megabytes(process.pid)))
        )
        memory.append(_megabytes(process.pid))
        rate = 2 * together["requests/s"]
        overload = asyncio.run(_load(url, prompt, kind, None, OVERLOAD * clients, rate=rate))
    rows = [alone, together, overload]
    for row in rows:
        row["speed"] = row["requests/s"] / alone["requests/s"]
        if row["answered"] + row["refused"] != row["requests"] or (row is not overload and row["refused"]):
            raise EvaluationError(f"Requests were lost or failed: {row}")
    return {
        "model": model, "prompt": prompt, "output": kind, "memory_mb": memory,
        "cores": os.cpu_count(), "rows": rows,
    }  # fmt: skip


async def _load(
    url: str,
    prompt: str,
    kind: str,
    clients: int | None,
    requests: int,
    halfway: Callable[[], None] = lambda: None,
    rate: float = 0.0,
) -> dict[str, Any]:
    """Send `requests` requests from `clients` clients at once and time each; `halfway` is called in the middle.

    clients None: a client for each request, which come `rate` a second whatever becomes of those before.
    """
    import httpx

    numbers = iter(range(requests))
    seconds: list[float] = []
    refused = 0

    async def client(http: httpx.AsyncClient, wait: float) -> None:
        nonlocal refused
        await asyncio.sleep(wait)
        for number in numbers:
            if number == requests // 2:
                halfway()
            body = {
                "model": "bench", "messages": [{"role": "user", "content": prompt}], "modalities": [kind],
                "seed": number,
            }  # fmt: skip
            began = time.perf_counter()
            answer = await http.post("/v1/chat/completions", json=body)
            if answer.status_code == 429:
                refused += 1
            elif answer.status_code == 200:
                seconds.append(time.perf_counter() - began)
            if clients is None:
                return

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        began = time.perf_counter()
        waits = [number / rate for number in range(requests)] if clients is None else [0.0] * clients
        await asyncio.gather(*(client(http, wait) for wait in waits))
        taken = time.perf_counter() - began
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return {
        "clients": clients, "sent/s": rate or None, "requests": requests, "answered": len(seconds), "refused": refused,
        "requests/s": len(seconds) / taken, "p50_s": cuts[49], "p99_s": cuts[98],
    }  # fmt: skip


def _megabytes(pid: int) -> float:
    """Resident memory of a process."""
    import psutil  # type: ignore[import-untyped]

    return round(psutil.Process(pid).memory_info().rss / 2**20, 1)
