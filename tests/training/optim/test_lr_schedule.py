"""Schedules: shapes, and what a time limit does to them."""

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


def test_enough_time_changes_nothing() -> None:
    plain, timed = schedule("wsd"), schedule("wsd")
    for step in range(1, 101):
        timed.tick(step, 1.0, max_minutes=10)
    assert not timed.shortened and [plain(step) for step in range(101)] == [
        timed(step) for step in range(101)
    ]


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_short_time_starts_the_decay_and_ends_on_time(kind: str) -> None:
    timed = schedule(kind, steps=1000, decay_fraction=0.25)
    for step in range(1, 1001):
        timed.tick(step, 1.0, max_minutes=1)
        if step >= timed.total:
            break
    assert timed.total == 60 and timed.decay_start == 45
    assert timed(59) < timed(46) < timed(44) and timed(60) == 0


def test_constant_stops_when_the_time_is_over() -> None:
    timed = schedule("constant", steps=1000)
    for step in range(1, 61):
        timed.tick(step, 1.0, max_minutes=1)
    assert timed.total == 60
