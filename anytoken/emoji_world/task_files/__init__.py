"""The emoji world's judges for task files (`metrics: world_judge`), over the same sets that the tasks read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anytoken.emoji_world.directions import Direction, EvalExample
from anytoken.emoji_world.tasks import EvalDatasets, Parts
from anytoken.evaluation.suite.metric_base import Judge
from anytoken.evaluation.suite.samples import OTHER, Outcome


def world_judge(sets: Path, judge_steps: int = 1500, seed: int = 0) -> Judge:
    """A function that judges outcomes part by part; None where a judge's dictionary lacks the word that is said.

    The judges are made from the sets when they are first needed.
    """
    world = EvalDatasets(sets, judge_steps, seed)

    def judge(outcomes: Sequence[Outcome]) -> list[Parts | None]:
        return [_parts(world, one) for one in outcomes]

    return judge


def _parts(world: EvalDatasets, outcome: Outcome) -> Parts | None:
    truth = outcome.sample.truth[0][0]
    record = {key: value for key, value in outcome.sample.record.items() if key != OTHER}
    if truth.kind == "speech" and not world.hears(record).knows(record["name"]):
        return None
    direction = Direction("", "", (), truth.kind, "")
    return world.judge(
        direction, EvalExample([], truth, record), outcome.answer[0] if outcome.answer else None
    )
