"""Scores: a model that knows the answers reaches the ceiling, an ignorant one nothing; figures reach the pages."""

import numpy as np
import pytest

from anytoken.emoji_world import report
from anytoken.emoji_world.directions import DIRECTIONS
from anytoken.emoji_world.tasks import (
    EvalDatasets,
    features,
)
from anytoken.inference.best_of import BestOf
from anytoken.segments import Text
from anytoken.utils.errors import EvaluationError

PLAIN = {
    name: one for name, one in DIRECTIONS.items() if not one.how
}  # the others: test_dialogues, test_products
DEAF = [name for name, one in PLAIN.items() if one.target != "speech"]  # tones are no words


def knowing(world, fake_model):
    """A model that has seen the test cases: it finds the prompt among them."""
    known = {}
    for direction in PLAIN.values():
        cases = world.cases(direction, "test", 50)
        known[direction.target, len(known)] = (
            cases,
            features([case.prompt for case in cases]) if cases else None,
        )

    def answer(prompt, output):
        for (target, _), (cases, _) in known.items():
            for case in cases if target == output else []:
                if len(case.prompt) == len(prompt) and all(
                    a.kind == b.kind
                    and np.array_equal(features([[a]]), features([[b]]))
                    and getattr(a, "text", None) == getattr(b, "text", None)
                    for a, b in zip(case.prompt, prompt, strict=True)
                ):
                    return [case.answer]
        raise AssertionError("asked something that is no test case")

    return fake_model(answer)


def test_knowing_all_is_the_ceiling_and_knowing_nothing_is_nothing(world, fake_model, ignorant):
    best = report.evaluate(knowing(world, fake_model), world, DEAF, count=20, progress=False)
    worst = report.evaluate(ignorant, world, DEAF, count=20, progress=False)
    assert set(best["directions"]) == set(DEAF) and best["left_out"] == []
    for name in DEAF:
        one, other = best["directions"][name], worst["directions"][name]
        assert one["model"] == one["ceiling"] and one["valid"]["value"] == 1, name
        assert other["model"]["value"] <= min(one["model"]["value"], 0.5), name
        assert other["valid"]["value"] == 1 and not other["better"], name
        assert {"chance", "nearest"} <= set(one), name
    assert set(best["directions"]["image->text"]["by_holdout"]) == {"pair", "style"}
    for name in ("image->text", "speech->text", "dna->text"):
        assert best["directions"][name]["ceiling"]["value"] == 1, name


def test_single_replies_are_judged_beside_the_best_of_several(world, fake_model, anything):
    cases = {case.prompt[0].text: case.answer for case in world.cases(DIRECTIONS["text->image"], "test", 20)}
    model = fake_model(
        lambda prompt, output: [cases[prompt[0].text]], single=lambda prompt, output: [anything(output)]
    )
    model.best_of = {("text", "image"): BestOf(5, 1.0)}
    found = report.evaluate(model, world, ["text->image"], count=20, progress=False)
    one = found["directions"]["text->image"]
    assert one["model"] == one["ceiling"] and one["best_of"]["replies"] == 5
    assert one["best_of"]["single"]["right"]["value"] == 0
    assert "text->image 5 replies, 0.0 % (0" in report.markdown(found)
    model.best_of = {("text", "speech"): BestOf(5, 1.0)}
    found = report.evaluate(model, world, ["text->image"], count=20, progress=False)
    assert "best_of" not in found["directions"]["text->image"] and "replies" not in report.markdown(found)


def test_cases_are_held_out_repeatable_and_differ_from_training(world):
    for direction in PLAIN.values():
        cases = world.cases(direction, "test", 5)
        assert cases, direction.name
        again = world.cases(direction, "test", 5)
        assert [case.record for case in cases] == [case.record for case in again]
        train = {str(case.record) for case in world.cases(direction, "train", 1000) if "split" in case.record}
        assert not train & {str(case.record) for case in cases}


def test_a_reply_that_is_cut_short_or_of_another_kind_is_not_valid(world, fake_model, anything):
    direction = DIRECTIONS["text->image"]
    model = fake_model(lambda prompt, output: [anything("image")])
    reply = model.generate([Text("x")], "image")
    assert report.is_valid(model, direction, reply)
    reply.finish_reason = "length"
    assert not report.is_valid(model, direction, reply)
    reply.finish_reason, reply.steps = "stop", [Text("a step")]
    assert not report.is_valid(model, direction, reply)  # its ids hold no step
    wrong = fake_model(lambda prompt, output: [Text("an image")])
    assert not report.is_valid(wrong, direction, wrong.generate([Text("x")], "image"))
    assert world.judge(direction, world.cases(direction, "test", 1)[0], Text("an image")) == {"right": 0.0}


def test_mistakes_are_named(world, ignorant, tmp_path):
    with pytest.raises(EvaluationError, match="text->smell"):
        report.evaluate(ignorant, world, ["text->smell"])
    with pytest.raises(EvaluationError, match="holds no records"):
        report.evaluate(ignorant, EvalDatasets(tmp_path), progress=False)
    with pytest.raises(EvaluationError, match="anytoken data"):
        EvalDatasets(tmp_path).records("emoji/images.jsonl")


def test_a_report_is_saved_read_and_filled_into_a_page(world, ignorant, tmp_path):
    found = report.evaluate(ignorant, world, ["dna->text"], count=5, progress=False)
    path = report.save(found, tmp_path / "deep" / "scores.json")
    assert report.read(path) == found and list(path.parent.iterdir()) == [path]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scores -->\nold\n<!-- /scores -->\nafter\n")
    report.fill(page, found)
    once = page.read_text()
    report.fill(page, found)
    assert page.read_text() == once and once.startswith("before\n") and once.endswith("\nafter\n")
    assert (
        "old" not in once and "| dna->text |" in once and "Not better than every baseline: dna->text" in once
    )
    page.write_text("no markers")
    with pytest.raises(EvaluationError, match="no place"):
        report.fill(page, found)
    path.write_text("[]")
    with pytest.raises(EvaluationError, match="not an evaluation report"):
        report.read(path)


def test_the_page_says_where_a_yes_means_little():
    def direction(value, low, near_high, near_concept):
        total = {"total": 200}
        model, near = (
            {"value": value, "low": low, "high": 0.9},
            {"value": 0.0, "low": 0.0, "high": near_high},
        )
        return {
            "measure": "right", "better": True, "parts": {"concept": 0.06}, "ceiling": model | total,
            "model": model | total, "nearest": near | total, "valid": {"value": 1.0} | total,
            "parts_of_others": {"nearest": {"concept": near_concept}},
        }  # fmt: skip

    found = {"seed": 0, "commit": "abc", "machine": "m", "directions": {}}
    found["directions"] = {
        "thin": direction(0.02, 0.01, 0.019, 0.8),
        "clear": direction(0.5, 0.4, 0.019, 0.3),
    }
    page = report.markdown(found)
    assert "overlap: thin.\n" in page
    assert "thin 6.0 % (80.0 %), clear 6.0 % (30.0 %)." in page


def test_every_answerer_has_its_parts(world, ignorant):
    found = report.evaluate(ignorant, world, ["text->image"], count=5, progress=False)
    others = found["directions"]["text->image"]["parts_of_others"]
    assert set(others) == {"ceiling", "chance", "nearest"}
    parts = {"concept", "concept top-5", "concept, other judge", "style", "background"}
    assert set(others["nearest"]) == parts


def test_parts_have_intervals_and_hold_outs_of_their_own(world, fake_model):
    found = report.evaluate(knowing(world, fake_model), world, ["text->image"], count=20, progress=False)
    one = found["directions"]["text->image"]
    assert one["part_shares"]["concept"]["value"] == 1 and one["part_shares"]["concept"]["low"] < 1
    assert {name: parts["concept"]["value"] for name, parts in one["parts_by_holdout"].items()} == {
        "pair": 1.0,
        "style": 1.0,
    }
    page = report.markdown(found)
    assert "| direction | background | concept |" in page
    totals = {name: parts["concept"]["total"] for name, parts in one["parts_by_holdout"].items()}
    assert f"| text->image | pair | {totals['pair']} | 100.0 % (" in page


def test_controls_are_refused(world, ignorant):
    names = ["text->image", "text->video", "image->text"]
    found = report.evaluate(ignorant, world, names, count=20, progress=False)["directions"]
    assert set(found["text->video"]["controls"]) == {"shuffled", "noise", "grey"}
    for name in names:
        for control, score in found[name]["controls"].items():
            assert score["value"] <= 0.4, (name, control)  # three concepts: a third is right by chance
