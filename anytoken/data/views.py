"""Views: how a record becomes a training sequence, in id space.

``"text->image"`` puts the text in the user's turn and the image in the assistant's. Both sides list keys of
the record, separated by commas, and quoted literals: ``'text,", voice ",voice->speech'``. Adjacent
strings are joined before they are tokenized, so that training sees the same ids as a prompt. A key in parentheses,
``'text->(image),video'``, is part of the reply and is read, but not learned.
``"interleaved"`` puts all text and media of a record in one assistant turn, in random order;
``"messages"`` replays a conversation.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anytoken.utils.errors import DataError

Piece = str | list[int]
_TERM = re.compile(r'\s*(?:"(?P<literal>[^"]*)"|\((?P<given>[\w.-]+)\)|(?P<key>[\w.-]+))\s*')


class ControlIds(Protocol):
    """The control ids that a sequence needs; a TokenSpace has them."""

    bos: int
    end: int
    null: int
    system: int
    user: int
    assistant: int


@dataclass(frozen=True)
class Literal:
    """Fixed text inside a view."""

    text: str


@dataclass(frozen=True)
class Given:
    """A piece of the assistant's turn that is read, but not learned."""

    piece: Piece


Turn = tuple[str, list[Piece | Given]]


@dataclass(frozen=True)
class View:
    """A parsed view; ``special`` is "interleaved" or "messages" for the views that have no arrow.

    given: the keys among the targets that are not learned.
    """

    name: str
    sources: tuple[str | Literal, ...] = ()
    targets: tuple[str | Literal, ...] = ()
    special: str | None = None
    given: frozenset[str] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """The record keys this view needs."""
        if self.special == "messages":
            return ("messages",)
        return tuple(term for term in (*self.sources, *self.targets) if isinstance(term, str))


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence: ids int32 [T] and, for each, whether it is to be learned.

    skipped: reasons of failed draws before this one.
    """

    ids: np.ndarray
    learn: np.ndarray
    skipped: tuple[str, ...] = ()


def parse_view(name: str) -> View:
    """Parse a view; DataError says what is wrong with it."""
    if name in ("interleaved", "messages"):
        return View(name, special=name)
    left, arrow, right = name.partition("->")
    if not arrow:
        raise DataError(f"unknown view {name!r}; write 'text->image', 'interleaved' or 'messages'")
    sources, in_source = _parse_terms(left, name)
    targets, given = _parse_terms(right, name)
    if in_source:
        raise DataError(
            f"view {name!r} has parentheses before '->'; a prompt is never learned, write the key alone"
        )
    if given.issuperset(targets):
        raise DataError(f"view {name!r} has nothing to learn: name a key without parentheses after '->'")
    return View(name, sources, targets, given=given)


def held_kinds(record: Mapping[str, Any], kinds: Iterable[str]) -> frozenset[str]:
    """What a record offers to automatic views: "messages", or its kinds."""
    if record.get("messages") is not None:
        return frozenset(["messages"])
    return frozenset(kind for kind in kinds if record.get(kind) is not None)


def auto_views(held: Collection[frozenset[str]], kinds: Iterable[str]) -> dict[str, float]:
    """The views of ``auto``: conversations unchanged; all directions between the media of a record, with equal weights.

    held: results of `held_kinds` for a set. Text-only sets are trained as text. {} if there is nothing to learn; a
    record with a single medium is in no view.
    """
    kinds = list(kinds)
    pairs = [(one, other) for one in kinds for other in kinds if one != other]
    views = {f"{one}->{other}": 1.0 for one, other in pairs if any({one, other} <= found for found in held)}
    if any("messages" in found for found in held):
        views["messages"] = max(1.0, float(len(views)))
    if not views and any(found == {"text"} for found in held):
        views["->text"] = 1.0
    return views


def is_used(held: frozenset[str], views: Iterable[str]) -> bool:
    """Whether a record is in one of the automatic views."""
    return "messages" in held or len(held) > 1 or (held == {"text"} and "->text" in views)


def _parse_terms(side: str, name: str) -> tuple[tuple[str | Literal, ...], frozenset[str]]:
    """The terms of one side of a view, and the keys among them that are in parentheses."""
    terms: list[str | Literal] = []
    given = set()
    position = 0
    while side.strip() and position <= len(side):
        match = _TERM.match(side, position)
        if match is None:
            raise DataError(
                f'cannot read {side[position:]!r} in view {name!r}; list keys and "quoted text" with commas'
            )
        key = match["given"] or match["key"]
        terms.append(Literal(match["literal"]) if key is None else key)
        if match["given"]:
            given.add(key)
        position = match.end()
        if position < len(side) and side[position] != ",":
            raise DataError(f"expected a comma before {side[position:]!r} in view {name!r}")
        if position == len(side):
            break
        position += 1
    return tuple(terms), frozenset(given)


def view_turns(
    view: View, item: Mapping[str, Piece], rng: np.random.Generator, asked: Mapping[str, Piece] | None = None
) -> list[Turn]:
    """Fill a view with an item's parts: strings for text, ids for media. Without sources there is no user turn.

    asked: the parts of the user's turn, where they differ.
    """
    if view.special == "interleaved":
        names = list(item)
        return [("assistant", [item[names[i]] for i in rng.permutation(len(names))])]
    turns: list[Turn] = []
    if view.sources:
        turns.append(("user", _fill(view.sources, item if asked is None else asked, view)))
    return [*turns, ("assistant", _fill(view.targets, item, view))]


def _fill(terms: tuple[str | Literal, ...], item: Mapping[str, Piece], view: View) -> list[Piece | Given]:
    pieces: list[Piece | Given] = []
    for term in terms:
        if isinstance(term, str) and term not in item:
            raise DataError(f"view {view.name!r} needs {term!r}; the record has {sorted(item)}")
        piece = term.text if isinstance(term, Literal) else item[term]
        if term in view.given:
            pieces.append(Given(piece))
        elif isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def drop_prompt(turns: list[Turn]) -> list[Turn]:
    """Empty every user turn, which makes it the null prompt of classifier-free guidance."""
    return [(role, [] if role == "user" else pieces) for role, pieces in turns]


def piece_ids(piece: Piece | Given, encode_text: Callable[[str], list[int]]) -> list[int]:
    """The ids of one piece of a turn."""
    content = piece.piece if isinstance(piece, Given) else piece
    return encode_text(content) if isinstance(content, str) else content


def build_sequence(
    turns: Sequence[Turn],
    controls: ControlIds,
    encode_text: Callable[[str], list[int]],
    learn_all: bool = False,
) -> TrainingSequence:
    """Write turns as ids: bos, then role, content, end each; an empty user turn becomes the null prompt.

    Targets are the assistant's content, except `Given` pieces, and end ids; with ``learn_all`` everything but the
    first id.
    """
    ids, learn = [controls.bos], [False]
    for role, pieces in turns:
        spoken = role == "assistant"
        start = len(ids) + 1
        ids.append(getattr(controls, role))
        learn.append(learn_all)
        for piece in pieces:
            content = piece_ids(piece, encode_text)
            ids += content
            learn += [learn_all or (spoken and not isinstance(piece, Given))] * len(content)
        if role == "user" and len(ids) == start:
            ids.append(controls.null)
            learn.append(learn_all)
        ids.append(controls.end)
        learn.append(spoken or learn_all)
    return TrainingSequence(np.array(ids, dtype=np.int32), np.array(learn, dtype=bool))
