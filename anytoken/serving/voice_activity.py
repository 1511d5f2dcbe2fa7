"""When somebody speaks: loudness over a threshold, with a margin before and a pause after.

A detector for turns of a conversation, not a model of speech: steady noise above the threshold counts as speech. The
settings are those of `server_vad` in OpenAI's Realtime API.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAME_SECONDS = 0.02
LOUDEST = 0.05  # root mean square of the frames that a threshold of 1 still takes for speech


@dataclass(frozen=True)
class VoiceSettings:
    """threshold: 0 to 1, how loud speech is; prefix_padding: seconds kept before it; silence: seconds that end it."""

    threshold: float = 0.5
    prefix_padding: float = 0.3
    silence: float = 0.5


class VoiceActivity:
    """Follows samples as they come; `start` is where the running speech begins, None while it is silent."""

    def __init__(self, sample_rate_hz: int, settings: VoiceSettings) -> None:
        self.settings = settings
        self.start: int | None = None
        self._rate = sample_rate_hz
        self._frame = int(FRAME_SECONDS * sample_rate_hz)
        self._rest = np.zeros(0, dtype=np.float32)
        self._seen = 0  # samples in whole frames
        self._quiet = 0  # samples since the last loud frame

    def push(self, samples: np.ndarray) -> list[tuple[str, int]]:
        """What begins or ends with these samples in [-1, 1]: ("started" or "stopped", sample since the beginning)."""
        samples = np.concatenate([self._rest, samples])
        count = len(samples) // self._frame
        frames, self._rest = samples[: count * self._frame], samples[count * self._frame :]
        found: list[tuple[str, int]] = []
        for frame in frames.reshape(count, self._frame):
            loud = float(np.sqrt(np.mean(frame**2))) > self.settings.threshold * LOUDEST
            if loud and self.start is None:
                self.start = max(0, self._seen - int(self.settings.prefix_padding * self._rate))
                found.append(("started", self.start))
            self._seen += self._frame
            self._quiet = 0 if loud else self._quiet + self._frame
            if self.start is not None and self._quiet >= self.settings.silence * self._rate:
                self.start = None
                found.append(("stopped", self._seen))
        return found
