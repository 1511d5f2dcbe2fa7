"""Templates of prompts and answers: text with fields of a record in braces, filled with segments.

``{image}`` is the record's image, ``{product}`` the text of any other key, ``{image:photo}`` the key ``photo`` opened
as an image. A path goes deeper: ``{answers.answer}`` takes the key of each object of a list, ``{choices[0]}`` an entry,
``{choices[answer]}`` the entry whose index another key of the record holds, ``{text[0]}`` a part of a text between
commas. ``{{`` and ``}}`` are braces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anytoken import moved
from anytoken.data.records import Record
from anytoken.segments import KINDS, Segment, Text
from anytoken.tokenizers.base import MODALITIES
from anytoken.utils.errors import EvaluationError, RecordError
from anytoken.utils.hints import choices, nearest

MESSAGES = "messages"  # the field that stands for a conversation
_PART = re.compile(
    r"\{\{|\}\}|\{(?:(?P<kind>\w+):)?(?P<name>\w+)(?P<steps>(?:\.\w+|\[\w+\])*)\}|(?P<bad>[{}])"
)
_STEP = re.compile(r"\.(\w+)|\[(\w+)\]")
Opener = Callable[["Field", Any], Segment]  # opens a field's value as a medium


def segment_types() -> dict[str, type[Segment]]:
    """Every kind with its segment type, including registered plug-in modalities."""
    return {**KINDS, **{kind: one.segment_type for kind, one in MODALITIES.items()}}


@dataclass(frozen=True)
class Field:
    """One field in braces: the kind it is opened as, the key it starts at, and the path from there."""

    kind: str
    name: str
    steps: tuple[tuple[str, str], ...]

    @property
    def path(self) -> str:
        """The field as it is written, without braces and kind."""
        return self.name + "".join(f".{key}" if key else f"[{index}]" for key, index in self.steps)

    def value(self, record: Record) -> Any:
        """What a record holds there; RecordError names the key that is missing."""
        found = _get(record, self.name, self.path)
        for key, index in self.steps:
            if key and isinstance(found, list):
                found = [_get(one, key, self.path) for one in found]
            else:
                found = _get(found, key or _index(record, index, self.path), self.path)
        return found


def _index(record: Record, index: str, path: str) -> Any:
    """A literal index, or the value of another key."""
    return int(index) if index.isdecimal() else _get(record, index, path)


def _get(holder: Any, key: Any, path: str) -> Any:
    holder = [part.strip() for part in holder.split(",")] if isinstance(holder, str) else holder
    if isinstance(holder, list):
        if not str(key).isdecimal() or int(key) >= len(holder):
            raise RecordError(f"{{{path}}}: a list of {len(holder)} entries has no entry {key!r:.40}")
        return holder[int(key)]
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if value is None:
        keys = list(map(str, holder)) if isinstance(holder, Mapping) else []
        raise RecordError(
            f"{{{path}}}: the record has no {key!r:.80}{nearest(key, keys)}; it has: {', '.join(keys) or 'nothing'}"
        )
    return value


def parse(template: str) -> list[str | Field]:
    """A template as text and fields; EvaluationError for an unmatched brace or an unknown kind."""
    parts: list[str | Field] = []
    end, text = 0, ""
    for match in _PART.finditer(template):
        text += template[end : match.start()]
        end = match.end()
        if match["bad"]:
            raise EvaluationError(
                f"{template!r:.120} has a brace without its field at character {match.start() + 1}; write {{name}}, "
                "{kind:name}, or {{ for a brace"
            )
        if match["name"] is None:
            text += match[0][0]
            continue
        parts += [text] if text else []
        text = ""
        parts.append(_field(match))
    return [*parts, *([text + template[end:]] if text + template[end:] else [])]


def _field(match: re.Match[str]) -> Field:
    steps = tuple(_STEP.findall(match["steps"]))
    last = next((key for key, _ in reversed(steps) if key), match["name"])
    types = segment_types()
    if match["kind"] and match["kind"] not in types:
        raise EvaluationError(
            f"{match[0]} has the unknown kind {match['kind']!r}{choices(match['kind'], types)}"
        )
    return Field(match["kind"] or (last if last in types else "text"), match["name"], steps)


def fields(template: str) -> list[Field]:
    """The fields of a template, in order."""
    return [part for part in parse(template) if isinstance(part, Field)]


def kinds(template: str) -> list[str]:
    """The kinds of the segments that a template gives, in order; adjacent texts are merged."""
    found: list[str] = []
    for part in parse(template):
        kind = part.kind if isinstance(part, Field) else "text"
        if kind != "text" or found[-1:] != ["text"]:
            found.append(kind)
    return found


def fill(template: str, record: Record, opener: Opener) -> list[Segment]:
    """The segments of a template for a record.

    Adjacent texts are merged; white space next to a medium is only a separator.
    """
    found: list[Segment] = []
    for part in parse(template):
        segment = _segment(part, record, opener)
        if isinstance(segment, Text) and found and isinstance(found[-1], Text):
            found[-1] = Text(found[-1].text + segment.text)
        else:
            found.append(segment)
    return _apart(found)


def _apart(segments: list[Segment]) -> list[Segment]:
    found: list[Segment] = []
    for place, one in enumerate(segments):
        if isinstance(one, Text):
            text = one.text.lstrip() if place else one.text
            text = text.rstrip() if place + 1 < len(segments) else text
            found += [Text(text)] if text or len(segments) == 1 else []
        else:
            found.append(one)
    return found


def _segment(part: str | Field, record: Record, opener: Opener) -> Segment:
    if isinstance(part, str):
        return Text(part)
    value = part.value(record)
    return Text(as_text(value)) if part.kind == "text" else opener(part, value)


def fill_each(template: str, record: Record, opener: Opener) -> list[list[Segment]]:
    """As `fill`, once per entry if the whole template is one field with a list."""
    parts = parse(template)
    if len(parts) == 1 and isinstance(parts[0], Field):
        field, value = parts[0], parts[0].value(record)
        if isinstance(value, list):
            return [[Text(as_text(one)) if field.kind == "text" else opener(field, one)] for one in value]
    return [fill(template, record, opener)]


def as_text(value: Any) -> str:
    """A value of a record as text; list entries are separated by commas."""
    return ", ".join(map(as_text, value)) if isinstance(value, list) else str(value)


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
