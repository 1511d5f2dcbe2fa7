"""Training records: aligned media of one item, or a conversation; and how their media are opened.

A *record* holds several media of one thing: ``{"text": "a red apple", "image": "a.png", "speech": "a.wav"}``.
A *conversation* holds ``{"messages": [{"role": "user", "content": [...]}, ...]}`` in the chat convention of
transformers; an interleaved document is one message of the assistant's, text and media in order. A medium is a
path relative to the root of its source, or a `Blob`; DNA may also be written inline. Any other key of a record
(``split``, ``style``, ``name``...) is metadata that views and filters can use. ``sources/`` reads records.
"""

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anytoken.media_io import is_below
from anytoken.segments import KINDS, Segment
from anytoken.utils.errors import MediaLimitError, RecordError
from anytoken.utils.hints import choices, nearest

LONGEST = 300  # letters of a message about a bad record
UNREAD_SUFFIXES = (".m4a", ".aac", ".wma", ".amr", ".heic", ".heif", ".svg", ".psd")
ROLES = ("system", "user", "assistant")
Record = dict[str, Any]


def bad_record(error: Exception) -> RecordError:
    """Any exception about one record as a RecordError: one short line, never the payload.

    Media libraries read untrusted files, so they may raise any exception.
    """
    reason = error.reason if isinstance(error, RecordError) else "cannot be read"
    reason = "over a limit" if isinstance(error, MediaLimitError) else reason
    words = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    if not isinstance(error, ValueError):
        words = f"{type(error).__name__}: {words}"
    return RecordError(words if len(words) <= LONGEST else f"{words[:LONGEST]}...", reason)


@dataclass(frozen=True)
class Blob:
    """An encoded medium inside a container: its bytes, and a name whose suffix says the format."""

    name: str
    data: bytes


Medium = str | Blob
# Kind, value, and in a conversation the part that holds it.
MediaPart = tuple[str, Medium, dict[str, Any] | None]


@dataclass(frozen=True)
class Source:
    """Entries in order; each has a location, for messages, and raw content that ``parse`` converts to a record."""

    name: str
    root: Path  # where relative paths of media start
    entries: Callable[[], Iterator[tuple[str, Any]]]
    parse: Callable[[Any], Record]
    digest: Callable[[], str]  # of what lists the records; media in files of their own are not read for it
    length: int | None = None
    unused: tuple[str, ...] = ()  # files in the source that no record holds


def record_line(entry: Mapping[str, Any]) -> str:
    """A mapping as one line of JSON; a Blob is written as its name."""
    return json.dumps(entry, ensure_ascii=False, default=_as_json) + "\n"


def _as_json(value: object) -> str:
    return value.name if isinstance(value, Blob) else str(value)


def validate_record(record: Any) -> None:
    """Check the shape of one record or conversation; RecordError says what is wrong."""
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, got {type(record).__name__}")
    if "messages" not in record:
        if not record:
            raise RecordError('an empty record; give keys such as {"text": ..., "image": ...}')
        for kind in KINDS:
            _check_value(kind, record.get(kind))
        return
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise RecordError("messages must be a non-empty list")
    for message in messages:
        validate_message(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError("a conversation needs at least one assistant message to learn from")


def validate_message(message: Any) -> None:
    """Check the shape of one message of a conversation; RecordError says what is wrong."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise RecordError(f'a message is {{"role": ..., "content": ...}}, got {message!r:.200}')
    _check_keys(message, {"role", "content"}, "a message")
    if message["role"] not in ROLES:
        raise RecordError(
            f"unknown role {message['role']!r:.80}{nearest(message['role'], ROLES)}; choose from "
            f"{', '.join(ROLES)}"
        )
    content = message["content"]
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise RecordError("content is a string or a non-empty list of typed parts")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str) or part["type"] not in part:
            raise RecordError(f'a content part is {{"type": "image", "image": path}}, got {part!r:.200}')
        _check_keys(part, {"type", part["type"]}, f"a part of type {part['type']}")
        if part[part["type"]] is None:
            raise RecordError(f"the part {part!r:.200} is empty")
        _check_value(part["type"], part[part["type"]])


def _check_keys(given: Mapping[str, Any], allowed: set[str], what: str) -> None:
    if unknown := sorted(set(given) - allowed):
        raise RecordError(f"unknown key {unknown[0]!r} of {what}{choices(unknown[0], sorted(allowed))}")


def _check_value(kind: str, value: Any) -> None:
    """A text is a string; a medium is a string or a Blob; None counts as missing."""
    if value is not None and not isinstance(value, str if kind == "text" else Medium):
        wanted = "a string" if kind == "text" else "a path"
        raise RecordError(f"{kind}: expected {wanted}, got {value!r:.80}")


def media_parts(record: Record, kinds: Mapping[str, Any]) -> list[MediaPart]:
    """List the media of a record as (kind, value, content part); the part is None outside conversations.

    kinds: the modalities that have a tokenizer. RecordError for a content part of another kind.
    """
    if "messages" not in record:
        for kind in kinds:
            _check_value(kind, record.get(kind))
        return [(kind, record[kind], None) for kind in kinds if record.get(kind) is not None]
    found: list[MediaPart] = []
    for message in record["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            kind = part["type"]
            if kind == "text":
                continue
            if kind not in kinds:
                raise RecordError(
                    f"no tokenizer for content of type {kind!r}; there are {sorted(kinds)}", "no tokenizer"
                )
            found.append((kind, part[kind], part))
    return found


def is_inline(kind: str, value: Medium) -> bool:
    """Whether a value is the content itself instead of a file: DNA written as bases."""
    return kind == "dna" and isinstance(value, str) and not Path(value).suffix and "/" not in value


def check_place(kind: str, value: str, root: Path, data_root: Path | None = None) -> Path:
    """The path of a medium; RecordError unless it is below ``root`` or ``data_root`` and is a regular file.

    Records are untrusted: a path must not read files outside the set, not even through a link.
    """
    if "\0" in value or not value:
        raise RecordError(f"{kind}: {value!r:.80} is not a path", "missing file")
    path = root / value
    if not is_below(path, [root, data_root]):
        allowed = [os.path.realpath(one) for one in (root, data_root) if one is not None]
        raise RecordError(
            f"{kind} {value!r:.200} is outside of {' and '.join(allowed)}; set data_root (--data-root) to a "
            "folder that holds it", "outside the data root",
        )  # fmt: skip
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if kind in KINDS:  # what a plug-in's "path" names is its own business
            raise RecordError(f"{kind} {value!r:.200} does not exist in {root}", "missing file") from error
        return path
    if not regular:
        raise RecordError(f"{kind} {value!r:.200} is not a regular file", "missing file")
    if path.suffix.lower() in UNREAD_SUFFIXES:
        raise unread(kind, value)
    return path


def unread(kind: str, name: str) -> RecordError:
    """The error for a medium in an unsupported format."""
    return RecordError(
        f"{kind} {name!r:.200}: the format {Path(name).suffix} is not read; convert it, to .wav, .png or .mp4",
        "unread format",
    )


def open_media(value: Any, segment_type: type[Segment], root: Path, data_root: Path | None = None) -> Segment:
    """Open one medium of a record: a path relative to ``root``, a Blob, or DNA bases written inline.

    data_root: an additional folder for media; by default they must be below ``root``. RecordError for a file that is
    missing, outside these folders, or not of this kind.
    """
    kind = segment_type.kind
    if not isinstance(value, str | Blob):
        raise RecordError(f"{kind}: expected a path, got {value!r:.80}")
    try:
        if isinstance(value, Blob):
            return _open_blob(value, segment_type)
        if is_inline(kind, value):
            return segment_type(value)  # type: ignore[call-arg]
        return segment_type.open(check_place(kind, value, root, data_root))
    except RecordError:
        raise
    except Exception as error:  # of as many kinds as there are libraries that decode
        missing = isinstance(value, str) and not is_inline(kind, value) and not os.path.exists(root / value)
        bad = bad_record(error)
        reason = "missing file" if missing else f"unreadable {kind}"
        raise RecordError(str(bad), reason if bad.reason == "cannot be read" else bad.reason) from error


def _open_blob(blob: Blob, segment_type: type[Segment]) -> Segment:
    """Write it to a file, since every segment type, including plug-ins, opens files."""
    with tempfile.TemporaryDirectory(prefix="anytoken-") as folder:
        path = Path(folder) / (Path(blob.name).name[-100:] + _missing_suffix(blob))
        path.write_bytes(blob.data)
        try:
            return segment_type.open(path)
        except Exception as error:
            bad = bad_record(error)
            reason = f"unreadable {segment_type.kind}" if bad.reason == "cannot be read" else bad.reason
            raise RecordError(str(bad).replace(str(path), blob.name), reason) from error


def _missing_suffix(blob: Blob) -> str:
    """The suffix of an animation whose name has none; it distinguishes animations from containers."""
    if Path(blob.name).suffix:
        return ""
    return ".gif" if blob.data[:4] == b"GIF8" else ".webp" if blob.data[8:12] == b"WEBP" else ""
