"""The common forms of training records, converted to ours (docs/data.md has the table).

Conversations of ShareGPT, LLaVA and LLaMA-Factory, Alpaca, prompt and completion, and OpenAI's content parts become
``messages``; ``<image>``, ``<video>`` and ``<audio>`` in a text are replaced by the media that the record lists, in
order. Media may be paths or ``data:`` URLs. A record is bad unless it has as many media as placeholders: otherwise an
unused medium, or a placeholder learned as text, would go unnoticed.
"""

import base64
import binascii
import hashlib
import mimetypes
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from anytoken.data.records import Blob, Record
from anytoken.segments import KINDS
from anytoken.utils.errors import RecordError

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
PART_KINDS = {
    "input_text": "text", "output_text": "text", "image_url": "image", "input_image": "image", "audio": "speech",
    "audio_url": "speech", "input_audio": "speech", "video_url": "video", "input_video": "video",
}  # fmt: skip
LISTS = {
    "image": ("images", "image"),
    "speech": ("audios", "speeches", "speechs", "audio", "speech"),
    "video": ("videos", "video"),
    "dna": ("dnas", "dna"),
}  # where a record of each kind lists the media of its placeholders
PLACEHOLDER = re.compile(r"<(image|video|audio|speech|dna)>")
SUFFIXES = {"audio/wav": ".wav", "audio/x-wav": ".wav", "audio/wave": ".wav", "audio/flac": ".flac",
            "audio/mpeg": ".mp3", "audio/mp3": ".mp3", "audio/ogg": ".ogg", "image/jpg": ".jpg"}  # fmt: skip


def to_record(given: Any) -> Any:
    """Convert a record of any common form to ``{"text", "image", ...}`` or ``{"messages"}``; others are unchanged.

    RecordError if its media do not match its placeholders, or a medium is a URL.
    """
    if not isinstance(given, Mapping):
        return given
    record = dict(given)
    _to_messages(record)
    if isinstance(record.get("messages"), list):
        record["messages"] = [_to_message(message) for message in record["messages"]]
        return _without_empty_turns(place_media(record))
    for kind in KINDS:
        _take_single(record, kind)
        if kind != "text" and record.get(kind) is not None:
            record[kind] = to_medium(kind, record[kind])
    if isinstance(record.get("text"), str) and not record["text"].strip():
        raise RecordError("the text is empty", "empty text")
    return record


# ---- forms of conversations ----


def _to_messages(record: Record) -> None:
    """Put ``messages`` into a record that holds a conversation in another form."""
    forms = [name for name in ("messages", "conversations") if record.get(name) is not None]
    if len(forms) > 1:
        raise RecordError("the record has both messages and conversations; keep one")
    if forms == ["conversations"]:
        turns = record.pop("conversations")
        record["messages"] = _system(record) + turns if isinstance(turns, list) else turns
    elif not forms and all(isinstance(record.get(key), str) for key in ("instruction", "output")):
        asked = "\n".join(one for one in (record["instruction"], record.get("input")) if one)
        past = [_turn(role, words) for turns in record.get("history") or []
                for role, words in zip(("user", "assistant"), turns, strict=True)]  # fmt: skip
        record["messages"] = [
            *_system(record), *past, _turn("user", asked), _turn("assistant", record["output"])
        ]  # fmt: skip
    elif not forms and isinstance(record.get("prompt"), str | list):
        answer = record.get("completion", record.get("response"))
        if isinstance(answer, str | list):
            record["messages"] = [
                *_system(record), *_turns("user", record["prompt"]), *_turns("assistant", answer)
            ]  # fmt: skip
    elif not forms and _is_interleaved(record):
        record["messages"] = [_turn("assistant", record.pop("text"))]


def _is_interleaved(record: Record) -> bool:
    """Whether a record is a document: a text with placeholders, and media."""
    media = any(record.get(key) is not None for keys in LISTS.values() for key in keys)
    return media and isinstance(record.get("text"), str) and PLACEHOLDER.search(record["text"]) is not None


def _system(record: Record) -> list[Any]:
    words = record.get("system")
    return [_turn("system", words)] if isinstance(words, str) and words else []


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _turns(role: str, given: str | list[Any]) -> list[Any]:
    return [_turn(role, given)] if isinstance(given, str) else given


def _to_message(message: Any) -> Any:
    """Convert {"from", "value"} to a message with role and content; anything else is left to validation."""
    if not isinstance(message, Mapping):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    if {"from", "value"} <= set(message) and not {"role", "content"} & set(message):
        speaker, content = message.pop("from"), message.pop("value")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise RecordError(f"unknown speaker {speaker!r:.80}; choose from {', '.join(SPEAKERS)}")
        message |= _turn(SPEAKERS[speaker], content)
    if isinstance(message.get("content"), list):
        message["content"] = [_to_part(part) for part in message["content"]]
    return message


def _to_part(part: Any) -> Any:
    """A content part of OpenAI's, transformers' or Qwen's form as {"type": kind, kind: value}."""
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return part
    given: str = part["type"]
    kind: str = PART_KINDS.get(given, given)
    keys = (kind, given, "url", "path", "base64", *(key for key, one in PART_KINDS.items() if one == kind))
    if kind == "text" or (kind not in KINDS and given == kind):
        keys = (kind, given, "text")
    used = next((key for key in keys if part.get(key) is not None), "")
    rest = {key: value for key, value in part.items() if key not in ("type", kind, used, "detail")}
    rest = {key: value for key, value in rest.items() if value is not None}
    if not used:
        return {"type": kind, **rest}
    value = part[used]
    if isinstance(value, Mapping):
        value = _of_mapping(value)
    elif used == "base64" and isinstance(value, str):
        value = _blob(_decoded(value), "")
    return {"type": kind, kind: value if kind == "text" else to_medium(kind, value), **rest}


def _of_mapping(value: Mapping[str, Any]) -> Any:
    """OpenAI's {"url": ...}, or {"data": base64, "format": "wav"}."""
    if isinstance(value.get("data"), str):
        return _blob(_decoded(value["data"]), f".{value.get('format') or 'wav'}")
    return value.get("url", value.get("path"))


# ---- media ----


def to_medium(kind: str, value: Any) -> Any:
    """A path or Blob; a ``data:`` URL is decoded, RecordError for any other URL, since none is fetched."""
    if not isinstance(value, str):
        return value
    if value[:5].lower() == "data:":
        head, comma, body = value[5:].partition(",")
        form, *options = head.split(";")
        if not comma:
            raise RecordError(f"{kind}: a data: URL without its data", "damaged data URL")
        data = _decoded(body) if "base64" in options else unquote_to_bytes(body)
        return _blob(data, SUFFIXES.get(form.lower()) or mimetypes.guess_extension(form) or "")
    if "://" in value[:16]:
        raise RecordError(f"{kind}: {value!r:.80} is a URL; download it and give its path", "not downloaded")
    return value


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"damaged base64 data: {error}", "damaged data URL") from None


def _blob(data: bytes, suffix: str) -> Blob:
    return Blob(f"data-{hashlib.sha256(data).hexdigest()[:12]}{suffix}", data)


def _take_single(record: Record, kind: str) -> None:
    """In a record without messages, replace a list of one medium (``images``) by it; RecordError for several."""
    for key in LISTS.get(kind, ()):
        media = record.get(key)
        if not isinstance(media, list) or (key == kind and len(media) != 1):
            continue  # a list under the kind's own name is named by the check of the shape
        if len(media) != 1 or (key != kind and record.get(kind) is not None):
            raise RecordError(f"{len(media)} {kind}s in the list {key!r} of a record without messages; "
                              f"write <{kind}> in its text for each")  # fmt: skip
        record[kind] = record.pop(key)[0]


def _listed(record: Record) -> dict[str, list[Any]]:
    """Remove the media listed outside the messages of a conversation from the record; returns them by kind."""
    found: dict[str, list[Any]] = {}
    for kind, keys in LISTS.items():
        for key in keys:
            media = record.get(key)
            if media is None or not isinstance(media, str | Blob | list):
                continue
            record.pop(key)
            found.setdefault(kind, []).extend(media if isinstance(media, list) else [media])
    return found


def place_media(record: Record) -> Record:
    """Put listed media into parts without one and in place of placeholders; RecordError if their numbers differ."""
    listed = _listed(record)
    record["messages"] = [_split_placeholders(message, bool(listed)) for message in record["messages"]]
    empty: dict[str, list[dict[str, Any]]] = {}
    for message in record["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in LISTS and part.get(kind) is None:
                empty.setdefault(kind, []).append(part)
    for kind in dict.fromkeys((*listed, *empty)):
        media, places = listed.get(kind, []), empty.get(kind, [])
        if len(media) != len(places):
            raise RecordError(
                f"{len(media)} {kind}s in the list for {len(places)} parts of type {kind} without one or "
                f"placeholders <{kind}>", "placeholders"
            )  # fmt: skip
        for part, medium in zip(places, media, strict=True):
            part[kind] = to_medium(kind, _of_mapping(medium) if isinstance(medium, Mapping) else medium)
    return record


def _split_placeholders(message: Any, listed: bool) -> Any:
    """The message with each placeholder as a part of its kind without a medium."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | list):
        return message
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    found: list[Any] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        found += _split(text, listed) if isinstance(text, str) and set(part) == {"type", "text"} else [part]
    plain = isinstance(content, str) and all(part["type"] == "text" for part in found)
    return message if plain else {**message, "content": found}


def _split(text: str, listed: bool) -> list[dict[str, Any]]:
    """Text and placeholders in order. Without listed media, <video> may be HTML and stays text."""
    pieces = PLACEHOLDER.split(text)
    if len(pieces) == 1 or not (listed or "<image>" in text):
        return [{"type": "text", "text": text}] if text else []
    parts: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            parts.append({"type": "speech" if piece == "audio" else piece})
        elif bare := piece.strip("\n"):  # a line break only sets a placeholder apart
            parts.append({"type": "text", "text": bare})
    return parts


def _without_empty_turns(record: Record) -> Record:
    """Drop an empty system turn; RecordError for an empty turn of another role."""
    kept = []
    for message in record["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if content == [] or (isinstance(content, str) and not content.strip()):
            if message.get("role") == "system":
                continue
            if content != [] or isinstance(message.get("role"), str):
                raise RecordError(f"the {message.get('role')}'s turn is empty", "empty text")
        kept.append(message)
    return {**record, "messages": kept}
