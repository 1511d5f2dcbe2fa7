"""Conversations with requests in words, made from the built sets: "Draw a red apple, 3d", "What is this?".

Every answer comes from a record, every wording from `anytoken.emoji_world.phrases`, every choice from the seed; so
the file can be made again. A conversation is of the split of its records; those of the test split are worded in
phrasings that training never uses, where a request has any. Media paths are relative to the written file.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anytoken.data.sources import read_records
from anytoken.emoji_world.phrases import wording
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError

Record = dict[str, Any]
Message = dict[str, Any]
FILES = {
    "images": "emoji/images.jsonl",
    "videos": "emoji/videos.jsonl",
    "joint": "emoji/joint.jsonl",
    "speech": "speech/speech.jsonl",
    "words": "words/words.jsonl",
    "translate": "dna/translate.jsonl",
    "coding": "dna/coding.jsonl",
    "genes": "dna/genes.jsonl",
}
# The longest that a conversation of several exchanges may get, in ids of today's tokenizers: stages have rows of 512.
COSTS, LONGEST = {"image": 70, "video": 140, "speech": 90, "dna": 60, "text": 16}, 400
ABILITIES = 'I can draw, animate, say and name things, and read genes. Try "Draw a fox".'
ABOUT = f"I am a small model of text, images, speech, video and DNA. {ABILITIES}"
DECLINED = f"I do not know that. {ABILITIES}"


@dataclass(frozen=True)
class Request:
    """One way to make an exchange: its share of conversations, the records it needs, and the kinds of its answer."""

    purpose: str
    weight: float
    needs: str
    kinds: tuple[str, ...]


REQUESTS = {
    one.purpose: one
    for one in (
        Request("draw", 4, "images", ("image",)),
        Request("name", 3, "images", ("text",)),
        Request("describe", 2, "images", ("text",)),
        Request("two", 2, "images", ("text",)),
        Request("say", 3, "speech", ("speech",)),
        Request("hear", 2, "speech", ("text",)),
        Request("draw_spoken", 4, "images", ("text", "image")),
        Request("say_seen", 4, "images", ("text", "speech")),
        Request("hear_and_draw", 2, "images", ("text", "image")),
        Request("animate", 2, "videos", ("video",)),
        Request("watch", 2, "videos", ("text",)),
        Request("animate_this", 2, "joint", ("video",)),
        Request("translate", 2, "translate", ("text",)),
        Request("gene", 2, "translate", ("dna",)),
        Request("coding", 1, "coding", ("text",)),
        Request("product", 1, "genes", ("text",)),
        Request("who", 1, "images", ("text",)),
        Request("decline", 2, "images", ("text",)),
    )
}
SEVERAL_TURNS = {"look_back": 3.0, "recolour": 1.0, "draw_then_animate": 1.0, "again": 4.0, "chain": 4.0}


def build_instruct(
    sets: str | Path, out: str | Path, count: int = 12_000, seed: int = 0, progress: bool = True
) -> Path:
    """Write ``out/conversations.jsonl`` with about ``count`` conversations; returns its path.

    sets: the folder with emoji, speech and dna. One conversation in twenty is of the test split, made of test
    records only. Raises DataError if the image or speech sets are missing.
    """
    sets, out = Path(sets), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "conversations.jsonl"
    makers = {split: Maker(sets, out, split, seed) for split in ("train", "test")}

    def write(scratch: Path) -> None:
        with scratch.open("w", encoding="utf-8") as handle:
            for index in tqdm(range(count), desc="conversations", disable=not progress):
                split = "test" if index % 20 == 0 else "train"
                for line in makers[split].conversation():
                    handle.write(json.dumps({**line, "split": split}, ensure_ascii=False) + "\n")

    return write_file(path, write)


class Maker:
    """Draws conversations from the records of one split, with media paths relative to ``out``."""

    def __init__(self, sets: Path, out: Path, split: str, seed: int) -> None:
        self.rng = np.random.default_rng((seed, len(split)))
        self.held_out = split == "test"
        self.records: dict[str, list[Record]] = {}
        self.names: dict[
            str, str
        ] = {}  # of every image; one of the test split of `joint` may be known as a still
        for name, file in FILES.items():
            if (sets / file).is_file():
                prefix = Path(os.path.relpath((sets / file).parent, out))
                moved = [_moved(one, prefix) for one in read_records(sets / file)]
                self.names = {one["image"]: _short(one) for one in moved if "image" in one} | self.names
                found = [one for one in moved if one.get("split") == split]
                self.records[name] = [one for one in found if name != "genes" or one["short"]]
        if not self.records.get("images") or not self.records.get("speech"):
            raise DataError(
                f"{sets} has no {split} records in {FILES['images']} and {FILES['speech']}; build the sets"
            )
        self.spoken: dict[str, list[Record]] = defaultdict(list)
        for record in self.records["speech"]:
            self.spoken[record["name"]].append(record)
        self.drawings: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in self.records["images"]:
            self.drawings[record["name"], record.get("style", "")].append(record)
        self.single = {one.purpose: one.weight for one in REQUESTS.values() if self.records.get(one.needs)}
        several = {name: weight for name, weight in SEVERAL_TURNS.items() if self._can(name)}
        self.weights = self.single | several

    def _can(self, name: str) -> bool:
        return name != "draw_then_animate" or bool(self.records.get("joint"))

    def conversation(self) -> Iterator[Record]:
        """One conversation, or none where the drawn record has no partner."""
        purpose = self.choose(self.weights)
        maker: Callable[[], list[Message]] = getattr(self, purpose)
        if messages := maker():
            yield {"messages": messages, "purpose": purpose}

    def choose(self, weights: dict[str, float]) -> str:
        """One of the names, as often as its weight says."""
        shares = np.array(list(weights.values()))
        return list(weights)[int(self.rng.choice(len(shares), p=shares / shares.sum()))]

    def pick(self, name: str) -> Record:
        records = self.records[name]
        return records[int(self.rng.integers(len(records)))]

    def word(self, purpose: str, *values: str) -> str:
        """A request in words; with held-out phrasings for the test split."""
        return wording(self.rng, purpose, *values, held_out=self.held_out)

    def utterance(self, name: str) -> Record | None:
        spoken = self.spoken.get(name)
        return spoken[int(self.rng.integers(len(spoken)))] if spoken else None

    def ask(self, purpose: str, *media: Message) -> Message:
        """A user's turn about media; the words come first at times."""
        words = self.word(purpose)
        return _user(words, *media) if self.rng.random() < 0.2 else _user(*media, words)

    def called(self, record: Record) -> str:
        """What is to be drawn, as people say it: the caption, the name alone, or a part of the caption."""
        ways = [record["text"], _short(record)]
        if record.get("background"):
            ways.append(f"{_short(record)} on a {record['background']} background")
        if record.get("style"):
            ways.append(f"{_short(record)} in {record['style']} style")
        return str(ways[int(self.rng.integers(len(ways)))])

    # ---- one exchange ----

    def draw(self) -> list[Message]:
        record = self.pick("images")
        return [_user(self.word("draw", self.called(record))), _assistant(_media(record, "image"))]

    def name(self) -> list[Message]:
        record = self.pick("images")
        return [self.ask("name", _media(record, "image")), _assistant(_short(record))]

    def describe(self) -> list[Message]:
        record = self.pick("images")
        return [self.ask("describe", _media(record, "image")), _assistant(record["text"])]

    def two(self) -> list[Message]:
        first, second = self.pick("images"), self.pick("images")
        request = _user(_media(first, "image"), _media(second, "image"), self.word("two"))
        return [request, _assistant(f"{_short(first)} and {_short(second)}")]

    def say(self) -> list[Message]:
        record = self.pick("words" if self.records.get("words") and self.rng.random() < 0.5 else "speech")
        voice = f", voice {record['voice']}" if record.get("voice") and self.rng.random() < 0.5 else ""
        return [_user(self.word("say", record["text"] + voice)), _assistant(_media(record, "speech"))]

    def hear(self) -> list[Message]:
        record = self.pick("speech")
        return [self.ask("hear", _media(record, "speech")), _assistant(record["text"])]

    def draw_spoken(self) -> list[Message]:
        return self._draw_what_was_said("draw_spoken")

    def hear_and_draw(self) -> list[Message]:
        return self._draw_what_was_said("hear_and_draw")

    def _draw_what_was_said(self, purpose: str) -> list[Message]:
        """The reply says in text what was understood, and then draws it (chain of modality, arXiv 2305.11000)."""
        record = self.pick("images")
        spoken = self.utterance(record["name"])
        if spoken is None:
            return []
        request = self.ask(purpose, _media(spoken, "speech"))
        return [request, _assistant(spoken["text"], _media(record, "image"))]

    def say_seen(self) -> list[Message]:
        """The name in text first, then aloud."""
        record = self.pick("images")
        spoken = self.utterance(record["name"])
        if spoken is None:
            return []
        reply = _assistant(spoken["text"], _media(spoken, "speech"))
        return [self.ask("say_seen", _media(record, "image")), reply]

    def animate(self) -> list[Message]:
        record = self.pick("videos")
        return [_user(self.word("animate", _short(record))), _assistant(_media(record, "video"))]

    def watch(self) -> list[Message]:
        record = self.pick("videos")
        return [self.ask("watch", _media(record, "video")), _assistant(_short(record))]

    def animate_this(self) -> list[Message]:
        record = self.pick("joint")
        return [self.ask("animate_this", _media(record, "image")), _assistant(_media(record, "video"))]

    def translate(self) -> list[Message]:
        record = self.pick("translate")
        return [self.ask("translate", _media(record, "dna")), _assistant(record["text"])]

    def gene(self) -> list[Message]:
        record = self.pick("translate")
        return [_user(self.word("gene", record["text"])), _assistant(_media(record, "dna"))]

    def coding(self) -> list[Message]:
        record = self.pick("coding")
        return [self.ask("coding", _media(record, "dna")), _assistant(record["text"])]

    def product(self) -> list[Message]:
        record = self.pick("genes")
        return [self.ask("product", _media(record, "dna")), _assistant(record["product"])]

    def who(self) -> list[Message]:
        return [_user(self.word("who")), _assistant(ABOUT)]

    def decline(self) -> list[Message]:
        return [_user(self.word("decline")), _assistant(DECLINED)]

    # ---- several exchanges ----

    def draw_then_animate(self) -> list[Message]:
        record = self.pick("joint")
        return [
            _user(self.word("draw", _short(record))),
            _assistant(_media(record, "image")),
            _user(self.word("animate_this")),
            _assistant(_media(record, "video")),
        ]

    def recolour(self) -> list[Message]:
        """A drawing, and the same on another background."""
        record = self.pick("images")
        others = [
            one
            for one in self.drawings[record["name"], record.get("style", "")]
            if one.get("background") not in (None, record.get("background"))
        ]
        if not others:
            return []
        other = others[int(self.rng.integers(len(others)))]
        return [
            _user(self.word("draw", record["text"])),
            _assistant(_media(record, "image")),
            _user(self.word("recolour", other["background"])),
            _assistant(_media(other, "image")),
        ]

    def look_back(self) -> list[Message]:
        """An image of the first turn is named in the second: only the image says what it is."""
        first = self.choose({"decline": 2, "animate_this": 1 if self.records.get("joint") else 0})
        before: list[Message] = getattr(self, first)()
        if first == "decline":  # asked about an image that says nothing of it
            before[0] = self.ask("decline", _media(self.pick("images"), "image"))
        if not before:
            return []
        image = next(
            part["image"] for message in before for part in message["content"] if part["type"] == "image"
        )
        return [*before, _user(self.word("look_back")), _assistant(self.names[image])]

    def again(self) -> list[Message]:
        """Any exchange, and then an image to be named: a second turn must see as well as a first."""
        before = self.exchange()
        return [*before, *(self.name() if self.rng.random() < 0.75 else self.describe())] if before else []

    def chain(self) -> list[Message]:
        """Two to four exchanges of any kinds, as long as they stay short."""
        messages: list[Message] = []
        for _ in range(int(self.rng.integers(2, 5))):
            more = self.exchange()
            if cost([*messages, *more]) > LONGEST:
                break
            messages += more
        return messages

    def exchange(self) -> list[Message]:
        """One request of any kind with its answer."""
        maker: Callable[[], list[Message]] = getattr(self, self.choose(self.single))
        return maker()


def cost(messages: list[Message]) -> int:
    """Roughly how many ids a conversation takes."""
    return sum(COSTS[part["type"]] for message in messages for part in message["content"])


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
