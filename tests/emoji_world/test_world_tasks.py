"""The directions of world.yaml: as task files they ask the same questions and count the same answers as right."""

import pytest

from anytoken.emoji_world import report
from anytoken.emoji_world.directions import CODED, DIRECTIONS, ORDER
from anytoken.emoji_world.instruct import ABOUT, DECLINED, REQUESTS, build_instruct
from anytoken.emoji_world.phrases import DOCUMENTED, phrasings
from anytoken.emoji_world.task_files import world_judge
from anytoken.evaluation.suite.metrics import Tools
from anytoken.evaluation.suite.runner import score
from anytoken.evaluation.suite.samples import Outcome, TaskSet
from anytoken.evaluation.suite.schema import load_tasks
from anytoken.segments import Text
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


def test_the_best_of_several_are_other_replies_to_the_same_questions():
    for task in load_tasks(["best_of"]):
        plain = TASKS[task.name.removesuffix(", best of 8")]
        for name in ("data", "split", "count", "prompt", "answer", "metrics", "join", "where"):
            assert getattr(task, name) == getattr(plain, name)
        assert task.decoding.options == {"best_of": 8, "rerank": "prompt", "temperature": 0.5}


def test_dialogues_as_task_files_ask_what_training_words(sets):
    tasks = {one.name: one for one in load_tasks(["dialogue"])}
    new, drawn, earlier = (one for name, one in tasks.items() if name.startswith("turn2"))
    for one in (tasks["image,image->text"], tasks["turn1:image->text"], new, drawn, earlier):
        for sample in TaskSet(one, sets).samples():
            assert sample.record["split"] == sample.record["other"]["split"] == "test"
            assert sample.truth_text.startswith(sample.record["text"].split(",")[0])
    assert TaskSet(new, sets).samples()[0].messages[1]["content"] == [Text(ABOUT)]
    assert TaskSet(earlier, sets).samples()[0].messages[1]["content"] == [Text(DECLINED)]
    said = DOCUMENTED["look_back"][0]
    assert TaskSet(earlier, sets).samples()[0].messages[2]["content"] == [Text(said)]
    assert TaskSet(drawn, sets).samples()[0].messages[1]["content"][0].kind == "image"
    requests = tasks["requests->kind"]
    worded = [name for name in REQUESTS if phrasings(name, held_out=True)]
    assert set(requests.where["purpose"]) >= set(worded) and set(requests.where["purpose"]) <= set(REQUESTS)
    build_instruct(sets, sets / "conversations", count=200, progress=False)
    data = TaskSet(requests, sets)
    outcomes = [Outcome(one, answer=tuple(one.truth[0])) for one in data.samples()]
    found, _ = score(requests, data, outcomes, Tools(sets), resamples=10)
    assert len(outcomes) > 2 and found["metrics"]["kinds"]["model"]["value"] == 1


def test_the_retrieval_tasks_find_items_of_the_test_split(sets):
    for task in load_tasks(["retrieval"]):
        data = TaskSet(task, sets)
        samples = data.samples()
        items, right = data.items(samples)
        assert items and all(right)
        joined = [one.record["other"] for one in samples if task.join]
        assert all(one["split"] == "test" for one in joined)


def test_without_the_judges_the_metric_says_what_it_needs(sets):
    data = TaskSet(TASKS["dna->text"], sets)
    with pytest.raises(EvaluationError, match="needs a judge"):
        score(TASKS["dna->text"], data, [Outcome(one) for one in data.samples()], Tools(sets), resamples=10)
