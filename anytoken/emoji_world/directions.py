"""The directions a model is asked in, as data: which records, what of them is the prompt, what the answer.

Everything else is the same for all: the model's answers, the truth (the judge's ceiling), a random training answer
(chance), the most frequent training answer (majority, for text) and the answer of the nearest training prompt all go
through one judge.
"""

import re
from dataclasses import dataclass
from typing import Any

from anytoken.segments import Segment

Record = dict[str, Any]
IMAGES, VIDEOS, JOINT = "emoji/images.jsonl", "emoji/videos.jsonl", "emoji/joint.jsonl"
SPEECH, TRANSLATE = "speech/speech.jsonl", "dna/translate.jsonl"
WORDS, GENES = "words/words.jsonl", "dna/genes.jsonl"


@dataclass(frozen=True)
class Direction:
    """What is asked of a model: `sources` of a record are the prompt, `target` is the answer's kind.

    file: the records. pair: another file whose record of the same name lends its medium. words: text after the
    media. held_out: the hold-outs that the cases come from. free: the model is not told which kind to answer with, and
    the kind is what is judged. how: another way to make the cases, or to score, by name.
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


DIRECTIONS: dict[str, Direction] = {
    one.name: one
    for one in (
        Direction("text->image", IMAGES, ("text",), "image", "drawing or background unseen for the concept"),
        Direction("image->text", IMAGES, ("image",), "text", "drawing or background unseen for the concept"),
        Direction("text->speech", SPEECH, ("text",), "speech", "voice that never said the name"),
        Direction("speech->text", SPEECH, ("speech",), "text", "voice never heard, or never with the name"),
        Direction(
            "speech->image",
            SPEECH,
            ("speech",),
            "image",
            "voice never heard, or never with the name",
            pair=IMAGES,
        ),
        Direction("image->speech", IMAGES, ("image",), "speech", "drawing or background unseen", pair=SPEECH),
        Direction("text->video", VIDEOS, ("text",), "video", "concept never animated, or background unseen"),
        Direction("video->text", VIDEOS, ("video",), "text", "concept never animated, or background unseen"),
        Direction("image->video", JOINT, ("image",), "video", "concept never animated, or background unseen"),
        Direction("dna->text", TRANSLATE, ("dna",), "text", "genes of unseen products"),
        Direction("text->dna", TRANSLATE, ("text",), "dna", "genes of unseen products"),
        Direction(
            "image,image->text",
            IMAGES,
            ("image",),
            "text",
            "two unseen drawings",
            words="What are these?",
            twice=True,
        ),
        Direction(
            "word->speech", WORDS, ("text",), "speech", "words never said in training, by known voices"
        ),
        Direction(
            "speech->word", WORDS, ("speech",), "text", "words never said in training, voices never heard"
        ),
        Direction(
            "turn1:image->text", IMAGES, ("image",), "text", "drawing or background unseen", how="turns"
        ),
        Direction(
            "turn2:image->text", IMAGES, ("image",), "text", "drawing or background unseen", how="turns"
        ),
        Direction(
            "requests->kind",
            IMAGES,
            (),
            "text",
            "phrasings never used in training",
            free=True,
            how="requests",
        ),
        Direction("gene->product", GENES, ("dna",), "text", "genes of unseen products", how="ranked"),
    )
}


def read_directions(names: str) -> list[str]:
    """Names of directions, separated by commas, which some of the names hold too ("image,image->text")."""
    longest_first = sorted(DIRECTIONS, key=len, reverse=True)
    pattern = re.compile(r"\s*(" + "|".join(map(re.escape, longest_first)) + r"|[^,]*)\s*(?:,|$)")
    found = [one for one in pattern.findall(names) if one]
    return [one.strip() for one in found]


@dataclass(frozen=True)
class EvalExample:
    """One question: the prompt, the true answer, and the record (with what the judges need) it comes from.

    messages: the conversation that is asked in place of the prompt, which then is only what the nearest training prompt
    is found by.
    """

    prompt: list[Segment]
    answer: Segment
    record: Record
    messages: list[dict[str, Any]] | None = None

    @property
    def asked(self) -> list[Any]:
        """What the model is given."""
        return self.messages or self.prompt
