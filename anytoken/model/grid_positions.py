"""Learned embeddings of the row, column, step and codebook of the next code, added to those of the ids.

Rotary positions say how far apart two ids are in the sequence; that a code lies below another, or is the same codebook
a frame later, follows only from the header and a count. These embeddings say it (rows and columns as for the image
tokens of DALL-E, arXiv 2102.12092). Each id gets the place of the code that comes after it, not its own: that is what
the model is asked for there, it tells a row's end and a first code apart on grids of any size, and the id says its own
codebook already.

Places follow from the ids alone, as in the grammar: an open id, the sizes, the global codes, then frame after frame.
`code_places` finds those of whole rows at once, `CodeWalk` those of one sequence id by id, for a key-value cache that
holds what came before.

Shapes: B batch, T tokens, H hidden, Q codebooks; 4 axes. A place is int64 [4], each number one more than the index
along its axis, 0 where there is none: an image's codes have no step, a run's no row and column, other ids no place.
Global code g counts as codebook Q + g.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from anytoken.data.packing import sample_starts
from anytoken.grammar_tables import longest
from anytoken.tokenizers.codes import CodeGrid

if TYPE_CHECKING:
    from anytoken.model.configuration import AnyTokenConfig
    from anytoken.token_space import TokenSpace

AXES = ("row", "column", "step", "codebook")
Place = tuple[int, int, int, int]
NOWHERE: Place = (0, 0, 0, 0)


def code_layout(space: TokenSpace) -> dict[str, Any]:
    """The layout of codes in a token space, as JSON-ready data for the model's configuration."""
    found = []
    for name, shape in space.shapes.items():
        books = [space.code_range(name, book) for book in range(shape.num_codebooks)]
        found.append({
            "open": space.open_token(name),
            "axes": len(shape.axes) if isinstance(shape, CodeGrid) else 0,
            "global_codes": shape.num_global_codes,
            "codebooks": [[book.start, book.stop] for book in books],
            "delayed": shape.order == "delay",
            "most_frames": longest(shape),
        })  # fmt: skip
    return {"size_zero": space.size_token(1) - 1, "modalities": found}


class PlaceEmbedding(nn.Embedding):
    """Embeddings of the indices along one axis, from 1 to `size`; zero for index 0."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size + 1, width, padding_idx=0)


class GridPositions(nn.Module):
    """The embeddings of places [..., 4] as [..., H]; an index beyond a table gets its last row.

    They are initialized to zero, so they have no effect before training.
    """

    def __init__(self, config: AnyTokenConfig) -> None:
        super().__init__()
        sizes = config.grid_positions or {}
        self.sizes = {axis: sizes[axis] for axis in AXES if axis in sizes}
        self.tables = nn.ModuleDict(
            {axis: PlaceEmbedding(size, config.hidden_size) for axis, size in self.sizes.items()}
        )

    def forward(self, places: Tensor) -> Tensor:
        """places [..., 4] to embeddings [..., H]."""
        parts = []
        for axis, table in self.tables.items():
            last = self.sizes[axis]
            parts.append(table(places[..., AXES.index(axis)].clamp(max=last)))
        return torch.stack(parts).sum(0)


# ---- one sequence, id by id ----


class CodeWalk:
    """The place of the code after each id of a sequence."""

    def __init__(self, layout: Mapping[str, Any]) -> None:
        self._size_zero = layout["size_zero"]
        self._opens = {one["open"]: one for one in layout["modalities"]}
        self._segment: dict[str, Any] | None = None
        self._since = 0  # ids after the open one
        self._sizes: list[int] = []
        self._counts: list[int] = []  # codes of each codebook
        self._book = 0  # of the last code

    @classmethod
    def of(cls, lm: Any) -> CodeWalk | None:
        """The walk of a language model; None for one without grid positions, of any architecture."""
        return cls(lm.config.code_layout) if getattr(lm.config, "grid_positions", None) else None

    def copy(self) -> CodeWalk:
        """Another walk that stands at the same id."""
        other = object.__new__(CodeWalk)
        other.__dict__ |= self.__dict__ | {"_sizes": [*self._sizes], "_counts": [*self._counts]}
        return other

    def step(self, token: int) -> Place:
        """The place of the code after this id, the next of the sequence; see the module's docstring."""
        if token in self._opens:
            self._segment = self._opens[token]
            self._since, self._sizes, self._counts = 0, [], [0] * len(self._segment["codebooks"])
        elif self._segment is None or token == self._segment["open"] + 1:
            self._segment = None
            return NOWHERE
        else:
            self._read(self._segment, token)
        return self._next(self._segment)

    def _read(self, segment: dict[str, Any], token: int) -> None:
        self._since += 1
        if self._since <= segment["axes"]:
            self._sizes.append(max(token - self._size_zero, 1))
            return
        for book, (start, stop) in enumerate(segment["codebooks"]):
            if start <= token < stop:
                self._counts[book] += 1
                self._book = book

    def _next(self, segment: dict[str, Any]) -> Place:
        books, after_sizes = len(segment["codebooks"]), self._since - segment["axes"]
        if after_sizes < 0:
            return NOWHERE
        if after_sizes < segment["global_codes"]:
            return (0, 0, 0, books + after_sizes + 1)
        frames = math.prod(self._sizes) if self._sizes else segment["most_frames"]
        frame, book = divmod(after_sizes - segment["global_codes"], books)
        if segment["delayed"] and any(self._counts):
            frame, book = self._next_delayed(frames, books)
        if frame >= frames or book >= books:
            return NOWHERE
        if not self._sizes:
            return (0, 0, frame + 1, book + 1)
        rest, column = divmod(frame, self._sizes[-1])
        step, row = divmod(rest, self._sizes[-2]) if len(self._sizes) > 1 else (-1, -1)
        return (row + 1, column + 1, step + 1 if len(self._sizes) > 2 else 0, book + 1)

    def _next_delayed(self, frames: int, books: int) -> tuple[int, int]:
        """Frame and codebook after a code of the delay pattern; while a run continues, as in the longest one.

        Codes on one diagonal are written together: codebook q of frame d - q for all q.
        """
        frame, book, begun = self._counts[self._book] - 1, self._book, self._counts[0]
        diagonal = frame + book
        if frame > 0 and book + 1 < books:
            return frame - 1, book + 1
        if begun == diagonal + 1 and begun < frames:
            return begun, 0
        return begun - 1, diagonal + 2 - begun


# ---- whole rows at once ----


class Tables(NamedTuple):
    """What is looked up, on a device: by id the modality that it opens or closes, or -1, and its codebook, or -1.

    shape: int64 [M, 5], of each modality the numbers of axes, global codes and codebooks, whether they are delayed, and
    the most frames. most_axes, most_books: of any modality, the latter 0 where none is delayed.
    """

    opened: Tensor
    closed: Tensor
    book: Tensor
    shape: Tensor
    size_zero: int
    most_axes: int
    most_books: int


def tables(config: AnyTokenConfig, device: torch.device) -> Tables:
    """The tables of a model's code layout, made once for each device."""
    return _tables(json.dumps(config.code_layout), config.vocab_size, device)


@lru_cache(maxsize=16)
def _tables(layout: str, vocab_size: int, device: torch.device) -> Tables:
    known = json.loads(layout)
    with torch.inference_mode(False):  # one that is made for inference would be refused in training
        opened, closed, book = (torch.full((vocab_size,), -1) for _ in range(3))
        shape = []
        for number, one in enumerate(known["modalities"]):
            opened[one["open"]] = closed[one["open"] + 1] = number
            for place, (start, stop) in enumerate(one["codebooks"]):
                book[start:stop] = place
            shape.append(
                [one["axes"], one["global_codes"], len(one["codebooks"]), one["delayed"], one["most_frames"]]
            )
        most_axes = max(axes for axes, *_ in shape)
        most_books = max(books for _, _, books, *_ in shape) if any(one[3] for one in shape) else 0
        opened, closed, book, limits = (one.to(device) for one in (opened, closed, book, torch.tensor(shape)))
        return Tables(opened, closed, book, limits, known["size_zero"], most_axes, most_books)


def code_places(config: AnyTokenConfig, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The places of the codes after ids [B, T], int64 [B, T, 4]; see the module's docstring.

    position_ids: [B, T] or [1, T]; where they do not count on, another sample begins.
    """
    known = tables(config, input_ids.device)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = input_ids.new_zeros(1, 1)
    if position_ids is not None:
        starts = (sample_starts(position_ids) * columns).cummax(1).values
    opened = known.opened[input_ids]
    at = torch.where(opened >= 0, columns, -1).cummax(1).values  # of the last open id
    ended = torch.where(known.closed[input_ids] >= 0, columns, -1).cummax(1).values
    inside, at = (at > ended) & (at >= starts), at.clamp(min=0)
    axes, globals_, books, delayed, most = known.shape[opened.gather(1, at).clamp(min=0)].unbind(-1)
    after_sizes = columns - at - axes
    sizes = _sizes(known, input_ids, at, axes)  # step, row, column; 1 where there is no such axis
    frames = torch.where(axes > 0, sizes.prod(-1), most)
    read = (after_sizes - globals_).clamp(min=0)
    frame, book = read // books, read % books
    if known.most_books:
        frame_delayed, book_delayed = _next_delayed(known, input_ids, at, frames, books)
        late = (delayed > 0) & (read > 0)
        frame, book = torch.where(late, frame_delayed, frame), torch.where(late, book_delayed, book)
    local = inside & (after_sizes >= globals_) & (frame < frames) & (book < books)
    heading = inside & (after_sizes >= 0) & (after_sizes < globals_)
    row_and_column = sizes[..., 1] * sizes[..., 2]
    found = (
        torch.where(axes > 1, frame % row_and_column // sizes[..., 2] + 1, 0),
        torch.where(axes > 0, frame % sizes[..., 2] + 1, 0),
        torch.where(axes == 0, frame + 1, torch.where(axes > 2, frame // row_and_column + 1, 0)),
        book + 1,
    )
    places = torch.stack(found, -1) * local[..., None]
    places[..., 3] += (books + after_sizes + 1) * heading
    return places


def _sizes(known: Tables, ids: Tensor, at: Tensor, axes: Tensor) -> Tensor:
    """Cells along step, row and column, [B, T, 3], of the segment that opens at [B, T]; further axes count as steps."""
    found = torch.ones(*ids.shape, 3, dtype=torch.long, device=ids.device)
    for axis in range(known.most_axes):
        size = (ids.gather(1, (at + 1 + axis).clamp(max=ids.shape[1] - 1)) - known.size_zero).clamp(min=1)
        slot = (axis - axes + 3).clamp(min=0)[..., None]
        there = torch.where(axis < axes, size, 1)[..., None]
        found = found.scatter(2, slot.clamp(max=2), found.gather(2, slot.clamp(max=2)) * there)
    return found


def _next_delayed(
    known: Tables, ids: Tensor, at: Tensor, frames: Tensor, books: Tensor
) -> tuple[Tensor, Tensor]:
    """`CodeWalk._next_delayed` of all ids; anything for those that are no local codes."""
    book = known.book[ids]
    counts = (book[..., None] == torch.arange(known.most_books, device=ids.device)).cumsum(1)
    counts = counts - counts.gather(1, at[..., None].expand_as(counts))
    book = book.clamp(min=0)
    frame, begun = counts.gather(2, book[..., None])[..., 0] - 1, counts[..., 0]
    diagonal = frame + book
    same = (frame > 0) & (book + 1 < books)
    more = (begun == diagonal + 1) & (begun < frames)
    after = torch.where(more, begun, begun - 1), torch.where(more, 0, diagonal + 2 - begun)
    return torch.where(same, frame - 1, after[0]), torch.where(same, book + 1, after[1])
