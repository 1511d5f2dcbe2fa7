"""The size limits of media, checked while files are decoded.

A few kilobytes can decode to gigabytes: a gif of equal frames, flac of silence, gzipped letters, a sparse tar. So each
reader counts what it has decoded and stops with a `MediaLimitError` that names the limit. The defaults accept common
files; `with media_limits(max_seconds=7200):` changes them for everything opened inside, including plug-in modalities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

from anytoken.utils.errors import MediaLimitError

UNITS = {
    "max_bytes": "bytes",
    "max_pixels": "pixels",
    "max_frames": "frames",
    "max_seconds": "seconds",
    "max_letters": "letters",
    "max_video_pixels": "pixels in all frames",
    "max_decoded_bytes": "bytes of decoded samples",
}


@dataclass(frozen=True)
class MediaLimits:
    """Limits for one medium. ValueError for a limit that is not a positive number.

    max_bytes: an encoded file that is read at once, a member of an archive, a JSON line. max_pixels: an image or a
    frame. max_frames: a video or animation, as stored. max_seconds: speech or video. max_letters: a text or DNA
    sequence. max_video_pixels: all decoded frames of a video. max_decoded_bytes: decoded data in memory; a larger
    video is read at a lower frame rate.
    """

    max_bytes: int = 1 << 28
    max_pixels: int = 64_000_000
    max_frames: int = 20_000
    max_seconds: float = 3_600
    max_letters: int = 250_000_000  # the longest human chromosome has 248,956,422
    max_video_pixels: int = 50_000_000_000
    max_decoded_bytes: int = 1 << 29

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{field.name} is a positive number; received {value!r}.")

    def check(self, limit: str, found: float, name: object, stopped: bool = False) -> None:
        """MediaLimitError if `found` exceeds a limit; stopped: counting ended early, and there may be more."""
        allowed = getattr(self, limit)
        if found > allowed:
            counted = f"{found:,.12g} or more" if stopped else f"{found:,.12g}"
            fact = f"holds {counted} {UNITS[limit]}; at most {allowed:,.12g} are taken"
            raise MediaLimitError(name, limit, found, allowed, fact)


DEFAULT = MediaLimits()
_CURRENT: ContextVar[MediaLimits] = ContextVar("media_limits", default=DEFAULT)


def current_limits() -> MediaLimits:
    """The limits that apply here."""
    return _CURRENT.get()


@contextmanager
def media_limits(limits: MediaLimits | None = None, /, **changes: float) -> Iterator[MediaLimits]:
    """Change the limits for all media opened inside: a new table, or changes of the current one by name.

    ValueError for an unknown limit, or a value that is not a positive number.
    """
    if unknown := sorted(set(changes) - set(UNITS)):
        raise ValueError(f"{unknown[0]!r} is not a limit; allowed: {', '.join(UNITS)}.")
    token = _CURRENT.set(replace(limits or current_limits(), **changes))  # type: ignore[arg-type]
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)


def parse_limits(words: Sequence[str]) -> dict[str, Any]:
    """Limits written as "max_seconds=7200,max_frames=1e5", for `media_limits`; ValueError for other words."""
    found: dict[str, Any] = {}
    for word in (one for given in words for one in given.split(",")):
        name, _, value = word.partition("=")
        try:
            number = float(value)
            found[name.strip()] = int(number) if number.is_integer() else number
        except ValueError:
            raise ValueError(
                f"A limit is written NAME=NUMBER, with a name of {', '.join(UNITS)}; received {word!r:.80}."
            ) from None
    return found
