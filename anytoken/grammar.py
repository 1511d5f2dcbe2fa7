"""The finite-state grammar of legal sequences, derived from what each tokenizer declares about its codes.

    bos ( role content end )*        role: system | user | assistant
    content: text ids and segments in any order, at least one; or `null` alone, in a user's turn
    segment: open (a size id per axis) codes close        for a Grid: exactly prod(size) * num_codebooks codes
             open codes close                             for a Run: whole frames between min and max length

One object serves decoding (`allowed` masks, so every emitted segment is valid), the head (which rows to compute),
the grammar-restricted loss (`loss_rows`) and training data (`validate`). `allowed` is the only place that knows
the rules; `advance` asks it. Given a budget it offers only ids after which the rest can still be finished, so a
segment that does not fit is not started. The state machine of Chameleon (arXiv 2405.09818) and the grid
header of Emu3 (arXiv 2409.18869), driven by declarations.

Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeShape, Grid

Ranges = tuple[tuple[int, int], ...]
ROLES = ("system", "user", "assistant")
CACHE = 1024  # plans and masks that are kept


class GrammarError(ValueError):
    """An id that is not legal where it stands, a plan or size that cannot be, or a budget that is too small."""


class Phase(IntEnum):
    """Where in a sequence a state is."""

    START = 0  # before bos
    TURNS = 1  # between turns; a conversation may end here
    CONTENT = 2  # in a turn, outside segments
    NULL = 3  # after a null prompt
    SIZE = 4  # in a segment's size header
    CODES = 5  # in a segment's codes, or before its close id
    DONE = 6  # after the end of a reply


START, TURNS, CONTENT, NULL, SIZE, CODES, DONE = Phase  # bare names: a look-up less per id


class Task(NamedTuple):
    """What a reply is to hold: its kinds in order (None: the model decides), and grid sizes that are pinned."""

    plan: tuple[str, ...] | None = None
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()


class State(NamedTuple):
    """A place in the grammar; immutable and hashable.

    role: of the open turn. kind: modality of the open segment. size: the header read so far. total: codes of
    the open segment (0: a run's, not fixed). read: codes read of the open segment; outside segments whether
    the turn (with a plan: the plan's current text) has begun. task: None in a conversation, set in a reply.
    step: which part of the plan is current.
    """

    phase: Phase
    role: str = ""
    kind: str = ""
    size: tuple[int, ...] = ()
    total: int = 0
    read: int = 0
    task: Task | None = None
    step: int = 0


class Piece(NamedTuple):
    """One part of a parsed sequence: `values` are text ids int64 [N], or codes int64 [N, Q] of grid size `size`."""

    kind: str
    values: np.ndarray
    size: tuple[int, ...]
    role: str


class _Segment:
    """One modality's ids and limits, looked up once."""

    def __init__(self, space: TokenSpace, name: str) -> None:
        self.name = name
        self.shape: CodeShape = space.shapes[name]
        self.open, self.close = space.open_token(name), space.close_token(name)
        self.num_codebooks = self.shape.num_codebooks
        books = [space.code_range(name, codebook) for codebook in range(self.num_codebooks)]
        self.starts = np.array([book.start for book in books])
        self.codes: list[Ranges] = [((book.start, book.stop),) for book in books]
        self.end_only: Ranges = ((self.close, self.close + 1),)
        self.code_or_end = merge_ranges([*self.end_only, *self.codes[0]])


class _Rules:
    """What a task asks for, compiled: sizes per modality, and what each step needs and offers."""

    def __init__(self, grammar: Grammar, task: Task) -> None:
        space, pins = grammar.token_space, dict(task.sizes)
        self.plan = task.plan
        self.limits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        shortest = {"text": 1}
        for name, shape in space.shapes.items():
            if isinstance(shape, Grid):
                self.limits[name] = (
                    (pins[name], pins[name]) if name in pins else (shape.min_size, shape.max_size)
                )
            shortest[name] = segment_length(shape, pins.get(name))
        # tails[i]: ids that parts i, i+1... and the end id take at least
        self.tails = [1]
        for kind in reversed(task.plan or ()):
            self.tails.insert(0, self.tails[0] + shortest[kind])
        # Free content: what fits changes only at these budgets, so there are few different answers.
        text = (0, space.text_size)
        end = (space.end, space.end + 1)
        opens = [
            (shortest[name] + 1, (segment.open, segment.open + 1))
            for name, segment in grammar.segments.items()
        ]
        self.thresholds = sorted({1, 2, *(need for need, _ in opens)})
        fitting = [
            [span for need, span in [(2, text), *opens] if need <= budget] for budget in self.thresholds
        ]
        self.begin_turn = [merge_ranges(spans) for spans in fitting]
        self.go_on = [merge_ranges([*spans, end]) for spans in fitting]
        null = (space.null, space.null + 1)
        self.begin_user = [merge_ranges([*spans, null] if spans else []) for spans in fitting]
        self.after_step = [self._following(grammar, step) for step in range(len(self.tails))]

    def _following(self, grammar: Grammar, step: int) -> tuple[Ranges, Ranges]:
        """With a plan: the ids that may begin part `step` (the end id after the last), without and with more text."""
        space = grammar.token_space
        plan = self.plan or ()
        kind = plan[step] if step < len(plan) else None
        token = space.end if kind is None else 0 if kind == "text" else space.open_token(kind)
        span = (0, space.text_size) if kind == "text" else (token, token + 1)
        return (span,), merge_ranges([(0, space.text_size), span])


class Grammar:
    """The state machine over a token space as it is now; make a new one after appending a modality."""

    def __init__(self, token_space: TokenSpace) -> None:
        self.token_space = token_space
        self.vocab_size = token_space.vocab_size
        self.segments = {name: _Segment(token_space, name) for name in token_space.modalities}
        self._opens = {segment.open: segment for segment in self.segments.values()}
        self._roles = {getattr(token_space, role): role for role in ROLES}
        self._role_ranges = merge_ranges([(token, token + 1) for token in self._roles])
        self._end_only: Ranges = ((token_space.end, token_space.end + 1),)
        self._free = Task()
        self._rules: dict[Task, _Rules] = {}
        self.class_ranges, self._class_of = self._loss_classes()
        self._class_tables: dict[torch.device, Tensor] = {}
        self._masks: dict[Ranges, Tensor] = {}
        self._indices: dict[Ranges, Tensor] = {}

    # ---- where to begin ----

    def start(self) -> State:
        """Before a whole sequence: bos comes next."""
        return State(START)

    def reply(
        self, plan: Sequence[str] | None = None, sizes: Mapping[str, Sequence[int]] | None = None
    ) -> State:
        """Inside an assistant's turn that holds exactly the planned kinds in order, or anything for None.

        `sizes` pins the grid size of a modality. A text of the plan has at least one id. GrammarError for an
        unknown kind, two texts in a row (one text, to the grammar), or a size that the modality cannot have.
        """
        task = Task(None if plan is None else self._checked_plan(plan), self._checked_sizes(sizes or {}))
        return State(CONTENT, "assistant", task=task)

    def _checked_plan(self, plan: Sequence[str]) -> tuple[str, ...]:
        kinds = (plan,) if isinstance(plan, str) else tuple(plan)
        choices = self.token_space.modality_names
        if not kinds:
            raise GrammarError(f"The plan is empty; name at least one of {', '.join(choices)}, or pass None.")
        for before, kind in zip(("", *kinds), kinds, strict=False):
            if kind not in choices:
                raise GrammarError(f"Unknown kind {kind!r} in the plan; allowed: {', '.join(choices)}.")
            if kind == before == "text":
                raise GrammarError(
                    f"The plan {list(kinds)} has two texts in a row, which are one text; merge them."
                )
        return kinds

    def _checked_sizes(self, sizes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        grids = {name: one.shape for name, one in self.segments.items() if isinstance(one.shape, Grid)}
        pinned = []
        for name, size in sizes.items():
            if name not in grids:
                raise GrammarError(
                    f"sizes pins {name!r}, which has no grid; modalities with one: {', '.join(grids) or 'none'}."
                )
            shape, numbers = grids[name], tuple(int(n) for n in size)
            limits = list(zip(shape.min_size, shape.max_size, strict=True))
            if len(numbers) != len(limits) or not all(
                low <= n <= high for n, (low, high) in zip(numbers, limits, strict=True)
            ):
                allowed = ", ".join(
                    f"{axis} {low} to {high}" for axis, (low, high) in zip(shape.axes, limits, strict=True)
                )
                raise GrammarError(f"Size {numbers} of {name} is not possible; allowed: {allowed}.")
            pinned.append((name, numbers))
        return tuple(sorted(pinned))

    # ---- the rules ----

    def _rules_of(self, state: State) -> _Rules:
        task = state.task or self._free
        if task not in self._rules:
            _remember(self._rules, task, _Rules(self, task))
        return self._rules[task]

    def finished(self, state: State) -> bool:
        """Whether the sequence may stop here: a reply after its end id, a conversation between turns."""
        return state.phase is DONE or state.phase is TURNS

    def min_remaining(self, state: State) -> int:
        """The least number of ids that takes this state to a finished one; 0 if it is finished."""
        phase = state.phase
        if phase is CODES or phase is SIZE:
            return self._codes_left(state) + 1 + self._tail(state)
        if phase is CONTENT:
            rules = self._rules_of(state)
            if rules.plan is None:
                return 1 if state.read else 2
            return rules.tails[state.step + (1 if state.read else 0)]
        return 1 if phase is START or phase is NULL else 0

    def _tail(self, state: State) -> int:
        """Ids that have to follow the close id of the open segment."""
        if state.task is None or state.task.plan is None:
            return 1
        return self._rules_of(state).tails[state.step + 1]

    def _codes_left(self, state: State) -> int:
        """The least number of ids before the close id of the open segment."""
        segment, read = self.segments[state.kind], state.read
        if state.total:
            return state.total - read
        books = segment.num_codebooks
        if isinstance(segment.shape, Grid):
            low, known = self._rules_of(state).limits[state.kind][0], len(state.size)
            return len(low) - known + math.prod(state.size) * math.prod(low[known:]) * books
        return max(segment.shape.min_length * books - read, -read % books)

    def allowed(self, state: State, budget: int | None = None) -> Ranges:
        """The ids that may come next, as sorted, merged, half-open ranges; never empty unless finished.

        `budget`: how many ids may still be written, the next one included. Only ids after which the rest can
        be finished in budget - 1 are offered; GrammarError if there is none.
        """
        if budget is not None:
            least = self.min_remaining(state)
            if budget < least:
                raise GrammarError(
                    f"{budget} ids are left, but the shortest legal end takes {least} {self._where(state)}; "
                    f"allow at least {least} or plan less."
                )
        phase = state.phase
        if phase is CODES:
            return self._allowed_codes(state, budget)
        if phase is CONTENT:
            return self._allowed_content(state, budget)
        if phase is SIZE:
            return self._allowed_size(state, budget)
        if phase is TURNS:
            return self._role_ranges if budget is None or budget >= 3 else ()
        if phase is DONE:
            return ()
        return self._end_only if phase is NULL else ((self.token_space.bos, self.token_space.bos + 1),)

    def _allowed_codes(self, state: State, budget: int | None) -> Ranges:
        segment, read = self.segments[state.kind], state.read
        book = read % segment.num_codebooks
        if state.total:
            return segment.codes[book] if read < state.total else segment.end_only
        if book:
            return segment.codes[book]
        shape, books = segment.shape, segment.num_codebooks
        assert not isinstance(shape, Grid)
        frames = read // books
        if frames < shape.min_length:
            return segment.codes[0]
        more = frames < shape.max_length and (budget is None or budget > books + self._tail(state))
        return segment.code_or_end if more else segment.end_only

    def _allowed_size(self, state: State, budget: int | None) -> Ranges:
        lows, highs = self._rules_of(state).limits[state.kind]
        axis = len(state.size)
        low, high = lows[axis], highs[axis]
        if budget is not None:
            each = (
                math.prod(state.size) * math.prod(lows[axis + 1 :]) * self.segments[state.kind].num_codebooks
            )
            high = min(high, (budget - (len(lows) - axis) - 1 - self._tail(state)) // each)
        return ((self.token_space.size_token(low), self.token_space.size_token(high) + 1),)

    def _allowed_content(self, state: State, budget: int | None) -> Ranges:
        rules = self._rules_of(state)
        if rules.plan is None:
            table = (
                rules.go_on if state.read else rules.begin_user if state.role == "user" else rules.begin_turn
            )
            fits = len(table) if budget is None else bisect_right(rules.thresholds, budget)
            return table[fits - 1]
        if not state.read:
            return rules.after_step[state.step][0]
        following, with_text = rules.after_step[state.step + 1]
        return with_text if budget is None or budget > rules.tails[state.step + 1] else following

    # ---- walking ----

    def advance(self, state: State, token: int) -> State:
        """The state after one more id; GrammarError names the id, the place and what was allowed."""
        for start, stop in self.allowed(state):
            if start <= token < stop:
                break
        else:
            raise self._refusal(state, token)
        phase, role, kind, size, total, read, task, step = state
        if phase is CODES:
            if token == self.segments[kind].close:
                step, read = (step + 1, 0) if task and task.plan else (step, 1)
                return State(CONTENT, role, "", (), 0, read, task, step)
            return State(phase, role, kind, size, total, read + 1, task, step)
        if phase is CONTENT:
            return self._advance_content(state, token)
        if phase is SIZE:
            return self._advance_size(state, token)
        if phase is TURNS:
            return State(CONTENT, self._roles[token])
        return State(TURNS)  # after bos, or the end of a null prompt

    def _advance_content(self, state: State, token: int) -> State:
        role, task, step = state.role, state.task, state.step
        space = self.token_space
        if token < space.text_size:
            return State(CONTENT, role, "", (), 0, 1, task, step)
        if token == space.end:
            return State(TURNS) if task is None else State(DONE, role, task=task)
        if token == space.null:
            return State(NULL, role)
        segment = self._opens[token]
        if task and task.plan and state.read:  # the text before it was a part of its own
            step += 1
        phase = SIZE if isinstance(segment.shape, Grid) else CODES
        return State(phase, role, segment.name, (), 0, 0, task, step)

    def _advance_size(self, state: State, token: int) -> State:
        segment = self.segments[state.kind]
        size = (*state.size, token - self.token_space.size_token(1) + 1)
        assert isinstance(segment.shape, Grid)
        if len(size) < len(segment.shape.axes):
            return state._replace(size=size)
        total = math.prod(size) * segment.num_codebooks
        return state._replace(phase=CODES, size=size, total=total)

    def walk(self, state: State, ids: Iterable[int]) -> State:
        """The state after all these ids; GrammarError also says at which place of `ids`."""
        for place, token in enumerate(_whole_numbers(ids)):
            state = self._step(state, token, place)
        return state

    def _step(self, state: State, token: int, place: int) -> State:
        try:
            return self.advance(state, token)
        except GrammarError as error:
            raise GrammarError(f"Place {place} of the ids: {error}") from None

    # ---- whole sequences ----

    def validate(self, ids: Iterable[int]) -> None:
        """Nothing if `ids` is one whole legal sequence, from bos to the end of a turn; else GrammarError."""
        state = self.walk(self.start(), ids)
        if not self.finished(state):
            raise GrammarError(
                f"The ids stop {self._where(state)}; at least {self.min_remaining(state)} more have to follow, "
                f"next {self.describe(self.allowed(state))}."
            )

    def parse(self, ids: Sequence[int]) -> list[Piece]:
        """Cut ids into texts and segments, in order.

        Takes a whole sequence from bos, turns, or the content of one turn with or without its end id (its
        pieces then have the role ""). It may stop anywhere in a text or between turns, but GrammarError if
        it stops inside a segment or is not legal. A null prompt gives no piece.
        """
        ids = _whole_numbers(ids)
        state = self._begin_parse(ids)
        pieces: list[Piece] = []
        opened = text_from = None
        for place, token in enumerate(ids):
            before, state = state, self._step(state, token, place)
            is_text = token < self.token_space.text_size
            if text_from is not None and not is_text:
                pieces.append(Piece("text", np.array(ids[text_from:place]), (), before.role))
                text_from = None
            elif text_from is None and is_text:
                text_from = place
            if state.kind and not before.kind:
                opened = place
            elif before.kind and not state.kind and opened is not None:
                pieces.append(self._segment_piece(before, ids[opened:place]))
        if state.kind:
            raise GrammarError(
                f"The ids stop {self._where(state)}; at least {self._codes_left(state) + 1} more are needed to "
                "close the segment."
            )
        if text_from is not None:
            pieces.append(Piece("text", np.array(ids[text_from:]), (), state.role))
        return pieces

    def _begin_parse(self, ids: list[int]) -> State:
        if ids and ids[0] == self.token_space.bos:
            return self.start()
        if ids and ids[0] in self._roles:
            return State(TURNS)
        return State(CONTENT, read=1, task=self._free)

    def _segment_piece(self, last: State, ids: list[int]) -> Piece:
        """The piece of one segment: `last` is the state before its close id, `ids` run from its open id to there."""
        segment = self.segments[last.kind]
        codes = np.array(ids[1 + len(last.size) :], dtype=np.int64).reshape(-1, segment.num_codebooks)
        return Piece(last.kind, codes - segment.starts, last.size, last.role)

    # ---- masks ----

    def mask(self, ranges: Ranges) -> Tensor:
        """The ranges as bool [V], true inside; cached, so not to be written to."""
        if ranges not in self._masks:
            mask = torch.zeros(self.vocab_size, dtype=torch.bool)
            for start, stop in ranges:
                mask[start:stop] = True
            _remember(self._masks, ranges, mask)
        return self._masks[ranges]

    def index(self, ranges: Ranges) -> Tensor:
        """The ids of the ranges, int64 [K], ascending; cached, so not to be written to."""
        if ranges not in self._indices:
            spans = [torch.arange(start, stop) for start, stop in ranges]
            _remember(self._indices, ranges, torch.cat([torch.arange(0), *spans]))
        return self._indices[ranges]

    # ---- the grammar-restricted loss ----

    def _loss_classes(self) -> tuple[list[Ranges], Tensor]:
        """Coarse allowed sets by what an id is: a superset of what `allowed` gives anywhere that id may stand."""
        space = self.token_space
        controls = [space.end, space.null, *self._opens]
        sets: list[Ranges] = [
            merge_ranges([(0, space.text_size), *((token, token + 1) for token in controls)]),
            self._role_ranges,
            ((space.size_token(1), space.size_token(space.max_size_token) + 1),),
        ]
        for segment in self.segments.values():
            if isinstance(segment.shape, Grid):
                sets += [segment.end_only, *segment.codes]
            else:
                sets += [segment.code_or_end, *segment.codes[1:]]
        sets += [((token, token + 1),) for token in (space.bos, space.pad)]
        class_of = torch.empty(space.vocab_size, dtype=torch.long)
        for number, ranges in enumerate(sets):
            for start, stop in ranges:
                class_of[start:stop] = number
        return sets, class_of

    def loss_rows(self, targets: Tensor) -> Tensor:
        """Class of each target, int64 [N]: `class_ranges[class]` are the ids it competes with in the loss.

        Text and the controls of content | roles | sizes | each codebook (a run's first one with the close
        id) | single ids, which are certain and cost nothing. targets: ids, int64 [N], all in the vocabulary.
        """
        if targets.device not in self._class_tables:
            self._class_tables[targets.device] = self._class_of.to(targets.device)
        return self._class_tables[targets.device][targets]

    # ---- words for people ----

    def describe(self, ranges: Ranges) -> str:
        """Ranges in words, for error messages."""
        name = self.token_space.token_name
        parts = [
            name(start) if stop - start == 1 else f"{name(start)} to {name(stop - 1)}"
            for first, last in ranges
            for start, stop in self._split(first, last)
        ]
        return ", ".join(parts) or "nothing"

    def _split(self, start: int, stop: int) -> list[tuple[int, int]]:
        """A span cut where the meaning of ids changes."""
        edges = [span.start for span in self.token_space.ranges if start < span.start < stop]
        return list(zip([start, *edges], [*edges, stop], strict=True))

    def _where(self, state: State) -> str:
        turn = f" of the {state.role}'s turn" if state.role else ""
        if state.phase is SIZE:
            shape = self.segments[state.kind].shape
            assert isinstance(shape, Grid)
            return f"before the size {shape.axes[len(state.size)]!r} of a segment of {state.kind}{turn}"
        if state.phase is CODES:
            extent = f"{state.read} of {state.total} codes" if state.total else f"{state.read} codes"
            return f"after {extent} of a segment of {state.kind}{turn}"
        if state.phase is CONTENT:
            plan = state.task.plan if state.task else None
            if plan is None:
                return f"in the content{turn}"
            return f"in part {min(state.step, len(plan) - 1) + 1} of the plan {list(plan)}"
        words = {
            START: "before the beginning",
            TURNS: "between turns",
            NULL: "after a null prompt",
            DONE: "after the end of the reply",
        }
        return words[state.phase]

    def _refusal(self, state: State, token: int) -> GrammarError:
        known = 0 <= token < self.vocab_size
        name = self.token_space.token_name(token) if known else f"unknown, there are {self.vocab_size} ids"
        return GrammarError(
            f"Id {token} ({name}) is not allowed {self._where(state)}; allowed: {self.describe(self.allowed(state))}."
        )


def _whole_numbers(ids: Iterable[int]) -> list[int]:
    ids = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
    try:
        return [index(token) for token in ids]
    except TypeError as error:
        raise GrammarError(f"Ids are whole numbers in a flat list; {error}.") from None


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep a value; a full cache starts afresh, as a server may see any number of plans."""
    if len(cache) >= CACHE:
        cache.clear()
    cache[key] = value


def segment_length(shape: CodeShape, size: tuple[int, ...] | None = None) -> int:
    """Ids of one segment with its open, size and close ids: of a grid at `size`, else the least it can have."""
    if isinstance(shape, Grid):
        return 2 + len(shape.axes) + math.prod(size or shape.min_size) * shape.num_codebooks
    return 2 + shape.min_length * shape.num_codebooks


def merge_ranges(spans: Iterable[tuple[int, int]]) -> Ranges:
    """Sort half-open spans and join those that touch or overlap."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
