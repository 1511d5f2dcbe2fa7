"""The directions of world.yaml: as task files they ask the same questions and count the same answers as right."""

import pytest

from anytoken.emoji_world import report
from anytoken.emoji_world.directions import CODED, DIRECTIONS, ORDER
from anytoken.emoji_world.task_files import world_judge
from anytoken.evaluation.suite.metrics import Tools
from anytoken.evaluation.suite.runner import score
from anytoken.evaluation.suite.samples import Outcome, TaskSet
from anytoken.evaluation.suite.schema import load_tasks
from anytoken.utils.errors import EvaluationError

TASKS = {one.name: one for one in load_tasks(["world"])}


def test_every_direction_is_a_task_or_is_made_by_code():
    assert sorted(ORDER) == sorted([*TASKS, *(one.name for one in CODED)]) and len(TASKS) == 13


@pytest.mark.parametrize("name", TASKS)
def test_a_task_asks_what_its_direction_asks(name, world, sets):
    cases = world.cases(DIRECTIONS[name], "test", 200)
    samples = TaskSet(TASKS[name], sets).samples()
    if DIRECTIONS[name].target == "speech":  # a dictionary knows which words a judge can hear: no file does
        samples = [one for one in samples if world.hears(one.record).knows(one.record["name"])]
    assert [one.prompt for one in samples] == [case.prompt for case in cases]
    assert [one.truth[0][0] for one in samples] == [case.answer for case in cases]


def test_a_task_counts_the_answers_as_right_that_its_direction_does(world, sets):
    tools = Tools(sets, judge=world_judge(sets, world.judge_steps))
    for name in ("text->image", "image->text", "speech->image", "dna->text"):
        cases = world.cases(DIRECTIONS[name], "test", 200)
        data = TaskSet(TASKS[name], sets)
        given = [case.answer for case in [*cases[:1], *cases[2:], *cases[1:2]]]  # the first is right
        outcomes = [Outcome(one, answer=(two,)) for one, two in zip(data.samples(), given, strict=True)]
        found, _ = score(TASKS[name], data, outcomes, tools, resamples=10)
        wanted = report._judge_all(world, DIRECTIONS[name], cases, given)
        for part in {part for parts in wanted for part in parts}:
            mean = sum(parts.get(part, 0.0) for parts in wanted) / len(wanted)
            assert found["metrics"][part]["model"]["value"] == pytest.approx(mean, abs=1e-5), (name, part)


def test_without_the_judges_the_metric_says_what_it_needs(sets):
    data = TaskSet(TASKS["dna->text"], sets)
    with pytest.raises(EvaluationError, match="judges of the emoji world"):
        score(TASKS["dna->text"], data, [Outcome(one) for one in data.samples()], Tools(sets), resamples=10)
