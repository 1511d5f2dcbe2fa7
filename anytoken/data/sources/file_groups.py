"""A record from files with the same stem, in a folder or a tar: `cat.png`, `cat.wav`, `cat.txt`.

The suffix gives the key: the kind of its format, or the name before the format (`cat.video.webp`).
"""

import mimetypes
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from anytoken.data.records import UNREAD_SUFFIXES, Blob, Medium, Record, unread
from anytoken.data.sources.json_files import parse_json
from anytoken.segments import CONTAINER_SUFFIXES, DNA_SUFFIXES, IMAGE_SUFFIXES, SPEECH_SUFFIXES, TEXT_SUFFIXES
from anytoken.tokenizers.base import MODALITIES
from anytoken.utils.errors import RecordError

SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": TEXT_SUFFIXES,
    "image": IMAGE_SUFFIXES,
    "speech": SPEECH_SUFFIXES,
    "video": (*CONTAINER_SUFFIXES, ".gif"),
    "dna": DNA_SUFFIXES,
}
WORDS = (".txt", ".json")  # read for the record itself; other files are media


def stem_and_suffix(name: str) -> tuple[str, str]:
    """ "a/cat.v2.video.webp" is ("a/cat.v2", "video.webp"); no suffix for a file that is not part of a record."""
    for one in (*WORDS, *(one for formats in SUFFIXES.values() for one in formats)):
        if name.lower().endswith(one) and one != ".md":
            stem = name[: -len(one)]
            kind = PurePosixPath(stem).suffix
            kind = kind if kind[1:] in SUFFIXES.keys() | MODALITIES.keys() else ""
            return stem.removesuffix(kind), f"{kind}{one}"[1:]
    own = PurePosixPath(name).suffix.lower()
    if own and _is_unread(own[1:]):
        return name[: -len(own)], own[1:]
    return name, ""


def _is_unread(suffix: str) -> bool:
    """Whether a suffix is of media in an unsupported format, which makes its record bad."""
    own = f".{suffix}"
    if any(own.endswith(one) for formats in SUFFIXES.values() for one in formats):
        return False
    form = mimetypes.guess_type(f"a.{suffix.rpartition('.')[2]}")[0] or ""
    return own.endswith(UNREAD_SUFFIXES) or form.partition("/")[0] in ("image", "audio", "video")


def _key_of(suffix: str) -> str:
    """The record key of a file: the name before the format ("video.webp"), else the kind of its format."""
    for kind, formats in SUFFIXES.items():
        for one in formats:
            if f".{suffix}".endswith(one):
                return suffix[: -len(one)] or kind
    return suffix


def kind_of(name: str) -> str:
    """The kind of a file by its suffix; RecordError if files of this format are not read."""
    _, suffix = stem_and_suffix(name)
    if not suffix or _is_unread(suffix):
        raise unread("file_name", name)
    return _key_of(suffix)


def record_of_files(members: Mapping[str, Any], read: Callable[[Medium], bytes]) -> Record:
    """The record of the files of one sample, {suffix: path or Blob}."""
    record: Record = {}
    for suffix, value in members.items():
        key = _key_of(suffix)
        if _is_unread(suffix):
            raise unread(key, _name(value))
        if suffix == "json":
            found = parse_json(read(value))
            if not isinstance(found, dict):
                raise RecordError(f"expected a JSON object, got {type(found).__name__}")
            record |= found
        elif f".{suffix}".endswith((".txt", ".cls")):
            record[key] = _text(read(value))
        else:
            record[key] = value
    if "messages" in record:
        _name_members(record, members)
    return record


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RecordError(f"the text is not UTF-8: {error}") from None


def _name_members(record: Record, members: Mapping[str, Any]) -> None:
    """Replace names of files of the same sample in a conversation's parts by those files."""
    known = dict(members) | {PurePosixPath(_name(value)).name: value for value in members.values()}
    for message in record["messages"] if isinstance(record["messages"], list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and isinstance(part.get(kind), str) and kind != "text":
                part[kind] = known.get(part[kind], part[kind])


def _name(value: Medium) -> str:
    return value.name if isinstance(value, Blob) else value
