"""The load test: every request is counted, and the server it starts is gone afterwards."""

import pytest

from anytoken.benchmarks.serve import bench_serve, running_server
from anytoken.utils.errors import EvaluationError


def test_every_request_is_answered_or_refused():
    figures = bench_serve("mini", "a fox", "text", clients=2, requests=4)
    alone, together, overload = figures["rows"]
    assert (alone["answered"], together["answered"]) == (2, 4) and alone["refused"] == together[
        "refused"
    ] == 0
    assert overload["answered"] + overload["refused"] == overload["requests"] == 32
    assert overload["answered"] >= 4 and overload["sent/s"] == pytest.approx(2 * together["requests/s"])
    assert (
        alone["p50_s"] <= alone["p99_s"] and len(figures["memory_mb"]) == 3 and min(figures["memory_mb"]) > 0
    )


def test_a_server_that_does_not_start_is_an_error():
    with pytest.raises(EvaluationError, match="did not start"), running_server("no-such-model"):
        pass
