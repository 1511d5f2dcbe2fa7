"""Conversations with requests in words, made from the built sets: "Draw a red apple, 3d", "What is this?".

Every answer comes from a record, every wording from the tables below, every choice from the seed; so the file
can be made again. A conversation is of the split of its records, and media paths are relative to the written
file.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anytoken.data.sources import read_records

Record = dict[str, Any]
Message = dict[str, Any]
FILES = {
    "images": "emoji/images.jsonl",
    "videos": "emoji/videos.jsonl",
    "joint": "emoji/joint.jsonl",
    "speech": "speech/speech.jsonl",
    "translate": "dna/translate.jsonl",
    "coding": "dna/coding.jsonl",
}
DRAW = ("Draw {}", "Show me {}", "Make a picture of {}")
NAME = ("What is this?", "What do you see?", "Name it.")
DESCRIBE = ("Describe this picture.", "Describe it.")
SAY = ("Say {}", "Say {} aloud", "Speak: {}")
HEAR = ("What was said?", "Write down what you hear.")
ANIMATE = ("Animate {}", "Show {} moving")
ANIMATE_THIS = ("Animate this.", "Make it move.")
WATCH = ("What moves here?", "What is this video?")
DRAW_SPOKEN = ("Draw this.", "Draw what was said.")
SAY_SEEN = ("Say what this is.", "Name it aloud.")
TRANSLATE = ("Translate this gene.", "Which protein is this?")
GENE = ("Write a gene for {}", "DNA for {}")
CODING = ("Is this coding?",)
PAIR = ("What are these?", "What are these two?")


class InstructError(ValueError):
    """A folder of sets from which no conversation can be made."""


def build_instruct(
    sets: str | Path, out: str | Path, count: int = 12_000, seed: int = 0, progress: bool = True
) -> Path:
    """Write ``out/conversations.jsonl`` with about ``count`` conversations; returns its path.

    sets: the folder with emoji, speech and dna. One conversation in twenty is of the test split, made of test
    records only. Raises InstructError if the picture or speech sets are missing.
    """
    sets, out = Path(sets), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "conversations.jsonl"
    makers = {split: _Maker(sets, out, split, seed) for split in ("train", "test")}
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as handle:
        for index in tqdm(range(count), desc="conversations", disable=not progress):
            split = "test" if index % 20 == 0 else "train"
            for line in makers[split].conversation():
                handle.write(json.dumps({**line, "split": split}, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


class _Maker:
    """Draws conversations from the records of one split."""

    def __init__(self, sets: Path, out: Path, split: str, seed: int) -> None:
        self.rng = np.random.default_rng((seed, len(split)))
        self.records: dict[str, list[Record]] = {}
        for name, file in FILES.items():
            if (sets / file).is_file():
                prefix = Path(os.path.relpath((sets / file).parent, out))
                self.records[name] = [
                    _moved(record, prefix)
                    for record in read_records(sets / file)
                    if record.get("split") == split
                ]
        if not self.records.get("images") or not self.records.get("speech"):
            raise InstructError(
                f"{sets} has no {split} records in {FILES['images']} and {FILES['speech']}; build the sets"
            )
        self.spoken: dict[str, list[Record]] = defaultdict(list)
        for record in self.records["speech"]:
            self.spoken[record["name"]].append(record)
        needs: dict[Callable[[], list[Message]], tuple[str, float]] = {
            self.draw: ("images", 4),
            self.name: ("images", 3),
            self.describe: ("images", 2),
            self.two: ("images", 2),
            self.say: ("speech", 3),
            self.hear: ("speech", 2),
            self.draw_spoken: ("images", 2),
            self.say_seen: ("images", 2),
            self.hear_and_draw: ("images", 1),
            self.animate: ("videos", 2),
            self.watch: ("videos", 2),
            self.animate_this: ("joint", 2),
            self.draw_then_animate: ("joint", 1),
            self.translate: ("translate", 2),
            self.gene: ("translate", 2),
            self.coding: ("coding", 1),
        }
        self.makers = [maker for maker, (name, _) in needs.items() if self.records.get(name)]
        weights = np.array([weight for name, weight in needs.values() if self.records.get(name)])
        self.weights = weights / weights.sum()

    def conversation(self) -> Iterator[Record]:
        """One conversation, or none where the drawn record has no partner."""
        messages = self.makers[int(self.rng.choice(len(self.makers), p=self.weights))]()
        if messages:
            yield {"messages": messages}

    def pick(self, name: str) -> Record:
        records = self.records[name]
        return records[int(self.rng.integers(len(records)))]

    def word(self, wordings: tuple[str, ...], *values: str) -> str:
        return wordings[int(self.rng.integers(len(wordings)))].format(*values)

    def utterance(self, name: str) -> Record | None:
        spoken = self.spoken.get(name)
        return spoken[int(self.rng.integers(len(spoken)))] if spoken else None

    def draw(self) -> list[Message]:
        record = self.pick("images")
        return [_user(self.word(DRAW, record["text"])), _assistant(_media(record, "image"))]

    def name(self) -> list[Message]:
        record = self.pick("images")
        return [_user(_media(record, "image"), self.word(NAME)), _assistant(_short(record))]

    def describe(self) -> list[Message]:
        record = self.pick("images")
        return [_user(_media(record, "image"), self.word(DESCRIBE)), _assistant(record["text"])]

    def two(self) -> list[Message]:
        first, second = self.pick("images"), self.pick("images")
        request = _user(_media(first, "image"), _media(second, "image"), self.word(PAIR))
        return [request, _assistant(f"{_short(first)} and {_short(second)}")]

    def say(self) -> list[Message]:
        record = self.pick("speech")
        voice = f", voice {record['voice']}" if record.get("voice") and self.rng.random() < 0.5 else ""
        return [_user(self.word(SAY, record["text"]) + voice), _assistant(_media(record, "speech"))]

    def hear(self) -> list[Message]:
        record = self.pick("speech")
        return [_user(_media(record, "speech"), self.word(HEAR)), _assistant(record["text"])]

    def draw_spoken(self) -> list[Message]:
        record = self.pick("images")
        spoken = self.utterance(record["name"])
        if spoken is None:
            return []
        return [_user(_media(spoken, "speech"), self.word(DRAW_SPOKEN)), _assistant(_media(record, "image"))]

    def say_seen(self) -> list[Message]:
        record = self.pick("images")
        spoken = self.utterance(record["name"])
        if spoken is None:
            return []
        return [_user(_media(record, "image"), self.word(SAY_SEEN)), _assistant(_media(spoken, "speech"))]

    def hear_and_draw(self) -> list[Message]:
        record = self.pick("images")
        spoken = self.utterance(record["name"])
        if spoken is None:
            return []
        request = _user(_media(spoken, "speech"), "Write it down and draw it.")
        return [request, _assistant(spoken["text"], _media(record, "image"))]

    def animate(self) -> list[Message]:
        record = self.pick("videos")
        return [_user(self.word(ANIMATE, _short(record))), _assistant(_media(record, "video"))]

    def watch(self) -> list[Message]:
        record = self.pick("videos")
        return [_user(_media(record, "video"), self.word(WATCH)), _assistant(_short(record))]

    def animate_this(self) -> list[Message]:
        record = self.pick("joint")
        return [_user(_media(record, "image"), self.word(ANIMATE_THIS)), _assistant(_media(record, "video"))]

    def draw_then_animate(self) -> list[Message]:
        record = self.pick("joint")
        return [
            _user(self.word(DRAW, _short(record))),
            _assistant(_media(record, "image")),
            _user(self.word(ANIMATE_THIS)),
            _assistant(_media(record, "video")),
        ]

    def translate(self) -> list[Message]:
        record = self.pick("translate")
        return [_user(_media(record, "dna"), self.word(TRANSLATE)), _assistant(record["text"])]

    def gene(self) -> list[Message]:
        record = self.pick("translate")
        return [_user(self.word(GENE, record["text"])), _assistant(_media(record, "dna"))]

    def coding(self) -> list[Message]:
        record = self.pick("coding")
        return [_user(_media(record, "dna"), self.word(CODING)), _assistant(record["text"])]


def _moved(record: Record, prefix: Path) -> Record:
    """The record with its media paths under ``prefix``; inline DNA stays."""
    paths = {kind: str(prefix / record[kind]) for kind in ("image", "video", "speech") if record.get(kind)}
    return record | paths


def _short(record: Record) -> str:
    """The caption's first part: "a red apple" of "a red apple, 3d, blue background"."""
    return str(record["text"]).split(",")[0] if record.get("text") else str(record["name"])


def _media(record: Record, kind: str) -> Message:
    return {"type": kind, kind: record[kind]}


def _message(role: str, parts: tuple[str | Message, ...]) -> Message:
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def _user(*parts: str | Message) -> Message:
    return _message("user", parts)


def _assistant(*parts: str | Message) -> Message:
    return _message("assistant", parts)
