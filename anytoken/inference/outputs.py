"""The result of a generation: typed segments, their ids, and usage counts."""

import base64
import html
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from anytoken import moved
from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
from anytoken.token_space import TokenSpace

S = TypeVar("S", bound=Segment)


@dataclass(frozen=True)
class Usage:
    """Counts for one reply: prompt tokens, new tokens, new tokens by modality (controls count as text), seconds.

    `seconds` is measured from the call to the reply's last token; `tokens_per_second` is this reply's rate.
    """

    prompt_tokens: int
    new_tokens: int
    tokens: dict[str, int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens divided by seconds."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


def count_usage(space: TokenSpace, prompt_tokens: int, ids: list[int], seconds: float) -> Usage:
    """The usage of a reply with these ids."""
    counts = Counter(space.modality_of(torch.tensor(ids, dtype=torch.long)).tolist())
    tokens = {space.modality_names[index]: count for index, count in sorted(counts.items())}
    return Usage(prompt_tokens, len(ids), tokens, seconds)


@dataclass(frozen=True)
class GenerationOutput:
    """One reply: `segments` in order, the `ids` they were decoded from, `usage`, and `finish_reason`.

    finish_reason is "stop", or "length" if max_new_tokens or the context limit ended it. steps: intermediate segments
    (`via` in `Options`); the ids contain them, too.
    """

    segments: list[Segment]
    ids: list[int] = field(repr=False)
    usage: Usage = field(repr=False)
    finish_reason: str
    steps: list[Segment] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """The text of the reply, joined."""
        return "".join(segment.text for segment in self.of(Text))

    @property
    def images(self) -> list[Image]:
        """The images, in order."""
        return self.of(Image)

    @property
    def speech(self) -> list[Speech]:
        """The spoken clips, in order."""
        return self.of(Speech)

    @property
    def videos(self) -> list[Video]:
        """The videos, in order."""
        return self.of(Video)

    @property
    def dna(self) -> list[DNA]:
        """The DNA sequences, in order."""
        return self.of(DNA)

    def of(self, segment_type: type[S]) -> list[S]:
        """The segments of one type, in order, for kinds of plug-in modalities."""
        return [segment for segment in self.segments if isinstance(segment, segment_type)]

    def _repr_html_(self) -> str:
        return "".join(f"<div>{segment_html(segment)}</div>" for segment in self.segments)


def segment_html(segment: Segment) -> str:
    """A segment as HTML for a notebook."""
    if hasattr(segment, "_repr_html_"):
        return str(segment._repr_html_())
    if hasattr(segment, "_repr_png_"):
        return f"<img src='data:image/png;base64,{base64.b64encode(segment._repr_png_()).decode()}'>"
    return html.escape(repr(segment))


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
