"""Second turns and everyday requests: what is asked, what is right, and that nothing of it was trained on."""

import numpy as np

from anytoken.emoji_world import report
from anytoken.emoji_world.dialogues import FIRST, SECOND
from anytoken.emoji_world.directions import DIRECTIONS, read_directions
from anytoken.emoji_world.phrases import phrasings
from anytoken.segments import Image, Text

REQUESTS = "requests->kind"


def pixels(case):
    images = [part for message in case.messages for part in message["content"] if isinstance(part, Image)]
    return [image.pixels.tobytes() for image in images]


def test_the_same_images_are_named_in_the_first_and_the_second_turn(world):
    first, second = (world.cases(DIRECTIONS[name], "test", 9) for name in (FIRST, SECOND))
    assert [one.answer for one in first] == [one.answer for one in second] and len(first) == 9
    assert [one.record["holdout"] for one in second][:3] == ["new image", "after a drawing", "earlier image"]
    for one, other in zip(first, second, strict=True):
        assert len(one.messages) == 1 and [turn["role"] for turn in other.messages] == [
            "user",
            "assistant",
            "user",
        ]
        [image] = pixels(one)
        place = 0 if other.record["holdout"] == "earlier image" else -1
        assert pixels(other)[place] == image
        said = str([part for turn in other.messages for part in turn["content"] if isinstance(part, str)])
        assert other.record["holdout"] == "after a drawing" or one.answer.text not in said


def test_a_model_that_forgets_earlier_images_names_fewer_in_the_second_turn(world, fake_model):
    known = {}
    for case in world.cases(DIRECTIONS[FIRST], "test", 9):
        known[pixels(case)[0]] = case.answer

    def answer(messages, output):
        images = [part for part in messages[-1]["content"] if isinstance(part, Image)]
        return [known[images[0].pixels.tobytes()] if images else Text("nothing")]

    whole = report.evaluate(fake_model(answer), world, [FIRST, SECOND], count=9, progress=False)
    assert "second turn: 66.7 % of the first turn" in report.markdown(whole)
    found = whole["directions"]
    assert found[FIRST]["model"]["value"] == 1.0
    assert found[SECOND]["model"]["value"] == found[SECOND]["share_of_first_turn"] == 0.6667
    assert found[SECOND]["by_holdout"]["earlier image"]["value"] == 0
    assert found[SECOND]["by_holdout"]["new image"]["value"] == 1
    assert "nearest" in found[SECOND] and "majority" in found[SECOND]


def test_requests_are_worded_as_training_never_words_them(world):
    cases = world.cases(DIRECTIONS[REQUESTS], "test", 80)
    assert len(cases) == 80
    purposes = {case.record["holdout"] for case in cases}
    assert {"draw", "animate", "say", "name", "decline", "who"} <= purposes
    kinds = {case.record["holdout"]: case.answer.text for case in cases}
    assert (kinds["draw"], kinds["animate"], kinds["say"], kinds["name"]) == (
        "image",
        "video",
        "speech",
        "text",
    )
    for case in cases:
        if case.record["holdout"] in ("who", "name"):
            said = case.prompt[0].text.casefold()
            known = [one.casefold().strip("?.") for one in phrasings(case.record["holdout"])]
            assert not [one for one in known if said.replace("<image>", "").strip(" ?.") == one]
    again = world.cases(DIRECTIONS[REQUESTS], "test", 80)
    assert [one.prompt for one in again] == [one.prompt for one in cases]


def test_the_kind_of_a_reply_is_what_is_judged_and_the_model_chooses_it(world, fake_model, anything):
    outputs = []

    def always_image(messages, output):
        outputs.append(output)
        return [anything("image")]

    found = report.evaluate(fake_model(always_image), world, [REQUESTS], count=60, progress=False)
    one = found["directions"][REQUESTS]
    assert set(outputs) == {None}
    assert one["by_holdout"]["draw"]["value"] == 1 and one["by_holdout"]["say"]["value"] == 0
    assert one["ceiling"]["value"] == 1 and one["valid"]["value"] == 1
    assert 0 < one["model"]["value"] < 0.5 and {"chance", "majority", "nearest"} <= set(one)


def test_directions_are_read_though_some_names_hold_commas():
    names = "image,image->text, text->image,requests->kind"
    assert read_directions(names) == ["image,image->text", "text->image", "requests->kind"]
    assert read_directions("text->smell") == ["text->smell"]
    assert np.array_equal(read_directions(",".join(DIRECTIONS)), list(DIRECTIONS))
