"""What a server allows: addresses, keys, sizes, lengths of the queue and of replies. Safe values by default."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from anytoken.utils.errors import ConfigError
from anytoken.utils.limits import MediaLimits

KEY_VARIABLE = "ANYTOKEN_API_KEYS"
VIDEO_PIXELS = 5_000_000_000  # of a request's video, in all frames: some ten seconds of decoding
DECODED_BYTES = 1 << 28  # of one medium of a request
REQUEST_LIMITS = {  # settings that a client has to know to send what is taken
    "max_new_tokens", "max_choices", "max_body_bytes", "max_parts", "max_text", "max_bases", "max_pixels",
    "max_seconds", "max_frames",
}  # fmt: skip
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerSettings(BaseModel):
    """Limits of one server. Times are in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_rows: int = Field(default=16, ge=1, description="replies decoded together")
    max_waiting: int = Field(
        default=64, ge=0, description="requests that may wait for a place; more are refused with 429"
    )
    max_prefill_tokens: int = Field(
        default=128,
        ge=1,
        description="prompt tokens of new requests that are read between two decoding steps",
    )
    max_new_tokens: int = Field(default=4096, ge=1, description="longest reply of a request, in tokens")
    max_choices: int = Field(default=8, ge=1, description="largest n of a request")
    deadline: float = Field(default=120, gt=0, description="time a request may take in all")
    body_timeout: float = Field(default=30, gt=0, description="time to receive a request's body")
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024, description="largest request body")
    max_parts: int = Field(default=64, ge=1, description="content parts of a request")
    max_text: int = Field(default=100_000, ge=1, description="characters of a text part")
    max_bases: int = Field(default=100_000, ge=1, description="letters of a DNA sequence")
    max_pixels: int = Field(default=25_000_000, ge=1, description="pixels of an image or a video's frame")
    max_seconds: float = Field(default=600, gt=0, description="length of speech or video")
    max_frames: int = Field(default=3_600, ge=1, description="frames of a video")
    api_keys: tuple[str, ...] = Field(default=(), repr=False, description="bearer tokens; none: open to all")
    cors_origins: tuple[str, ...] = Field(default=(), description="origins of pages that may call the server")
    voices: tuple[str, ...] = Field(
        default=(), description="voices that the model knows by name, for /v1/audio/speech"
    )

    adapter_folder: Path | None = Field(
        default=None, description="folder from which clients with a key may load adapters; none: they may not"
    )

    @property
    def media_limits(self) -> MediaLimits:
        """What a request's media may hold; the totals follow from the limits of one frame."""
        return MediaLimits(
            max_bytes=self.max_body_bytes,
            max_pixels=self.max_pixels,
            max_frames=self.max_frames,
            max_seconds=self.max_seconds,
            max_letters=max(self.max_text, self.max_bases),
            max_video_pixels=VIDEO_PIXELS,
            max_decoded_bytes=DECODED_BYTES,
        )

    def knows_key(self, given: str) -> bool:
        """Whether a bearer token is one of the keys; takes the same time whichever it is compared with."""
        found = False
        for key in self.api_keys:
            found |= hmac.compare_digest(key.encode(), given.encode())
        return found


def read_keys(path: Path | None) -> tuple[str, ...]:
    """API keys from a file, one per line, else from the environment variable ANYTOKEN_API_KEYS (comma-separated).

    ConfigError if the file holds none.
    """
    if path is None:
        return tuple(key for key in os.environ.get(KEY_VARIABLE, "").split(",") if key)
    keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise ConfigError(f"{path} holds no API key: write one per line.")
    return keys


def check_adapter_folder(folder: Path | None, keys: tuple[str, ...]) -> None:
    """ConfigError for a folder of adapters that is none, or that clients could load from without a key."""
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one with adapters.")
    if not keys:
        raise ConfigError(
            f"--adapter-folder lets clients load adapters, which needs API keys: set {KEY_VARIABLE} or give "
            "--api-keys FILE."
        )


def check_exposure(host: str, keys: tuple[str, ...], allow_open: bool) -> None:
    """ConfigError for a server that others than this machine can reach without a key, unless that is allowed."""
    if host not in LOOPBACK and not keys and not allow_open:
        raise ConfigError(
            f"Listening on {host} without an API key would let anyone use the model: set {KEY_VARIABLE}, "
            "give --api-keys FILE, or pass --allow-open if something in front of the server checks requests."
        )
