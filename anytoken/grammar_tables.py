"""What the grammar looks up instead of working it out at every id: token ranges, compiled once.

A `SegmentTable` holds one modality's ids and limits; a `TaskTable` what a reply's output kinds need and offer at each
of its steps; `loss_classes` the coarse allowed sets of the grammar-restricted loss. `grammar.py` walks over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, CodeShape, codebook_pattern
from anytoken.utils.errors import TokenSpaceError

Span = tuple[int, int]
Ranges = tuple[Span, ...]
Size = tuple[int, ...]
ROLES = ("system", "user", "assistant")


class Task(NamedTuple):
    """What a reply is to hold: its kinds in order (None: the model decides), and grid sizes that are pinned."""

    output_kinds: tuple[str, ...] | None = None
    sizes: tuple[tuple[str, Size], ...] = ()


def checked_task(
    space: TokenSpace, output_kinds: Sequence[str] | None, sizes: Mapping[str, Sequence[int]]
) -> Task:
    """A task that can be done; TokenSpaceError for an unknown kind, two texts in a row, or an impossible size."""
    return Task(
        None if output_kinds is None else _checked_kinds(space, output_kinds), _checked_sizes(space, sizes)
    )


def _checked_kinds(space: TokenSpace, output_kinds: Sequence[str]) -> tuple[str, ...]:
    kinds = (output_kinds,) if isinstance(output_kinds, str) else tuple(output_kinds)
    choices = ", ".join(space.modality_names)
    if not kinds:
        raise TokenSpaceError(f"output_kinds is empty; name at least one of {choices}, or pass None.")
    for before, kind in zip(("", *kinds), kinds, strict=False):
        if kind not in space.modality_names:
            raise TokenSpaceError(f"Unknown kind {kind!r} in output_kinds; allowed: {choices}.")
        if kind == before == "text":
            raise TokenSpaceError(
                f"output_kinds {list(kinds)} has two texts in a row, which are one text; merge them."
            )
    return kinds


def _checked_sizes(space: TokenSpace, sizes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, Size], ...]:
    grids = {name: shape for name, shape in space.shapes.items() if isinstance(shape, CodeGrid)}
    pinned = {name: tuple(int(n) for n in size) for name, size in sizes.items()}
    for name, size in pinned.items():
        if name not in grids:
            known = ", ".join(grids) or "none"
            raise TokenSpaceError(f"sizes pins {name!r}, which has no grid; modalities with one: {known}.")
        limits = list(zip(grids[name].axes, grids[name].min_size, grids[name].max_size, strict=True))
        fits = (low <= n <= high for n, (_, low, high) in zip(size, limits, strict=False))
        if len(size) != len(limits) or not all(fits):
            extent = ", ".join(f"{axis} {low} to {high}" for axis, low, high in limits)
            raise TokenSpaceError(f"{name} cannot have the size {size}; allowed: {extent}.")
    return tuple(sorted(pinned.items()))


class SegmentTable:
    """One modality's ids and limits."""

    def __init__(self, space: TokenSpace, name: str) -> None:
        self.name = name
        self.shape: CodeShape = space.shapes[name]
        self.open, self.close = space.open_token(name), space.close_token(name)
        self.num_codebooks = self.shape.num_codebooks
        books = [space.code_range(name, codebook) for codebook in range(self.num_codebooks)]
        self.starts = np.array([book.start for book in books])
        self.codes: list[Ranges] = [((book.start, book.stop),) for book in books]
        self.num_global_codes = self.shape.num_global_codes
        spans = [space.global_range(name)] if self.num_global_codes else []
        self.global_start = spans[0].start if spans else 0
        self.global_codes: Ranges = tuple((span.start, span.stop) for span in spans)
        self.close_only: Ranges = (one(self.close),)
        # What may stand where a run's next frame could begin: its close id, or, delayed, the rest of the frames before.
        self.delayed = self.num_codebooks > 1 and self.shape.order == "delay"
        self.ending: Ranges = self.codes[1] if self.delayed else self.close_only
        self.code_or_ending = merge_ranges([*self.ending, *self.codes[0]])
        self._orders: dict[int, np.ndarray] = {}

    def order(self, frames: int) -> np.ndarray:
        """`codebook_pattern` of this many frames; kept."""
        if frames not in self._orders:
            self._orders[frames] = codebook_pattern(self.shape, frames)
        return self._orders[frames]

    def place(self, total: int, read: int) -> tuple[int, int]:
        """Frame and codebook of the local code after `read` ones; total: all of the segment, 0 if not yet known.

        While a run continues, its codes stand as in the longest one.
        """
        if not self.delayed:
            return divmod(read, self.num_codebooks)
        frames = total // self.num_codebooks or longest(self.shape)
        order = self.order(frames)
        return divmod(int(order[read]), self.num_codebooks) if read < len(order) else (frames, 0)


class TaskTable:
    """A task compiled: grid limits, and what each output kind, or free content, needs and offers.

    limits: smallest and largest grid size of each modality. tails[i]: the fewest ids that parts i, i + 1... of
    output_kinds and the end id take.
    """

    def __init__(self, space: TokenSpace, task: Task) -> None:
        pins = dict(task.sizes)
        self.output_kinds = task.output_kinds
        self.limits: dict[str, tuple[Size, Size]] = {}
        shortest = {"text": 1}
        for name, shape in space.shapes.items():
            if isinstance(shape, CodeGrid):
                pin = pins.get(name)
                self.limits[name] = (pin or shape.min_size, pin or shape.max_size)
            frames = math.prod(self.limits[name][0]) if isinstance(shape, CodeGrid) else shape.min_length
            shortest[name] = segment_length(shape, frames)
        self.tails = [1]
        for kind in reversed(task.output_kinds or ()):
            self.tails.insert(0, self.tails[0] + shortest[kind])
        self._compile_free(space, shortest)
        self._compile_plan(space)

    def _compile_free(self, space: TokenSpace, shortest: Mapping[str, int]) -> None:
        """For free content the answer changes only at a few budgets, so all answers are kept.

        A budget of thresholds[i] up to thresholds[i + 1] - 1 has the i-th answer of each table.
        """
        needs = [(2, span) for span in space.text_ranges]
        needs += [(shortest[name] + 1, one(space.open_token(name))) for name in space.shapes]
        self.thresholds = sorted({1, *(need for need, _ in needs)})
        fitting = [[span for need, span in needs if need <= budget] for budget in self.thresholds]
        self.begin_turn = [merge_ranges(spans) for spans in fitting]
        self.begin_user = [merge_ranges([*spans, one(space.null)]) for spans in fitting]
        self.go_on = [merge_ranges([*spans, one(space.end)]) for spans in fitting]

    def _compile_plan(self, space: TokenSpace) -> None:
        """begin[i]: the ids that begin output kind i (the end id after the last); or_text: those and text.

        exits[i]: all other ids that would end a text before part i, which is a medium.
        """
        text = space.text_ranges
        first = [
            text if kind == "text" else (one(space.open_token(kind)),) for kind in self.output_kinds or ()
        ]
        self.begin: list[Ranges] = [*first, (one(space.end),)]
        self.or_text = [merge_ranges([*text, *spans]) for spans in self.begin]
        ends = {space.end, *map(space.open_token, space.shapes)}
        others = [ends - {spans[0][0]} for spans in self.begin[:-1]]
        self.exits: list[Ranges] = [*(merge_ranges(map(one, found)) for found in others), ()]


def loss_classes(space: TokenSpace, segments: Iterable[SegmentTable]) -> list[Ranges]:
    """Disjoint sets of ids: each holds all that `allowed` offers wherever one of its own ids stands.

    Content (text, end, null, the open ids) | roles | sizes | a modality's global codes | each codebook, a run's first
    one with its close id, or with the second where it is delayed | close ids of grids and delayed runs, bos and pad,
    each alone.
    """
    opens = [one(space.open_token(name)) for name in space.shapes]
    sets: list[Ranges] = [
        merge_ranges([*space.text_ranges, one(space.end), one(space.null), *opens]),
        role_ranges(space),
        ((space.size_token(1), space.size_token(space.max_size_token) + 1),),
        (one(space.bos),),
        (one(space.pad),),
    ]
    for segment in segments:
        if isinstance(segment.shape, CodeGrid):
            sets += [segment.close_only, *segment.codes]
        else:
            sets += [segment.code_or_ending, *segment.codes[2 if segment.delayed else 1 :]]
            sets += [segment.close_only] if segment.delayed else []
        sets += [segment.global_codes] if segment.num_global_codes else []
    return sets


def longest(shape: CodeShape) -> int:
    """The maximum number of frames in a segment."""
    return math.prod(shape.max_size) if isinstance(shape, CodeGrid) else shape.max_length


def role_ranges(space: TokenSpace) -> Ranges:
    """The ids that begin a turn."""
    return merge_ranges(one(getattr(space, role)) for role in ROLES)


def segment_length(shape: CodeShape, frames: int) -> int:
    """Ids of one segment of this many frames with its open, size and close ids and its global codes."""
    axes = len(shape.axes) if isinstance(shape, CodeGrid) else 0
    return 2 + axes + shape.num_global_codes + frames * shape.num_codebooks


def one(token: int) -> Span:
    """A single id as a half-open span."""
    return (token, token + 1)


def merge_ranges(spans: Iterable[Span]) -> Ranges:
    """Sort half-open spans and join those that touch or overlap."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
