"""Typed events while a reply is being made.

Text comes in pieces that are whole characters: a token may end inside a UTF-8 sequence, so bytes wait until
their character is complete. Media come whole, since a decoder needs all codes. Joined text deltas and
finished segments are what `generate` returns.
"""

import codecs
from dataclasses import dataclass

from anytoken.inference.reply import Usage
from anytoken.processor import Processor
from anytoken.segments import Segment, Text


@dataclass(frozen=True)
class SegmentStarted:
    """A segment of this kind begins."""

    kind: str


@dataclass(frozen=True)
class TextDelta:
    """The next characters of the running text segment."""

    text: str


@dataclass(frozen=True)
class SegmentFinished:
    """A whole segment."""

    segment: Segment


Event = SegmentStarted | TextDelta | SegmentFinished | Usage


class SegmentStream:
    """Turns ids into events, one id at a time, and collects the finished segments."""

    def __init__(self, processor: Processor) -> None:
        self.segments: list[Segment] = []
        self._processor = processor
        space = processor.token_space
        self._opens = {space.open_token(name): name for name in space.modalities}
        self._closes = {space.close_token(name) for name in space.modalities}
        self._end = space.end
        self._media: list[int] = []
        self._text: list[str] | None = None
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> list[Event]:
        """The events that one more id brings."""
        if self._media:
            self._media.append(token)
            return self._finish_media() if token in self._closes else []
        if token in self._opens:
            self._media = [token]
            return [*self._finish_text(), SegmentStarted(self._opens[token])]
        if token == self._end:
            return self._finish_text()
        events: list[Event] = []
        if self._text is None:
            self._text = []
            events.append(SegmentStarted("text"))
        return events + self._delta(self._bytes.decode(self._processor.text_tokenizer.id_bytes(token)))

    def _delta(self, piece: str) -> list[Event]:
        if not piece or self._text is None:
            return []
        self._text.append(piece)
        return [TextDelta(piece)]

    def _finish_text(self) -> list[Event]:
        if self._text is None:
            return []
        events = self._delta(self._bytes.decode(b"", final=True))
        text, self._text = Text("".join(self._text)), None
        self._bytes.reset()
        self.segments.append(text)
        return [*events, SegmentFinished(text)]

    def _finish_media(self) -> list[Event]:
        [segment] = self._processor.detokenize(self._media)
        self._media = []
        self.segments.append(segment)
        return [SegmentFinished(segment)]
