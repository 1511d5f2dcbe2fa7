"""Training data as JSON lines: aligned records and conversations.

A *record* holds several media of one thing: ``{"text": "a red apple", "image": "a.png", "speech": "a.wav"}``.
A *conversation* holds ``{"messages": [{"role": "user", "content": [...]}, ...]}`` in the chat convention of
transformers. Media values are paths relative to the folder of the JSONL file; DNA may also be written inline.
Any other key of a record (``split``, ``style``, ``name``...) is metadata that views and filters can use.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anytoken.segments import Segment

ROLES = ("system", "user", "assistant")


class RecordError(ValueError):
    """A training record that cannot be used, with the file and line it came from."""


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the validated records of a ``.jsonl`` or ``.jsonl.gz`` file, in order.

    Raises RecordError, naming file and line, for a missing file, a line that is not a JSON object, and a
    record or conversation of the wrong shape.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"{path} does not exist; give a .jsonl file with one record or conversation a line")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                validate_record(record)
            except (json.JSONDecodeError, RecordError) as error:
                raise RecordError(f"{path} line {number}: {error}") from None
            yield record


def validate_record(record: Any) -> None:
    """Check the shape of one record or conversation; RecordError says what is wrong."""
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, got {type(record).__name__}")
    if "messages" not in record:
        if not record:
            raise RecordError('an empty record; give keys such as {"text": ..., "image": ...}')
        return
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise RecordError("messages must be a non-empty list")
    for message in messages:
        _validate_message(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError("a conversation needs at least one assistant message to learn from")


def _validate_message(message: Any) -> None:
    if not isinstance(message, dict) or set(message) < {"role", "content"}:
        raise RecordError(f'a message is {{"role": ..., "content": ...}}, got {message!r}')
    if message["role"] not in ROLES:
        raise RecordError(f"unknown role {message['role']!r}; choose from {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise RecordError("content is a string or a non-empty list of typed parts")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str) or part["type"] not in part:
            raise RecordError(f'a content part is {{"type": "image", "image": path}}, got {part!r}')


def media_parts(
    record: Mapping[str, Any], kinds: Mapping[str, Any]
) -> list[tuple[str, str, dict[str, Any] | None]]:
    """List the media of a record as (kind, value, content part); the part is None outside conversations.

    kinds: the modalities that have a tokenizer. Raises RecordError for a content part of another kind.
    """
    if "messages" not in record:
        return [(kind, record[kind], None) for kind in kinds if record.get(kind) is not None]
    found: list[tuple[str, str, dict[str, Any] | None]] = []
    for message in record["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            kind = part["type"]
            if kind == "text":
                continue
            if kind not in kinds:
                raise RecordError(f"no tokenizer for content of type {kind!r}; there are {sorted(kinds)}")
            found.append((kind, part[kind], part))
    return found


def open_media(value: Any, segment_type: type[Segment], root: Path) -> Segment:
    """Open one media value of a record: a path relative to ``root``, or DNA bases written inline."""
    if not isinstance(value, str):
        raise RecordError(f"{segment_type.kind}: expected a path, got {value!r}")
    if segment_type.kind == "dna" and not Path(value).suffix and "/" not in value:
        return segment_type(value)  # type: ignore[call-arg]
    return segment_type.open(root / value)
