"""The finite-state grammar of legal sequences, derived from what each tokenizer declares about its codes.

    bos ( role content end )*        role: system | user | assistant
    content: text ids and segments in any order, at least one; or `null` alone, in a user's turn
    segment: open (a size id per axis) globals codes close   for a CodeGrid: exactly prod(size) * num_codebooks
             open globals codes close                        for a CodeSequence: whole frames, min to max length
    globals: the num_global_codes global codes of the segment, often none
    codes of several codebooks are written frame by frame, or delayed (see `codebook_pattern`)

One object serves decoding (`allowed` masks, so every generated segment is valid), the head (which rows to compute),
the grammar-restricted loss (`loss_rows`) and training data (`validate`). Only `allowed` implements the rules;
`advance` calls it. With a budget, it returns only ids after which the sequence can still be completed, so a segment
that does not fit is not started. This is the state machine of Chameleon (arXiv 2405.09818) with the grid header of
Emu3 (arXiv 2409.18869), derived from declarations.

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

from anytoken import moved
from anytoken.grammar_tables import (
    ROLES,
    Ranges,
    SegmentTable,
    Size,
    Task,
    TaskTable,
    checked_task,
    loss_classes,
    one,
    role_ranges,
)
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import NO_HEADER, CodeGrid, Codes, codebook_pattern
from anytoken.utils.errors import TokenSpaceError

CACHE = 1024  # tasks and masks that are kept


class Phase(IntEnum):
    """The position of a state in a sequence."""

    START = 0  # before bos
    TURNS = 1  # between turns; a conversation may end here
    CONTENT = 2  # in a turn, outside segments
    NULL = 3  # after a null prompt
    SIZE = 4  # in a segment's size header
    GLOBAL = 5  # in a segment's global codes
    CODES = 6  # in a segment's local codes, or before its close id
    DONE = 7  # after the end of a reply


START, TURNS, CONTENT, NULL, SIZE, GLOBAL, CODES, DONE = Phase  # bare names: a look-up less per id


class State(NamedTuple):
    """A place in the grammar; immutable and hashable.

    role: of the open turn. kind: modality of the open segment. size: the size header read so far. total: local codes
    of the open segment (0: a run's, not fixed). read: codes read of the open segment, global ones in their phase, else
    local ones; outside segments whether the turn (with output kinds: the current text) has begun. task: None in a
    conversation, set in a reply. step: the index of the current output kind.
    """

    phase: Phase
    role: str = ""
    kind: str = ""
    size: Size = ()
    total: int = 0
    read: int = 0
    task: Task | None = None
    step: int = 0


class Piece(NamedTuple):
    """One part of a parsed sequence: `values` are text ids int64 [N], or codes int64 [N, Q] of grid size `size`.

    header: global codes int64 [G].
    """

    kind: str
    values: np.ndarray
    size: Size
    role: str
    header: np.ndarray = NO_HEADER

    @property
    def codes(self) -> Codes:
        """The codes of a segment."""
        return Codes(self.values, self.size, self.header)


class Grammar:
    """The state machine of a token space; create a new one after appending a modality."""

    def __init__(self, token_space: TokenSpace) -> None:
        self.token_space = token_space
        self.vocab_size = token_space.vocab_size
        self.segments = {name: SegmentTable(token_space, name) for name in token_space.modalities}
        self._opens = {segment.open: segment for segment in self.segments.values()}
        self._roles = {getattr(token_space, role): role for role in ROLES}
        self._role_ranges = role_ranges(token_space)
        self._bos_only: Ranges = (one(token_space.bos),)
        self._end_only: Ranges = (one(token_space.end),)
        self._free = Task()
        self._masks: dict[Ranges, Tensor] = {}
        self._indices: dict[Ranges, Tensor] = {}
        self._tasks: dict[Task, TaskTable] = {}
        self.class_ranges = loss_classes(token_space, self.segments.values())
        self._class_of = torch.zeros(self.vocab_size, dtype=torch.long)  # 0 for ids that no target can be
        for number, ranges in enumerate(self.class_ranges):
            self._class_of[self.index(ranges)] = number
        self._class_tables: dict[torch.device, Tensor] = {}

    # ---- where to begin ----

    def start(self) -> State:
        """The state before a whole sequence: bos is next."""
        return State(START)

    @moved.renamed_argument("plan", "output_kinds")
    def reply(
        self, output_kinds: Sequence[str] | None = None, sizes: Mapping[str, Sequence[int]] | None = None
    ) -> State:
        """The state inside an assistant's turn of exactly the planned kinds in order, or of anything for None.

        `sizes` fixes the grid size of a modality. Each text has at least one id. TokenSpaceError for an
        unknown kind, two texts in a row (a single text in the grammar), or a size that the modality cannot have.
        """
        return State(CONTENT, "assistant", task=checked_task(self.token_space, output_kinds, sizes or {}))

    # ---- the rules ----

    def _table(self, state: State) -> TaskTable:
        task = state.task or self._free
        if task not in self._tasks:
            _remember(self._tasks, task, TaskTable(self.token_space, task))
        return self._tasks[task]

    def finished(self, state: State) -> bool:
        """Whether the sequence may end here: a reply after its end id, a conversation between turns."""
        return state.phase is DONE or state.phase is TURNS

    def min_remaining(self, state: State) -> int:
        """The smallest number of ids to a finished state; 0 if it is finished."""
        phase = state.phase
        if phase is CODES or phase is SIZE or phase is GLOBAL:
            return self._codes_left(state) + 1 + self._tail(state)
        if phase is CONTENT:
            begun = 1 if state.read else 0
            if state.task is None or state.task.output_kinds is None:
                return 2 - begun
            return self._table(state).tails[state.step + begun]
        return 1 if phase is START or phase is NULL else 0

    def _tail(self, state: State) -> int:
        """The number of ids that must follow the close id of the open segment."""
        if state.task is None or state.task.output_kinds is None:
            return 1
        return self._table(state).tails[state.step + 1]

    def _codes_left(self, state: State) -> int:
        """The smallest number of ids before the close id of the open segment."""
        segment, read = self.segments[state.kind], state.read
        if state.phase is SIZE or state.phase is GLOBAL:
            within = state._replace(phase=CODES, read=0)
            return segment.num_global_codes - read + self._codes_left(within)
        if state.total:
            return state.total - read
        books, shape = segment.num_codebooks, segment.shape
        if isinstance(shape, CodeGrid):
            low, known = self._table(state).limits[state.kind][0], len(state.size)
            return len(low) - known + math.prod(state.size) * math.prod(low[known:]) * books
        frame, book = segment.place(0, read)
        begun = min(frame + (book + 1 if segment.delayed else 1), shape.max_length) if book else frame
        return max(shape.min_length, begun) * books - read

    def allowed(self, state: State, budget: int | None = None) -> Ranges:
        """The ids that may come next, as sorted, merged, half-open ranges; empty only if finished.

        `budget`: the number of remaining ids, including the next one. Only ids after which the sequence can be
        completed in budget - 1 are returned; TokenSpaceError if there are none.
        """
        if budget is not None:
            least = self.min_remaining(state)
            if budget < least:
                raise TokenSpaceError(
                    f"{budget} ids are left, but the shortest legal end takes {least} {self._where(state)}; "
                    f"allow at least {least} or ask for fewer kinds."
                )
        phase = state.phase
        if phase is CODES:
            return self._allowed_codes(state, budget)
        if phase is CONTENT:
            return self._allowed_content(state, budget)
        if phase is SIZE:
            return self._allowed_size(state, budget)
        if phase is GLOBAL:
            return self.segments[state.kind].global_codes
        if phase is TURNS:
            return self._role_ranges if budget is None or budget >= 3 else ()
        if phase is DONE:
            return ()
        return self._end_only if phase is NULL else self._bos_only

    def _allowed_codes(self, state: State, budget: int | None) -> Ranges:
        segment, read = self.segments[state.kind], state.read
        frame, book = segment.place(state.total, read)
        if state.total:
            return segment.codes[book] if read < state.total else segment.close_only
        if book:
            return segment.codes[book]
        shape = segment.shape
        assert not isinstance(shape, CodeGrid)
        if frame < shape.min_length:
            return segment.codes[0]
        if segment.delayed and read == frame * segment.num_codebooks:
            return segment.close_only  # the longest run, read to its end
        # Codes that are to follow if one more frame begins, itself included.
        left = (frame + 1) * segment.num_codebooks - read
        more = frame < shape.max_length and (budget is None or budget > left + self._tail(state))
        return segment.code_or_ending if more else segment.ending

    def _allowed_size(self, state: State, budget: int | None) -> Ranges:
        lows, highs = self._table(state).limits[state.kind]
        axis = len(state.size)
        high = highs[axis]
        # Codes that each further cell along this axis brings, the later axes at their least.
        if budget is not None:
            segment = self.segments[state.kind]
            each = math.prod(state.size) * math.prod(lows[axis + 1 :]) * segment.num_codebooks
            rest = len(lows) - axis + segment.num_global_codes + 1 + self._tail(state)
            high = min(high, (budget - rest) // each)
        return ((self.token_space.size_token(lows[axis]), self.token_space.size_token(high) + 1),)

    def _allowed_content(self, state: State, budget: int | None) -> Ranges:
        table, step = self._table(state), state.step
        if table.output_kinds is None:
            first = table.begin_user if state.role == "user" else table.begin_turn
            fits = len(first) if budget is None else bisect_right(table.thresholds, budget)
            return (table.go_on if state.read else first)[fits - 1]
        if not state.read:
            return table.begin[step]
        return (table.or_text if budget is None or budget > table.tails[step + 1] else table.begin)[step + 1]

    def exits(self, state: State) -> Ranges:
        """Within a text before a medium of `output_kinds`: the other ids that would end the text.

        They are not allowed, but where the model prefers one of them the text is over: the planned open id takes its
        place. Otherwise a text before an image may never end, where the model would rather end its turn.
        """
        output_kinds = state.task.output_kinds if state.task else None
        inside = output_kinds and state.phase is CONTENT and state.read and state.step + 1 < len(output_kinds)
        return self._table(state).exits[state.step + 1] if inside else ()

    # ---- walking ----

    def advance(self, state: State, token: int) -> State:
        """The state after one more id; TokenSpaceError names the id, the position and the allowed ids."""
        for start, stop in self.allowed(state):
            if start <= token < stop:
                break
        else:
            raise self._refusal(state, token)
        phase, role, kind, size, total, read, task, step = state
        if phase is CODES:
            if token == self.segments[kind].close:
                step, read = (step + 1, 0) if task and task.output_kinds else (step, 1)
                return State(CONTENT, role, "", (), 0, read, task, step)
            total = total or self._total(self.segments[kind], read, token)
            return State(phase, role, kind, size, total, read + 1, task, step)
        if phase is CONTENT:
            return self._advance_content(state, token)
        if phase is SIZE:
            return self._advance_size(state, token)
        if phase is GLOBAL:
            last = read + 1 == self.segments[kind].num_global_codes
            return State(
                CODES if last else GLOBAL, role, kind, size, total, 0 if last else read + 1, task, step
            )
        if phase is TURNS:
            return State(CONTENT, self._roles[token])
        return State(TURNS)  # after bos, or the end of a null prompt

    @staticmethod
    def _total(segment: SegmentTable, read: int, token: int) -> int:
        """The number of codes of a delayed sequence, once a code shows that no further frame begins; else 0."""
        if not segment.delayed or isinstance(segment.shape, CodeGrid):
            return 0
        frame, book = segment.place(0, read)
        begins = book == 0 and segment.codes[0][0][0] <= token < segment.codes[0][0][1]
        return 0 if book or begins else frame * segment.num_codebooks

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
        if task and task.output_kinds and state.read:  # the text before it was a part of its own
            step += 1
        phase = SIZE if isinstance(segment.shape, CodeGrid) else self._after_size(segment)
        return State(phase, role, segment.name, (), 0, 0, task, step)

    @staticmethod
    def _after_size(segment: SegmentTable) -> Phase:
        return GLOBAL if segment.num_global_codes else CODES

    def _advance_size(self, state: State, token: int) -> State:
        segment = self.segments[state.kind]
        size = (*state.size, token - self.token_space.size_token(1) + 1)
        assert isinstance(segment.shape, CodeGrid)
        if len(size) < len(segment.shape.axes):
            return state._replace(size=size)
        total = math.prod(size) * segment.num_codebooks
        return state._replace(phase=self._after_size(segment), size=size, total=total)

    def walk(self, state: State, ids: Iterable[int]) -> State:
        """The state after all these ids; TokenSpaceError also gives the position in `ids`."""
        for place, token in enumerate(_whole_numbers(ids)):
            state = self._step(state, token, place)
        return state

    def _step(self, state: State, token: int, place: int) -> State:
        try:
            return self.advance(state, token)
        except TokenSpaceError as error:
            raise TokenSpaceError(f"Place {place} of the ids: {error}") from None

    # ---- whole sequences ----

    def validate(self, ids: Iterable[int]) -> None:
        """TokenSpaceError unless `ids` is a complete legal sequence, from bos to the end of a turn."""
        state = self.walk(self.start(), ids)
        if not self.finished(state):
            raise TokenSpaceError(
                f"The ids stop {self._where(state)}; at least {self.min_remaining(state)} more have to follow, "
                f"next {self.token_space.describe(self.allowed(state))}."
            )

    def parse(self, ids: Sequence[int]) -> list[Piece]:
        """Cut ids into texts and segments, in order.

        Accepts a whole sequence from bos, turns, or the content of one turn with or without its end id (its pieces
        then have the role ""). It may end in a text or between turns; TokenSpaceError if it ends inside a segment or
        is not legal. A null prompt has no pieces.
        """
        tokens = _whole_numbers(ids)
        state = State(CONTENT, read=1, task=self._free)
        if tokens and (tokens[0] == self.token_space.bos or tokens[0] in self._roles):
            state = self.start() if tokens[0] == self.token_space.bos else State(TURNS)
        pieces: list[Piece] = []
        opened = text_from = None
        for place, token in enumerate(tokens):
            before, state = state, self._step(state, token, place)
            is_text = token < self.token_space.text_size
            if text_from is not None and not is_text:
                pieces.append(Piece("text", np.array(tokens[text_from:place]), (), before.role))
                text_from = None
            elif text_from is None and is_text:
                text_from = place
            if state.kind and not before.kind:
                opened = place
            elif before.kind and not state.kind and opened is not None:
                pieces.append(self._segment_piece(before, tokens[opened:place]))
        if state.kind:
            raise TokenSpaceError(
                f"The ids stop {self._where(state)}; at least {self._codes_left(state) + 1} more are needed to "
                "close the segment."
            )
        if text_from is not None:
            pieces.append(Piece("text", np.array(tokens[text_from:]), (), state.role))
        return pieces

    def _segment_piece(self, last: State, ids: list[int]) -> Piece:
        """The piece of one segment: `last` is the state before its close id, `ids` run from its open id to there."""
        segment = self.segments[last.kind]
        behind_size = np.array(ids[1 + len(last.size) :], dtype=np.int64)
        header, written = np.split(behind_size, [segment.num_global_codes])
        codes = np.empty_like(written)
        codes[codebook_pattern(segment.shape, len(written) // segment.num_codebooks)] = written
        values = codes.reshape(-1, segment.num_codebooks) - segment.starts
        return Piece(last.kind, values, last.size, last.role, header - segment.global_start)

    # ---- ranges as tensors, and the grammar-restricted loss ----

    def index(self, ranges: Ranges) -> Tensor:
        """The ids of the ranges, int64 [K], ascending; cached, so do not modify it."""
        if ranges not in self._indices:
            spans = [torch.arange(start, stop) for start, stop in ranges]
            _remember(self._indices, ranges, torch.cat([torch.arange(0), *spans]))
        return self._indices[ranges]

    def mask(self, ranges: Ranges) -> Tensor:
        """The ranges as bool [V], true inside; cached, so do not modify it."""
        if ranges not in self._masks:
            mask = torch.zeros(self.vocab_size, dtype=torch.bool)
            _remember(self._masks, ranges, mask.index_fill(0, self.index(ranges), True))
        return self._masks[ranges]

    def loss_rows(self, targets: Tensor) -> Tensor:
        """Class of each target, int64 [N]: `class_ranges[class]` are the ids it competes with in the loss.

        See `loss_classes`; a class of one id costs nothing. targets: ids, int64 [N], all in the vocabulary.
        """
        if targets.device not in self._class_tables:
            self._class_tables[targets.device] = self._class_of.to(targets.device)
        return self._class_tables[targets.device][targets]

    # ---- words for people ----

    def _where(self, state: State) -> str:
        turn = f" of the {state.role}'s turn" if state.role else ""
        output_kinds = state.task.output_kinds if state.task else None
        if state.phase is SIZE:
            return f"in the size header of a segment of {state.kind}{turn}"
        if state.phase is GLOBAL:
            count = self.segments[state.kind].num_global_codes
            return f"after {state.read} of {count} global codes of a segment of {state.kind}{turn}"
        if state.phase is CODES:
            extent = f"{state.read} of {state.total} codes" if state.total else f"{state.read} codes"
            return f"after {extent} of a segment of {state.kind}{turn}"
        if state.phase is CONTENT and output_kinds:
            done = state.step + bool(state.read)
            return f"after {done} of the {len(output_kinds)} output kinds {', '.join(output_kinds)}"
        words = {
            START: "before the beginning",
            TURNS: "between turns",
            CONTENT: f"in the content{turn}",
            NULL: "after a null prompt",
            DONE: "after the end of the reply",
        }
        return words[state.phase]

    def _refusal(self, state: State, token: int) -> TokenSpaceError:
        known = 0 <= token < self.vocab_size
        name = self.token_space.token_name(token) if known else f"unknown, there are {self.vocab_size} ids"
        allowed = self.token_space.describe(self.allowed(state))
        return TokenSpaceError(
            f"Id {token} ({name}) is not allowed {self._where(state)}; allowed: {allowed}."
        )


def _whole_numbers(ids: Iterable[int]) -> list[int]:
    flat = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
    try:
        return [index(token) for token in flat]
    except TypeError as error:
        raise TokenSpaceError(f"Ids are whole numbers in a flat list; {error}.") from None


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Cache a value; a full cache is cleared, since a server may see any number of plans."""
    if len(cache) >= CACHE:
        cache.clear()
    cache[key] = value
