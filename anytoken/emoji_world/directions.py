"""The evaluated directions as data: records, prompt and answer.

Everything else is the same for all: the model's answers, the truth (the judge's ceiling), a random training answer
(chance), the most frequent training answer (majority, for text) and the answer of the nearest training prompt all go
through one judge.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anytoken.evaluation.suite.schema import read_tasks
from anytoken.evaluation.suite.template import fields
from anytoken.segments import KINDS, Segment

Record = dict[str, Any]
IMAGES, VIDEOS, SPEECH = "emoji/images.jsonl", "emoji/videos.jsonl", "speech/speech.jsonl"
WORDS, GENES = "words/words.jsonl", "dna/genes.jsonl"


@dataclass(frozen=True)
class Direction:
    """One direction: `sources` of a record are the prompt, `target` is the answer's kind.

    file: the records. pair: another file whose record with the same name provides the answer. words: text after the
    media. held_out: the hold-outs of the examples. free: the model chooses the kind of its answer, and the kind is
    judged. how: another way to create the examples or to score, by name.
    """

    name: str
    file: str
    sources: tuple[str, ...]
    target: str
    held_out: str
    pair: str | None = None
    words: str = ""
    twice: bool = False
    free: bool = False
    how: str = ""


def _from_file() -> dict[str, Direction]:
    """The directions of the task file world.yaml (also `anytoken eval --task world`)."""
    found = {}
    for task in read_tasks(Path(__file__).parent / "task_files" / "world.yaml"):
        sources = [field.kind for field in fields(task.prompt[0].content) if field.name in KINDS]
        pair = task.join.data if task.join else None
        assert isinstance(task.output, str)
        found[task.name] = Direction(
            task.name, task.data, tuple(sources), task.output, task.description, pair=pair
        )
    return found


# Cases that code draws and words; the task files dialogue.yaml and dna/product_ranking.yaml draw theirs themselves.
CODED = (
    Direction("image,image->text", IMAGES, ("image",), "text", "two unseen drawings",
              words="What are these?", twice=True),
    Direction("turn1:image->text", IMAGES, ("image",), "text", "drawing or background unseen", how="turns"),
    Direction("turn2:image->text", IMAGES, ("image",), "text", "drawing or background unseen", how="turns"),
    Direction("requests->kind", IMAGES, (), "text", "phrasings never used in training", free=True, how="requests"),
    Direction("gene->product", GENES, ("dna",), "text", "genes of unseen products", how="ranked"),
)  # fmt: skip
ORDER = (
    "text->image", "image->text", "text->speech", "speech->text", "speech->image", "image->speech", "text->video",
    "video->text", "image->video", "dna->text", "text->dna", "image,image->text", "word->speech", "speech->word",
    "turn1:image->text", "turn2:image->text", "requests->kind", "gene->product",
)  # fmt: skip
_FOUND = _from_file() | {one.name: one for one in CODED}
DIRECTIONS: dict[str, Direction] = {name: _FOUND[name] for name in ORDER}


def read_directions(names: str) -> list[str]:
    """Names of directions, separated by commas, which also occur in some names ("image,image->text")."""
    longest_first = sorted(DIRECTIONS, key=len, reverse=True)
    pattern = re.compile(r"\s*(" + "|".join(map(re.escape, longest_first)) + r"|[^,]*)\s*(?:,|$)")
    found = [one for one in pattern.findall(names) if one]
    return [one.strip() for one in found]


@dataclass(frozen=True)
class EvalExample:
    """One question: the prompt, the true answer, and the record (with what the judges need) it comes from.

    messages: the conversation to use instead of the prompt, which then only serves to find the nearest training prompt.
    """

    prompt: list[Segment]
    answer: Segment
    record: Record
    messages: list[dict[str, Any]] | None = None

    @property
    def asked(self) -> list[Any]:
        """The input of the model."""
        return self.messages or self.prompt
