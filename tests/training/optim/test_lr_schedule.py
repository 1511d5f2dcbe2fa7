"""Schedules: shapes, and what a time limit does to them."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from anytoken.training.config import ScheduleSpec
from anytoken.training.optim.lr_schedule import Schedule


def schedule(kind: str, steps: int = 100, **options: float) -> Schedule:
    return Schedule(ScheduleSpec(kind=kind, **{"warmup_steps": 10, **options}), steps)  # type: ignore[arg-type]


def test_warm_up_is_linear() -> None:
    assert [schedule("constant")(step) for step in (0, 4, 9, 50, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]


def test_wsd_is_flat_then_falls_to_the_end() -> None:
    factors = [schedule("wsd", decay_fraction=0.2)(step) for step in range(101)]
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5) and factors[100] == 0
    assert schedule("wsd", final_fraction=0.1)(100) == pytest.approx(0.1)


def test_cosine() -> None:
    cosine = schedule("cosine", final_fraction=0.1)
    assert cosine(50) == pytest.approx(0.55) and cosine(100) == pytest.approx(0.1)


def run(timed: Schedule, seconds: Callable[[int], float], max_minutes: float | None) -> list[float]:
    """The factors of the steps that are done, in the order of the trainer: the next factor, then the clock."""
    factors, step = [timed(0)], 0
    while step < timed.total:
        step += 1
        factors.append(timed(step))
        timed.tick(step, seconds(step), max_minutes)
    return factors[:step]


KINDS = [("wsd", 0.2), ("wsd", 1.0), ("cosine", 0.2), ("constant", 0.2)]
limits = pytest.mark.parametrize(("kind", "decay_fraction"), KINDS)


@limits
def test_enough_time_changes_nothing(kind: str, decay_fraction: float) -> None:
    plain = schedule(kind, decay_fraction=decay_fraction)
    timed = schedule(kind, decay_fraction=decay_fraction)
    assert run(timed, lambda _: 1.0, 101 / 60) == [plain(step) for step in range(100)]


@limits
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_time_limit_is_kept_and_the_curve_run_through(
    kind: str, decay_fraction: float, share: float
) -> None:
    timed, plain = (schedule(kind, 1000, decay_fraction=decay_fraction) for _ in range(2))
    factors = run(timed, lambda _: 0.5, 1000 * share * 0.5 / 60)
    assert timed.total == len(factors) == pytest.approx(1000 * share, abs=1)
    for step in range(10, timed.total, 13):
        assert factors[step] == pytest.approx(plain(round(step / share)), abs=0.02)


@limits
def test_a_limit_is_kept_whatever_steps_take(kind: str, decay_fraction: float) -> None:
    """A slow first step, ten times slower ones once the decay has begun, and a pause now and then."""

    def seconds(step: int) -> float:
        return 20.0 if step == 1 else 30.0 if step % 100 == 0 else 0.1 if step < 850 else 1.0

    timed = schedule(kind, 1000, decay_fraction=decay_fraction)
    factors = run(timed, seconds, 6)
    assert 850 < timed.total < 1000 and 360 - 30 < timed.seconds <= 360 + 1
    if kind != "constant":
        assert factors[-1] < 0.1
        assert max(b / a for a, b in pairwise(factors[10:])) < 1.2


def test_a_limit_that_begins_with_a_resumed_run_counts_all_its_time() -> None:
    timed = schedule("wsd", 1000)
    for step in range(1, 901):  # the decay has begun
        timed.tick(step, 1.0, None)
    timed.tick(901, 1.0, 920 / 60)
    assert timed.total == 1000 and timed.expected == pytest.approx(920)
    timed.tick(902, 1.0, 5)
    assert timed.total == 902
