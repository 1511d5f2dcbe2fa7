"""One visitor's conversations, as the page shows them: no part of it knows of Gradio.

A user's turn is kept before it is answered, so that a reply that was stopped can be asked for again. Media are files
in a scratch folder of the visitor's own; equal segments share one.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anytoken.inference.api import AnyToken
from anytoken.inference.chat import Chat
from anytoken.inference.streaming import (
    Event,
    SegmentFinished,
    SegmentPreview,
    SegmentProgress,
    SegmentStarted,
    TextDelta,
)
from anytoken.segments import DNA, Image, Segment, Speech, Text, Video, open_segment, usual_suffix
from anytoken.utils.errors import RequestError

MOMENT = 0.1  # seconds between two views of a reply in the making
DISPLAY_PX = 256  # shorter sides are enlarged to about this, pixel by pixel
TITLE = 32  # characters of a conversation's name
STOP_SECONDS = 30  # a reply ends before its next token
NOTES = {"image": "drawing", "speech": "speaking", "video": "animating", "dna": "writing DNA"}


@dataclass(frozen=True)
class Part:
    """What the page shows of one segment: a file with what it is in words, or text; `turn` counts messages from 0."""

    role: str
    turn: int
    segment: Segment | None
    text: str = ""
    file: Path | None = None


class Session:
    """Conversations of one visitor with one model; `chat` is the one in view."""

    def __init__(self, model: AnyToken, root: Path) -> None:
        """root: the folder of all visitors' files, which the page may serve."""
        self.model = model
        self.chats: list[Chat] = [model.chat()]
        self.current = 0
        self.folder = Path(tempfile.mkdtemp(dir=root))
        self._files: dict[Segment, Path] = {}
        self._stopping, self._idle = threading.Event(), threading.Event()
        self._idle.set()

    @property
    def chat(self) -> Chat:
        """The conversation in view."""
        return self.chats[self.current]

    def close(self) -> None:
        """Delete the visitor's files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- conversations ----

    def titles(self) -> list[tuple[str, int]]:
        """Name and number of each conversation, the newest first."""
        return [(_title(number, chat), number) for number, chat in reversed(list(enumerate(self.chats)))]

    def new(self) -> None:
        """Begin another conversation; an empty one is used again."""
        if len(self.chat):
            self.chats.append(self.model.chat())
        self.current = len(self.chats) - 1

    def open(self, number: int) -> None:
        """Bring a conversation into view."""
        if not 0 <= number < len(self.chats):
            raise RequestError("This conversation is gone: the page was restarted. Begin a new one.")
        self.current = number

    def archive(self) -> Path:
        """The conversation in view as a zip of chat.json and its media; `anytoken chat --load` opens the folder."""
        if not len(self.chat):
            raise RequestError("There is nothing to save yet: say something first.")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.chat.save(folder / "chat")
        return Path(shutil.make_archive(str(folder / f"chat-{self.current + 1}"), "zip", folder / "chat"))

    # ---- talking ----

    @contextmanager
    def replying(self) -> Iterator[None]:
        """While a reply is made and shown; one that was begun before is stopped first."""
        self.stop()
        self._stopping.clear()
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    @property
    def stopped(self) -> bool:
        """Whether the running reply was to stop."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End the running reply, if there is one: what there is of it is shown, but not part of the conversation."""
        self._stopping.set()
        self._idle.wait(STOP_SECONDS)

    def say(self, words: str, files: Sequence[str], kinds: Sequence[str]) -> None:
        """Add what the user says; `answer` then replies to it. RequestError names a file that cannot be read."""
        content: list[Segment] = [read_file(file) for file in files]
        content += [Text(words.strip())] if words.strip() else []
        if not content:
            raise RequestError("Write something, drop a file, or record your voice first.")
        self.chat.say(content, list(kinds) or None)

    def answer(self, **options: Any) -> Iterator[list[Part]]:
        """Reply to the last message; all parts of the conversation, every moment, until the reply is whole."""
        shown, pending, last = self._said(), _Pending(self), 0.0
        yield [*shown, *pending.parts()]
        with closing(self.chat.regenerate_stream(**options)) as events:
            for event in events:
                pending.take(event)
                if self.stopped:
                    yield [*shown, *pending.parts("stopped")]
                    return
                if time.monotonic() - last > MOMENT:
                    last = time.monotonic()
                    yield [*shown, *pending.parts()]
        yield self.parts()

    def take_back(self) -> tuple[str, list[str]]:
        """Take back the last message and its reply; its words and files, to be said in another way."""
        said = self.chat.undo()
        words = " ".join(one.text for one in said if isinstance(one, Text))
        return words, [str(self.file(one)) for one in said if not isinstance(one, Text)]

    def edit(self, part: Part, words: str) -> None:
        """Say other words in place of a text; its message keeps its media, and what came after is dropped."""
        content = self.chat.messages[part.turn]["content"]
        if not isinstance(part.segment, Text):
            raise RequestError("Only words can be edited: take the message back to choose another file.")
        if not words.strip():
            raise RequestError("An empty message says nothing: write something, or take the message back.")
        new = [Text(words.strip()) if one is part.segment else one for one in content]
        self.chat.edit(part.turn, new)

    # ---- showing ----

    def parts(self) -> list[Part]:
        """The conversation in view."""
        return [
            self.part(turn.role, number, segment)
            for number, turn in enumerate(self.chat.turns)
            for segment in turn.content
        ]

    def _said(self) -> list[Part]:
        """The conversation without the reply that is to be made."""
        count = len(self.chat) - (self.chat.turns[-1].role == "assistant")
        return [part for part in self.parts() if part.turn < count]

    def part(self, role: str, turn: int, segment: Segment) -> Part:
        """One segment as it is shown."""
        if isinstance(segment, Text):
            return Part(role, turn, segment, segment.text)
        return Part(role, turn, segment, describe(segment), self.file(segment))

    def file(self, segment: Segment) -> Path:
        """A file that browsers show."""
        if segment not in self._files:
            suffix = ".mp4" if isinstance(segment, Video) else usual_suffix(segment.kind)
            path = self.folder / f"{segment.kind}-{len(self._files) + 1}{suffix}"
            self._files[segment] = enlarged(segment).save(path)
        return self._files[segment]


class _Pending:
    """A reply in the making: finished segments, then what is known of the running one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._done: list[Segment] = []
        self._text = ""
        self._preview: Segment | None = None
        self._note = "thinking …"

    def take(self, event: Event) -> None:
        """One more event."""
        if isinstance(event, SegmentStarted):
            self._text, self._preview = "", None
            self._note = "" if event.kind == "text" else f"{NOTES.get(event.kind, event.kind)} …"
        elif isinstance(event, TextDelta):
            self._text += event.text
        elif isinstance(event, SegmentProgress):
            of = f" of {event.total}" if event.total else ""
            self._note = f"{NOTES.get(event.kind, event.kind)} … {event.done}{of} codes"
        elif isinstance(event, SegmentPreview):
            self._preview = event.segment
        elif isinstance(event, SegmentFinished):
            self._done.append(event.segment)
            self._text, self._preview, self._note = "", None, ""

    def parts(self, note: str | None = None) -> list[Part]:
        """What there is of it; note: instead of what is being made."""
        turn, session = len(self._session.chat), self._session
        found = [session.part("assistant", turn, segment) for segment in self._done]
        if self._text:
            found.append(Part("assistant", turn, None, self._text))
        if self._preview is not None:
            found.append(session.part("assistant", turn, self._preview))
        if note or self._note:
            found.append(Part("assistant", turn, None, note or self._note))
        return found


def read_file(file: str | Path) -> Segment:
    """A file that was dropped or recorded; RequestError says what is wrong, in terms of its name."""
    path = Path(file)
    try:
        return open_segment(path)
    except (ValueError, OSError) as error:
        raise RequestError(str(error).replace(str(path), path.name)) from error


def describe(segment: Segment) -> str:
    """A medium in words, for a caption and for those who do not see it."""
    if isinstance(segment, Image):
        return f"image, {segment.width} × {segment.height} px"
    if isinstance(segment, Speech):
        return f"speech, {segment.seconds:.1f} s"
    if isinstance(segment, Video):
        return f"video, {len(segment.frames)} frames, {segment.seconds:.1f} s"
    if isinstance(segment, DNA):
        return f"DNA, {len(segment.bases)} bases" + (f", {segment.name}" if segment.name else "")
    return segment.kind


def enlarged(segment: Segment) -> Segment:
    """A small image or video at a size that is easy to see, each pixel a square; others as they are."""
    if not isinstance(segment, Image | Video):
        return segment
    pixels = segment.pixels if isinstance(segment, Image) else segment.frames
    factor = max(1, round(DISPLAY_PX / min(pixels.shape[-3:-1])))
    grown = np.repeat(np.repeat(pixels, factor, -3), factor, -2)
    return Image(grown) if isinstance(segment, Image) else Video(grown, segment.frame_rate_hz)


def settings_of(
    temperature: float | None, cfg_scale: float | None, seed: float | None, max_new_tokens: float | None
) -> Mapping[str, Any]:
    """Settings of the page as options of `generate`; what is empty is left to the checkpoint."""
    return {
        "temperature": temperature,
        "cfg_scale": cfg_scale,
        "seed": None if seed is None else int(seed),
        "max_new_tokens": None if max_new_tokens is None else int(max_new_tokens),
    }


def _title(number: int, chat: Chat) -> str:
    said = next((turn.content for turn in chat.turns if turn.role == "user"), [])
    words = next((one.text for one in said if isinstance(one, Text)), "")
    name = " ".join(words.split()) or ", ".join(one.kind for one in said) or "new"
    return f"{number + 1}: {name if len(name) <= TITLE else name[: TITLE - 1] + '…'}"
