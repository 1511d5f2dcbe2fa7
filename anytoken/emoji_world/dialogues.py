"""Examples beyond one medium and one answer: second turns, and requests in everyday words.

They use the same code as the training conversations (`anytoken.emoji_world.instruct`), on records of the test split;
everyday requests use phrasings that do not occur in training.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from anytoken.data.records import open_media
from anytoken.emoji_world.directions import IMAGES, EvalExample
from anytoken.emoji_world.instruct import ABOUT, DECLINED, REQUESTS, Maker
from anytoken.emoji_world.phrases import DOCUMENTED, phrasings
from anytoken.segments import KINDS, Segment, Text

if TYPE_CHECKING:
    from anytoken.emoji_world.tasks import EvalDatasets

Message = dict[str, Any]
FIRST, SECOND = "turn1:image->text", "turn2:image->text"
QUESTION, [LOOK_BACK] = "What is this?", DOCUMENTED["look_back"]


def requests(world: "EvalDatasets", split: str, count: int, seed: int) -> list[EvalExample]:
    """Requests of every purpose in turn, for the test split in held-out phrasings; the answer is the kind as a word."""
    maker = Maker(world.sets, world.sets, split, seed)
    purposes = [one for one in maker.single if phrasings(one, held_out=True)]
    cases: list[EvalExample] = []
    tries = 0
    while len(cases) < count and tries < 10 * count:
        purpose = purposes[tries % len(purposes)]
        tries += 1
        messages: list[Message] = getattr(maker, purpose)()
        if messages:
            opened = _open(world, messages[:1])
            words = " ".join(getattr(one, "text", f"<{one.kind}>") for one in opened[0]["content"])
            answer = Text(" ".join(REQUESTS[purpose].kinds))
            cases.append(EvalExample([Text(words)], answer, {"holdout": purpose}, opened))
    return cases


def turns(world: "EvalDatasets", split: str, count: int, seed: int, second: bool) -> list[EvalExample]:
    """Images to name, the same ones in the first and in the second turn.

    Second turns alternate between an image after other talk ("new image"), an image after a drawing ("after a
    drawing"), and a question about the image of the first turn ("earlier image").
    """
    records = [one for one in world.records(IMAGES) if one.get("split") == split]
    order = np.random.default_rng((seed, len(split))).permutation(len(records))
    cases = []
    for place, index in enumerate(order[:count]):
        record, other = records[index], records[order[(place + 1) % len(order)]]
        image, another = (world.media(IMAGES, one, "image") for one in (record, other))
        name = Text(str(record["text"]).split(",")[0])
        why, messages = "first turn", _chat([image, QUESTION])
        if second:
            why, messages = [
                ("new image", _chat(["Who are you?"], [ABOUT], [image, QUESTION])),
                ("after a drawing", _chat([f"Draw {other['text']}"], [another], [image, QUESTION])),
                ("earlier image", _chat([image, "What's the weather?"], [DECLINED], [LOOK_BACK])),
            ][place % 3]
        cases.append(EvalExample([image], name, {"name": record["name"], "holdout": why}, messages))
    return cases


def _chat(*contents: list[Any]) -> list[Message]:
    return [
        {"role": ("user", "assistant")[place % 2], "content": content}
        for place, content in enumerate(contents)
    ]


def _open(world: "EvalDatasets", messages: list[Message]) -> list[Message]:
    """Messages of a data set, whose media are paths below the sets, with segments."""

    def segment(part: dict[str, str]) -> Segment:
        kind = part["type"]
        return Text(part["text"]) if kind == "text" else open_media(part[kind], KINDS[kind], world.sets)

    return [{**one, "content": [segment(part) for part in one["content"]]} for one in messages]
