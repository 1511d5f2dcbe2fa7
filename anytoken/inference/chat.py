"""A conversation: its turns as segments for people, and as exact ids for the model.

Decoding an image and encoding it again does not give the same codes, so the model's own turns are kept, and saved, as
the ids that it generated: a conversation continues identically whether or not it was saved in between. A saved chat is
a folder with `chat.json` and the media files, which is lossless and readable without this library.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.outputs import GenerationOutput, segment_html
from anytoken.inference.streaming import Event
from anytoken.media_io import is_below
from anytoken.processor import Message
from anytoken.segments import DNA, KINDS, Segment, Speech, Text, usual_suffix
from anytoken.utils.atomic import FolderKind, check_target, write_folder
from anytoken.utils.errors import RequestError

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken

FILE = "chat.json"
AS_BEFORE: Any = object()  # the output that was asked for the last time
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One message: its segments, its ids from role to end, and the `output` that was requested for its reply."""

    role: str
    content: list[Segment]
    ids: list[int]
    output: Any = None


class Chat:
    """A conversation of a user and the model. `messages` are its contents, `ids` the same as ids.

    When a reply would no longer fit the context, the model no longer reads the oldest exchanges, but always the system
    text; `num_truncated` counts their messages, which stay in `messages`.
    """

    def __init__(self, model: AnyToken, system: str | None = None) -> None:
        self.model = model
        self.turns: list[Turn] = []
        self.num_truncated = 0
        self._id = uuid4().hex  # tells a later state of one conversation from another conversation
        self._prefixes = PrefixCache()  # what was read of this conversation is not read again
        if system is not None:
            self.turns = self._encode([{"role": "system", "content": system}])

    @property
    def messages(self) -> list[Message]:
        """All messages, in the chat convention: {"role", "content": [Segment, ...]}."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]

    @property
    def ids(self) -> list[int]:
        """The whole conversation as ids."""
        return self._joined(self.turns)

    def __len__(self) -> int:
        return len(self.turns)

    def __repr__(self) -> str:
        truncated = f" ({self.num_truncated} truncated)" if self.num_truncated else ""
        context = self.model.engine.context
        return f"Chat({len(self.turns)} messages{truncated}, {len(self.ids)} tokens, context {context})"

    # ---- talking ----

    def send(self, prompt: Any, output: Any = None, **options: Any) -> GenerationOutput:
        """Send a message (a string, a segment, a list of both) and return the reply; options as in `generate`.

        A failed call does not change the conversation. RequestError if this turn alone does not fit the context.
        """
        return self._reply(self._said(prompt, output), options)

    def stream(
        self, prompt: Any, output: Any = None, **options: Any
    ) -> Generator[Event, None, GenerationOutput]:
        """`send` as typed events; the turn is added once the last event is consumed."""
        return self._events(self._said(prompt, output), options)

    def say(self, prompt: Any, output: Any = None) -> None:
        """Add a message without a reply; `regenerate` or `regenerate_stream` generates it.

        RequestError for an invalid message; the conversation is then unchanged.
        """
        self.turns = self._said(prompt, output)

    def prompt_ids(self, output: Any = AS_BEFORE, **options: Any) -> list[int]:
        """The prompt for a reply to the last message, to generate it elsewhere; `remember` adds the reply."""
        return self._window(self._unanswered(output), options)

    def remember(self, reply: GenerationOutput) -> None:
        """Add a reply to the last message, replacing an earlier one."""
        self._remember(self._unanswered(AS_BEFORE), reply)

    def regenerate(self, output: Any = AS_BEFORE, **options: Any) -> GenerationOutput:
        """Replace the reply to the last message by a new one: `chat.regenerate(seed=1)`.

        By default it has the same output kinds. RequestError if there is nothing to answer.
        """
        return self._reply(self._unanswered(output), options)

    def regenerate_stream(
        self, output: Any = AS_BEFORE, **options: Any
    ) -> Generator[Event, None, GenerationOutput]:
        """`regenerate` as typed events; the old reply is kept until the last event is consumed."""
        return self._events(self._unanswered(output), options)

    def edit(self, index: int, content: Any) -> None:
        """Change `messages[index]` and drop all later messages; `regenerate` then answers it."""
        if not -len(self.turns) <= index < len(self.turns):
            raise RequestError(
                f"There is no message {index}: the chat has {len(self.turns)}, counted from 0."
            )
        old = self.turns[index]
        [turn] = self._encode([{"role": old.role, "content": content}])
        self.turns[index:] = [replace(turn, output=old.output)]

    def undo(self) -> list[Segment]:
        """Remove the user's last message and its reply; returns the message."""
        return self._cut_at(self._last_said()).content

    def _cut_at(self, index: int) -> Turn:
        turn = self.turns[index]
        del self.turns[index:]
        return turn

    def _last_said(self) -> int:
        said = [index for index, turn in enumerate(self.turns) if turn.role == "user"]
        if not said:
            raise RequestError("Nothing has been said yet: send something first.")
        return said[-1]

    def _said(self, prompt: Any, output: Any) -> list[Turn]:
        *turns, last = [*self.turns, *self._encode(prompt)]
        return [*turns, replace(last, output=output)]

    def _unanswered(self, output: Any) -> list[Turn]:
        """The turns up to the message whose reply is to be regenerated."""
        self._last_said()
        answered = self.turns[-1].role == "assistant"
        *turns, last = self.turns[:-1] if answered else self.turns
        return [*turns, last if output is AS_BEFORE else replace(last, output=output)]

    def _encode(self, prompt: Any) -> list[Turn]:
        processor = self.model.processor
        return [
            Turn(message["role"], message["content"], processor.encode_chat([message], False)[1:])
            for message in processor.messages(prompt)
        ]

    def _reply(self, turns: list[Turn], options: dict[str, Any]) -> GenerationOutput:
        ids, output = self._window(turns, options), turns[-1].output
        [reply] = self.model.generate_ids([ids], output, prefixes=self._prefixes, **options)
        return self._remember(turns, reply)

    def _events(self, turns: list[Turn], options: dict[str, Any]) -> Generator[Event, None, GenerationOutput]:
        events = self.model.stream_ids(
            self._window(turns, options), turns[-1].output, self._prefixes, **options
        )
        return self._remembering(turns, events)

    def _remembering(
        self, turns: list[Turn], events: Generator[Event, None, GenerationOutput]
    ) -> Generator[Event, None, GenerationOutput]:
        return self._remember(turns, (yield from events))

    def _remember(self, turns: list[Turn], reply: GenerationOutput) -> GenerationOutput:
        ids = [self.model.token_space.assistant, *reply.ids]
        self.turns = [*turns, Turn("assistant", reply.segments, ids)]
        return reply

    def _joined(self, turns: Sequence[Turn]) -> list[int]:
        return [self.model.token_space.bos, *(token for turn in turns for token in turn.ids)]

    def _window(self, turns: list[Turn], options: Mapping[str, Any]) -> list[int]:
        """The ids that the model reads, up to the assistant's opening: from the first exchange from which all fits.

        Truncation frees a quarter of the context at once: between truncations, each prompt extends the previous one, so
        that its cache can be reused.
        """
        context = self.model.engine.context
        limit, via = options.get("max_new_tokens"), options.get("via")
        room = min(self.model.max_reply_tokens(turns[-1].output, limit, turns[-1].ids, via), context // 2)
        head = [turn for turn in turns[:1] if turn.role == "system"]
        begins = [n for n, turn in enumerate(turns) if turn.role == "user"][1:]
        windows = [turns, *([*head, *turns[begin:]] for begin in begins)]
        free = [context - room - 1 - len(self._joined(window)) for window in windows]
        lost = [len(turns) - len(window) for window in windows]
        fitting = [
            place for place, spare in enumerate(free) if spare >= 0 and lost[place] in (0, self.num_truncated)
        ]
        for least in (context // 4, 0):
            fitting += [place for place, spare in enumerate(free) if spare >= least]
        window = windows[fitting[0] if fitting else -1]
        num_truncated = len(turns) - len(window)
        if num_truncated and not self.num_truncated:
            log.warning(
                "The conversation has outgrown the context of %d tokens: from now on the model no longer reads its "
                "oldest messages, %d so far (chat.num_truncated). They stay in chat.messages.",
                context,
                num_truncated,
            )
        self.num_truncated = num_truncated
        return [*self._joined(window), self.model.token_space.assistant]

    # ---- looking ----

    def show(self) -> None:
        """Show the conversation: with images and players in a notebook, otherwise as lines of text."""
        ipython = sys.modules.get("IPython")
        if ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None:
            import_module("IPython.display").display(self)
            return
        for turn in self.turns:
            said = (segment.text if isinstance(segment, Text) else repr(segment) for segment in turn.content)
            print(f"{turn.role}: {' '.join(said)}")

    def _repr_html_(self) -> str:
        rows = []
        for turn in self.turns:
            said = "".join(f"<div>{segment_html(segment)}</div>" for segment in turn.content)
            side = "start" if turn.role == "assistant" else "end"
            rows.append(
                f"<div style='align-self:{side};max-width:80%;border:1px solid #8884;border-radius:8px;"
                f"padding:.3em .8em'><small style='opacity:.6'>{html.escape(turn.role)}</small>{said}</div>"
            )
        return f"<div style='display:flex;flex-direction:column;gap:.5em'>{''.join(rows)}</div>"

    # ---- keeping ----

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write a folder with chat.json and one file per medium, completely or not at all.

        An earlier state of this conversation is replaced. RequestError if the folder contains another conversation
        or something else, unless `overwrite`. Files that are not part of a conversation are kept.
        """
        target = Path(path).expanduser()
        before, files = _saved(target)
        kind = FolderKind("conversation", FILE, files, RequestError)
        check_target(target, kind, overwrite)
        with write_folder(target, kind, overwrite, own=before == self._id) as folder:
            messages = []
            for number, turn in enumerate(self.turns):
                parts = [
                    _save_part(segment, folder, f"{number:03d}-{place}")
                    for place, segment in enumerate(turn.content)
                ]
                asked = {} if turn.output is None else {"output": turn.output}
                messages.append({"role": turn.role, "content": parts, **asked})
            data = {
                "version": 1, "id": self._id, "token_space": _digest(self.model), "messages": messages,
                "ids": self.ids,
            }  # fmt: skip
            (folder / FILE).write_text(
                json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return target

    @classmethod
    def load(cls, path: str | Path, model: AnyToken) -> Chat:
        """Open a saved conversation; if the model has another token space, its media are tokenized again.

        RequestError names a missing or damaged file.
        """
        folder, chat = Path(path).expanduser(), cls(model)
        if not (folder / FILE).is_file():
            raise RequestError(f"{folder} holds no saved chat: there is no {FILE} in it.")
        types = KINDS | {kind: one.segment_type for kind, one in model.processor.tokenizers.items()}
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            chat._id = _saved(folder)[0] or chat._id
            for message in data["messages"]:
                content = [_load_part(part, folder, types) for part in message["content"]]
                chat.turns.append(Turn(message["role"], content, [], message.get("output")))
            if data["token_space"] == _digest(model):
                model.processor.grammar.validate(data["ids"])
                pieces = _split_after(data["ids"][1:], model.token_space.end)
            else:
                pieces = [chat._encode([message])[0].ids for message in chat.messages]
            chat.turns = [replace(turn, ids=ids) for turn, ids in zip(chat.turns, pieces, strict=True)]
        except RequestError:
            raise
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise RequestError(
                f"{folder} does not hold a saved chat ({type(error).__name__}: {error})."
            ) from error
        return chat


def _saved(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """The id of the conversation in a folder, and the names of its files; None if there is none.

    Older ones have no id and are identified by their content.
    """
    try:
        content = (folder / FILE).read_bytes()
        data = json.loads(content)
        parts = [part for message in data["messages"] for part in message["content"]]
        names = [Path(part[part["type"]]).name for part in parts if part["type"] != "text"]
        return data.get("id") or hashlib.sha256(content).hexdigest(), (FILE, *map(escape, names))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None, (FILE,)


def _split_after(ids: Sequence[int], last: int) -> list[list[int]]:
    """Ids cut after each `last`: a conversation into its turns."""
    ends = [place + 1 for place, token in enumerate(ids) if token == last]
    return [list(ids[start:stop]) for start, stop in zip([0, *ends], ends, strict=False)]


def _digest(model: AnyToken) -> str:
    """Digest of the meaning of ids: the token space and every tokenizer's fingerprint."""
    prints = [f"{kind}:{one.fingerprint()}" for kind, one in model.processor.tokenizers.items()]
    ranges = [str(one) for one in model.token_space.ranges]
    return hashlib.sha256("\n".join(ranges + prints).encode()).hexdigest()


def _save_part(segment: Segment, folder: Path, stem: str) -> dict[str, str]:
    if isinstance(segment, Text):
        return {"type": "text", "text": segment.text}
    name = stem + usual_suffix(segment.kind)
    if isinstance(segment, Speech):
        segment.save(folder / name, exact=True)
    else:
        segment.save(folder / name)
    part = {"type": segment.kind, segment.kind: name}
    return {**part, "name": segment.name} if isinstance(segment, DNA) else part  # FASTA knows no empty name


def _load_part(part: dict[str, str], folder: Path, types: Mapping[str, type[Segment]]) -> Segment:
    kind = part["type"]
    if kind == "text":
        return Text(part["text"])
    if kind not in types:
        raise RequestError(f"The chat in {folder} holds {kind!r}; this model knows {', '.join(types)}.")
    path = folder / Path(part[kind]).name
    if not path.is_file() or not is_below(path, [folder]):
        raise RequestError(f"{path} is missing, or a link out of its folder: the saved chat is incomplete.")
    segment = types[kind].open(path)
    return replace(segment, name=part.get("name", segment.name)) if isinstance(segment, DNA) else segment
