r"""Content parts of OpenAI's API to segments, and segments to parts.

Media come inside the request, as base64 or data URLs: nothing is fetched and no file is opened. Parts beyond OpenAI's
are `video_url` (a data URL, as in vLLM) and `dna` (letters).

    in and out   {"type": "text", "text": "..."}
                 {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
                 {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,..."}}
                 {"type": "dna", "dna": "ACGT"}
    in           {"type": "input_audio", "input_audio": {"data": "...", "format": "wav"}}
    out          {"type": "audio", "audio": {"data": "...", "format": "wav"}}
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
from anytoken.serving.errors import BadRequest, media_error
from anytoken.serving.schemas import AUDIO_FORMATS, RequestMediaLimits
from anytoken.serving.settings import ServerSettings
from anytoken.utils.limits import current_limits, media_limits

_DATA_URL = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*;base64,(?P<data>.*)", re.DOTALL
)
_VIDEO_TYPES = "video/mp4", "video/webm", "video/quicktime", "video/x-matroska", "image/gif", "image/webp"
AUDIO_TYPES = {
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "pcm": "audio/pcm",
}
PCM_RATE_HZ = 24_000  # of OpenAI's pcm16
Messages = list[dict[str, Any]]
Limits = Mapping[str, float]


def checked_limits(limits: RequestMediaLimits | None, settings: ServerSettings) -> Limits:
    """The limits that a request sets for its media; BadRequest for one above the server's."""
    own = {} if limits is None else limits.model_dump(exclude_none=True)
    for name, value in own.items():
        if value > (most := getattr(settings.media_limits, name)):
            where = f"media_limits.{name}"
            raise BadRequest(
                f"{where} is at most {most:,.12g}, this server's limit; received {value:,.12g}.", where
            )
    return own


def read_messages(
    messages: Sequence[Mapping[str, Any]], settings: ServerSettings, limits: Limits = MappingProxyType({})
) -> Messages:
    """Messages of a request as the processor takes them: {"role", "content": [Segment, ...]}.

    limits: of the request, from `checked_limits`. BadRequest names the message and part that is wrong. "developer" is
    another word for "system". An assistant's message without content is left out.
    """
    if not messages:
        raise BadRequest("messages is empty: send at least one message.", "messages")
    found: Messages = []
    parts = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        content = message.get("content")
        given = [content] if isinstance(content, str | Mapping) else list(content or ())
        parts += len(given)
        if parts > settings.max_parts:
            raise BadRequest(f"The request has more than {settings.max_parts} content parts.", "messages")
        segments = [
            read_part(part, f"{where}.content[{place}]", settings, limits) for place, part in enumerate(given)
        ]
        images = message.get("images") or ()  # of a reply of this server, sent back as history
        segments += [
            read_part(part, f"{where}.images[{place}]", settings, limits) for place, part in enumerate(images)
        ]
        segments = [one for one in segments if not (isinstance(one, Text) and not one.text)]
        if not segments and message["role"] == "assistant":
            continue  # chat pages keep only the text of a reply, and of an image there is none
        if not segments:
            raise BadRequest(f"{where} is empty: give it a text or a medium.", f"{where}.content")
        role = {"developer": "system"}.get(message["role"], message["role"])
        found.append({"role": role, "content": segments})
    return found


def read_part(
    part: Any, where: str, settings: ServerSettings, limits: Limits = MappingProxyType({})
) -> Segment:
    """One content part as a segment; limits: of the request, from `checked_limits`."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    readers: dict[Any, Callable[[], Segment]] = {
        "text": lambda: _text(part.get("text"), where, settings),
        "image_url": lambda: Image.open(_data_url(part, "image_url", where)[1]),
        "input_audio": lambda: _audio(part.get("input_audio"), where),
        "video_url": lambda: _video(*_data_url(part, "video_url", where)),
        "dna": lambda: _dna(part.get("dna"), where, settings),
    }
    if not isinstance(kind, str) or kind not in readers:
        raise BadRequest(f"{where} has the type {kind!r:.80}; allowed: {', '.join(readers)}.", where)
    try:
        with media_limits(settings.media_limits, **limits):
            return readers[kind]()
    except ValueError as error:
        raise media_error(where, error, settings.media_limits) from error


def _text(text: Any, where: str, settings: ServerSettings) -> Text:
    if not isinstance(text, str):
        raise BadRequest(f"{where}.text is a string; received {type(text).__name__}.", where)
    if len(text) > settings.max_text:
        raise BadRequest(f"{where} has {len(text)} characters; at most {settings.max_text} are taken.", where)
    current_limits().check("max_letters", len(text), where)
    return Text(text)


def _dna(bases: Any, where: str, settings: ServerSettings) -> DNA:
    if not isinstance(bases, str) or len(bases) > settings.max_bases:
        raise BadRequest(f"{where}.dna is a string of at most {settings.max_bases} letters.", where)
    current_limits().check("max_letters", len(bases), where)
    return DNA(bases)


def _data_url(part: Mapping[str, Any], key: str, where: str) -> tuple[str, bytes]:
    """Media type and content of a data URL, which stands alone or under "url"."""
    value = part.get(key)
    url = value.get("url") if isinstance(value, Mapping) else value
    found = _DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise BadRequest(
            f"{where}.{key}.url must be a data URL such as data:image/png;base64,...; this server fetches nothing.",
            where,
        )
    return found["type"] or "", decoded(found["data"], where)


def decoded(data: Any, where: str) -> bytes:
    """The bytes of base64 text; BadRequest for anything else."""
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, AttributeError, ValueError) as error:
        raise BadRequest(f"{where} is not valid base64.", where) from error


def _audio(value: Any, where: str) -> Speech:
    if not isinstance(value, Mapping):
        raise BadRequest(f'{where}.input_audio is {{"data": base64, "format": ...}}.', where)
    if value.get("format") not in AUDIO_FORMATS:
        raise BadRequest(f"{where}.input_audio.format is one of {', '.join(AUDIO_FORMATS)}.", where)
    return Speech.open(decoded(value.get("data"), where))


def _video(media_type: str, data: bytes) -> Video:
    if media_type not in _VIDEO_TYPES:
        raise ValueError(f"a video of type {media_type!r}; allowed: {', '.join(_VIDEO_TYPES)}.")
    return Video.open(data)


# ---- out ----


def write_part(segment: Segment, audio_format: str = "wav") -> dict[str, Any]:
    """A segment as a content part."""
    if isinstance(segment, Text):
        return {"type": "text", "text": segment.text}
    if isinstance(segment, Image):
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(segment)}"}}
    if isinstance(segment, Speech):
        return {
            "type": "audio",
            "audio": {"data": b64(audio_bytes(segment, audio_format)), "format": audio_format},
        }
    if isinstance(segment, Video):
        return {
            "type": "video_url",
            "video_url": {"url": f"data:image/webp;base64,{b64(saved(segment, '.webp'))}"},
        }
    if isinstance(segment, DNA):
        return {"type": "dna", "dna": segment.bases}
    return {"type": segment.kind, segment.kind: b64(saved(segment, f".{segment.kind}"))}


def png(image: Image) -> str:
    """An image as a PNG in base64."""
    buffer = io.BytesIO()
    image.to_pil().save(buffer, "PNG")
    return b64(buffer.getvalue())


def b64(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode()


def audio_bytes(speech: Speech, audio_format: str) -> bytes:
    """A clip as a file of a format, or as bare 16-bit samples at 24 kHz for "pcm" and "pcm16"."""
    if audio_format in ("pcm", "pcm16"):
        return pcm16(speech.resample(PCM_RATE_HZ).samples)
    return saved(speech, f".{audio_format}")


def pcm16(samples: np.ndarray) -> bytes:
    """Samples in [-1, 1] as little-endian 16-bit numbers."""
    return (samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes()


def saved(segment: Segment, suffix: str) -> bytes:
    """What a segment's file of this suffix holds."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(segment.save(Path(folder) / f"file{suffix}")).read_bytes()
