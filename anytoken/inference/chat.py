"""A conversation that remembers: the turns as segments for people, and their exact ids for the model.

Decoding a picture and encoding it again does not give the same codes, so the model's own turns are kept, and
saved, as the ids it produced: a conversation continues the same whether or not it was saved in between. A
saved chat is a folder, `chat.json` beside the media files, that anyone can read without this library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anytoken.inference.checkpoint import check_target, replacing
from anytoken.inference.reply import Reply
from anytoken.inference.stream import Event
from anytoken.processor import Message
from anytoken.segments import DNA, KINDS, Segment, Text

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken

FILE = "chat.json"
SUFFIXES = {"image": ".png", "speech": ".flac", "video": ".webp", "dna": ".fasta"}


class ChatError(ValueError):
    """A saved conversation that cannot be read."""


class Chat:
    """Turns of a user and the model. `messages` is what was said, `ids` what the model will read."""

    def __init__(self, model: AnyToken, system: str | None = None) -> None:
        self.model = model
        self.messages: list[dict[str, Any]] = []
        self.ids: list[int] = [model.token_space.bos]
        if system is not None:
            message = {"role": "system", "content": [Text(system)]}
            self.messages.append(message)
            self.ids = model.processor.encode_chat([message], add_generation_prompt=False)

    def __len__(self) -> int:
        return len(self.messages)

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, {len(self.ids)} of {self.model.engine.context} tokens)"

    def send(self, prompt: Any, output: Any = None, **options: Any) -> Reply:
        """Say something (a string, a segment, a list of both) and get the reply; options of `generate`.

        A failed call leaves the conversation as it was. EngineError once it no longer fits the context.
        """
        messages, ids = self._turn(prompt)
        [reply] = self.model.generate_ids([ids], output, **options)
        self._remember(messages, ids, reply)
        return reply

    def stream(self, prompt: Any, output: Any = None, **options: Any) -> Generator[Event, None, Reply]:
        """`send` as typed events; the turn is remembered when the last event has been taken."""
        messages, ids = self._turn(prompt)
        reply = yield from self.model.stream_ids(ids, output, **options)
        self._remember(messages, ids, reply)
        return reply

    def _turn(self, prompt: Any) -> tuple[list[Message], list[int]]:
        """What is said as messages, and all ids up to the assistant's opening."""
        messages = self.model.processor.messages(prompt)
        turn = self.model.processor.encode_chat(messages, add_generation_prompt=True)
        return messages, self.ids + turn[1:]

    def _remember(self, messages: list[Message], ids: list[int], reply: Reply) -> None:
        self.messages += [*messages, {"role": "assistant", "content": reply.segments}]
        self.ids = ids + reply.ids

    def save(self, path: str | Path) -> Path:
        """Write a folder with chat.json and one file per medium; an older chat there is replaced."""
        target = Path(path)
        check_target(target, FILE)
        with replacing(target) as folder:
            messages = []
            for number, message in enumerate(self.messages):
                parts = [
                    _save_part(segment, folder, f"{number:03d}-{place}")
                    for place, segment in enumerate(message["content"])
                ]
                messages.append({"role": message["role"], "content": parts})
            data = {"version": 1, "token_space": _digest(self.model), "messages": messages, "ids": self.ids}
            (folder / FILE).write_text(
                json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return target

    @classmethod
    def load(cls, path: str | Path, model: AnyToken) -> Chat:
        """Open a saved conversation; with another model's token space its media are tokenized anew.

        ChatError names a file that is missing or damaged.
        """
        folder = Path(path)
        types = KINDS | {kind: one.segment_type for kind, one in model.processor.tokenizers.items()}
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            messages = [
                {
                    "role": message["role"],
                    "content": [_load_part(part, folder, types) for part in message["content"]],
                }
                for message in data["messages"]
            ]
            ids = data["ids"]
            if data["token_space"] != _digest(model):
                ids = model.processor.encode_chat(messages, False) if messages else [model.token_space.bos]
            model.processor.grammar.validate(ids)
        except ChatError:
            raise
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ChatError(
                f"{folder} does not hold a saved chat ({type(error).__name__}: {error})."
            ) from error
        chat = cls(model)
        chat.messages, chat.ids = messages, ids
        return chat


def _digest(model: AnyToken) -> str:
    """What ids mean: the token space and every tokenizer's fingerprint."""
    prints = [f"{kind}:{one.fingerprint()}" for kind, one in model.processor.tokenizers.items()]
    ranges = [str(one) for one in model.token_space.ranges]
    return hashlib.sha256("\n".join(ranges + prints).encode()).hexdigest()


def _save_part(segment: Segment, folder: Path, stem: str) -> dict[str, str]:
    if isinstance(segment, Text):
        return {"type": "text", "text": segment.text}
    name = stem + SUFFIXES.get(segment.kind, f".{segment.kind}")
    segment.save(folder / name)
    part = {"type": segment.kind, segment.kind: name}
    return {**part, "name": segment.name} if isinstance(segment, DNA) else part  # FASTA knows no empty name


def _load_part(part: dict[str, str], folder: Path, types: Mapping[str, type[Segment]]) -> Segment:
    kind = part["type"]
    if kind == "text":
        return Text(part["text"])
    if kind not in types:
        raise ChatError(f"The chat in {folder} holds {kind!r}; this model knows {', '.join(types)}.")
    path = folder / Path(part[kind]).name
    if not path.is_file():
        raise ChatError(f"{path} is missing: the saved chat is incomplete.")
    segment = types[kind].open(path)
    return replace(segment, name=part.get("name", segment.name)) if isinstance(segment, DNA) else segment
