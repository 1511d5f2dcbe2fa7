"""Typed events of a reply while it is generated, emitted as soon as available.

Text arrives in whole characters: a token may end inside a UTF-8 sequence, so bytes wait until their character is
complete. Media report progress and, if possible, partial results: a sequence whose tokenizer decodes spans
(`ModalityTokenizer.lookahead`) arrives piece by piece, audio before the clip ends; a grid is previewed a few times.
Other media arrive at the end. Joined text deltas and finished segments equal the result of `generate`.
"""

import codecs
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import TypeVar

import numpy as np
import torch

from anytoken.inference.outputs import Usage
from anytoken.processor import Processor
from anytoken.segments import Segment, Text
from anytoken.tokenizers.base import CodeGrid, Codes

CHUNK = 10  # codes of a run in one delta: a fifth of a second of speech
PARTS = 4  # of a grid; a preview follows each but the last
T = TypeVar("T")


@dataclass(frozen=True)
class SegmentStarted:
    """A segment of this kind begins."""

    kind: str


@dataclass(frozen=True)
class TextDelta:
    """The next characters of the current text segment."""

    text: str


@dataclass(frozen=True)
class SegmentProgress:
    """`done` of `total` codes of the current medium are generated; `total` is None if its length is not fixed."""

    kind: str
    done: int
    total: int | None


@dataclass(frozen=True, eq=False)
class _Partial:
    """A part of the current medium; `segment` is decoded on first access only."""

    kind: str
    decode: Callable[[], Segment] = field(repr=False)

    @cached_property
    def segment(self) -> Segment:
        """The part as a segment."""
        with torch.no_grad():
            return self.decode()


class SegmentDelta(_Partial):
    """The next piece of the current medium, such as audio; the joined pieces are the finished segment."""


class SegmentPreview(_Partial):
    """A preview of the current medium, such as an image, until the next preview or the finished segment."""


@dataclass(frozen=True)
class SegmentFinished:
    """A complete segment."""

    segment: Segment


Event = SegmentStarted | TextDelta | SegmentProgress | SegmentDelta | SegmentPreview | SegmentFinished | Usage


def finish(events: Generator[Event, None, T], see: Callable[[Event], None] | None = None) -> T:
    """Consume a stream, pass each event to `see`, and return the reply."""
    with closing(events):
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                return end.value
            if see is not None:
                see(event)


class SegmentStream:
    """Converts ids to events, one id at a time, and collects the finished segments.

    Segments that are steps of a chain are collected as `steps` and cause no events.
    """

    def __init__(self, processor: Processor) -> None:
        self.segments: list[Segment] = []
        self.steps: list[Segment] = []
        self._is_step = False  # of the segment in progress
        self._processor = processor
        space = processor.token_space
        self._opens = {space.open_token(name): name for name in space.modalities}
        self._closes = {space.close_token(name) for name in space.modalities}
        self._end = space.end
        self._medium: _Medium | None = None
        self._text: list[str] | None = None
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, step: bool = False) -> list[Event]:
        """The events that the next id causes; step: whether the segment that it begins is a step of a chain."""
        if self._medium is not None:
            if token not in self._closes:
                return self._shown(list(self._medium.push(token)))
            return self._finish_medium(self._medium)
        if token in self._opens:
            self._medium = _Medium(self._processor, self._opens[token])
            events = self._finish_text()
            self._is_step = step
            return [*events, *self._shown([SegmentStarted(self._opens[token])])]
        if token == self._end:
            return self._finish_text()
        events = []
        if self._text is None:
            self._text, self._is_step = [], step
            events.append(SegmentStarted("text"))
        piece = self._bytes.decode(self._processor.text_tokenizer.id_bytes(token))
        return self._shown([*events, *self._delta(piece)])

    def _shown(self, events: list[Event]) -> list[Event]:
        return [] if self._is_step else events

    def _collect(self, segment: Segment) -> None:
        (self.steps if self._is_step else self.segments).append(segment)

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
        self._collect(text)
        return self._shown([*events, SegmentFinished(text)])

    def _finish_medium(self, medium: "_Medium") -> list[Event]:
        with torch.no_grad():
            segment = medium.tokenizer.decode(medium.codes())
        self._medium = None
        self._collect(segment)
        return self._shown([*medium.rest(), SegmentFinished(segment)])


class _Medium:
    """A medium in progress: its codes so far, and the part that can already be decoded."""

    def __init__(self, processor: Processor, kind: str) -> None:
        self.kind, self.tokenizer = kind, processor.tokenizers[kind]
        segment = processor.grammar.segments[kind]
        self._starts, self._global_start = segment.starts, segment.global_start
        self._num_global_codes = segment.num_global_codes
        self._axes = len(self.tokenizer.shape.axes) if isinstance(self.tokenizer.shape, CodeGrid) else 0
        self._size_zero = processor.token_space.size_token(1) - 1
        self._size: list[int] = []
        self._header: list[int] = []
        self._books: list[list[int]] = [
            [] for _ in self._starts
        ]  # in any order each codebook goes frame by frame
        self._sent = 0  # codes that went out in deltas

    def codes(self) -> Codes:
        """The codes so far, in complete frames."""
        frames = len(self._books[-1])
        values = np.array([book[:frames] for book in self._books]).T
        return Codes(values, tuple(self._size), np.array(self._header, dtype=np.int64))

    def push(self, token: int) -> Iterator[Event]:
        """Add an id of the size header, the global codes or the local codes."""
        if len(self._size) < self._axes:
            self._size.append(token - self._size_zero)
            return
        if len(self._header) < self._num_global_codes:
            self._header.append(token - self._global_start)
            return
        book = int(np.searchsorted(self._starts, token, "right")) - 1
        self._books[book].append(token - int(self._starts[book]))
        if book == len(self._starts) - 1:
            done = len(self._books[-1])
            yield from self._grid_events(done) if self._axes else self._run_events(done)

    def _grid_events(self, done: int) -> Iterator[Event]:
        total, row = prod(self._size), self._size[-1]
        if done % row:
            return
        yield SegmentProgress(self.kind, done, total)
        if done < total and done * PARTS // total > (done - row) * PARTS // total:
            yield SegmentPreview(self.kind, partial(self.tokenizer.preview, self.codes()))

    def _run_events(self, done: int) -> Iterator[Event]:
        if done % CHUNK == 0:
            yield SegmentProgress(self.kind, done, None)
        ahead = self.tokenizer.lookahead
        if ahead is not None and done - ahead - self._sent >= CHUNK:
            yield self._delta_until(done - ahead)

    def rest(self) -> Iterator[Event]:
        """The remaining part when the medium ends."""
        done = len(self._books[-1])
        if not self._axes and self.tokenizer.lookahead is not None and done > self._sent:
            yield self._delta_until(done)

    def _delta_until(self, stop: int) -> SegmentDelta:
        start, self._sent = self._sent, stop
        return SegmentDelta(self.kind, partial(self.tokenizer.decode_span, self.codes(), start, stop))
