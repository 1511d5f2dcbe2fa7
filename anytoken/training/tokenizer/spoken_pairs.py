"""Batches with every text in two voices, from JSON lines of recordings; see `losses/speech_content.py`.

A line has `speech` (a file, relative to the lines), `text` and `voice`; of lines with a `split`, only "train" is read.
Both clips of a text are stretched to one length (by at most 20 %) and padded with silence. Each clip comes with a part
of another clip by the same voice, at the same speed and level. Batch `n` depends on the seed and `n` alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anytoken.segments import Speech
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.losses.speech_content import SpokenPairs
from anytoken.tokenizers.speech import SAMPLE_RATE_HZ
from anytoken.training.tokenizer.batches import random_eq
from anytoken.utils.json_lines import read_json_lines

LENGTHS_MS = (480, 640, 800, 960, 1120, 1280)
SPEEDS = (12, 11, 10, 9, 8)  # tenths of a clip's length
FILLED = 0.85  # of the common length, at least
OTHER_MS = 640
SECONDS_PER_ROW = 1.25  # of a batch of the other kind: so that both take about as long


class SpokenClips:
    """Recordings in one array: position, text and voice of each."""

    def __init__(self, lists: Sequence[Path]) -> None:
        self.texts: list[str] = []
        self.voices: list[str] = []
        clips: list[np.ndarray] = []
        for path in lists:
            if not path.is_file():
                raise TokenizerError(
                    f"{path} is missing: `pairs` names JSON lines with speech, text and voice."
                )
            for number, line in enumerate(read_json_lines(path), 1):
                missing = {"speech", "text", "voice"} - set(line)
                if missing:
                    raise TokenizerError(f"{path}, line {number} has no {', '.join(sorted(missing))}.")
                if line.get("split", "train") != "train" or line.get("speed"):
                    continue
                heard = Speech.open(path.parent / line["speech"]).resample(SAMPLE_RATE_HZ).samples
                clips.append(np.round(heard * 32767).astype(np.int16))
                self.texts.append(line["text"])
                self.voices.append(line["voice"])
        self.lengths = np.array([len(one) for one in clips], dtype=np.int64)
        self.starts = np.cumsum([0, *self.lengths])[:-1]
        self.audio = np.concatenate([np.zeros(0, np.int16), *clips])

    def cut(self, row: int, start: int = 0, length: int | None = None) -> Tensor:
        """Samples of one clip in [-1, 1]."""
        first = self.starts[row] + start
        last = self.starts[row] + (self.lengths[row] if length is None else start + length)
        return torch.from_numpy(self.audio[first:last].astype(np.float32) / 32768)


def spoken_pairs(lists: Sequence[Path], batch_size: int, seed: int) -> Callable[[int], SpokenPairs]:
    """Step to pairs of about as much audio as a batch of `batch_size` crops; TokenizerError without any pair."""
    clips = SpokenClips(lists)
    by_voice: dict[str, list[int]] = defaultdict(list)
    for row, voice in enumerate(clips.voices):
        if clips.lengths[row] >= OTHER_MS * 16 * 10 // min(SPEEDS):
            by_voice[voice].append(row)
    fitting = {ms: _partners(clips, ms * 16, by_voice) for ms in LENGTHS_MS}
    fitting = {ms: one for ms, one in fitting.items() if one}
    if not fitting:
        raise TokenizerError("`pairs` needs texts that two voices say, in clips of about 0.4 to 1.5 s.")
    sizes = np.array([len(one) for one in fitting.values()], dtype=float)

    def batch(step: int) -> SpokenPairs:
        rng = np.random.default_rng((seed, step, 7))
        ms = int(rng.choice(list(fitting), p=sizes / sizes.sum()))
        partners, length = fitting[ms], ms * 16
        count = max(1, int(batch_size * SECONDS_PER_ROW * 500 / ms))
        first = rng.choice(list(partners), count)
        rows = [*first, *(rng.choice(partners[row]) for row in first)]
        samples, others = torch.zeros(2 * count, length), torch.zeros(2 * count, OTHER_MS * 16)
        for number, row in enumerate(rows):
            tenths = _speed(int(clips.lengths[row]), length)
            heard = _played(clips.cut(row), tenths)[:length]
            begin = int(rng.integers(0, length - len(heard) + 1))
            samples[number, begin : begin + len(heard)] = heard
            other, need = rng.choice(by_voice[clips.voices[row]]), OTHER_MS * 16 * 10 // tenths
            start = int(rng.integers(0, clips.lengths[other] - need + 1))
            heard = _played(clips.cut(other, start, need), tenths)[: OTHER_MS * 16]
            others[number, : len(heard)] = heard
        both = random_eq(torch.cat([samples, others], 1), rng)
        both = both * torch.from_numpy(rng.uniform(0.3, 1.3, (len(both), 1)).astype(np.float32))
        return SpokenPairs(both[:, :length], both[:, length:], [clips.texts[row] for row in first])

    return batch


def _speed(length: int, wanted: int) -> int:
    """The tenths of its length that a clip is scaled to for at most `wanted` samples; 0 if no scale fits."""
    found = next((tenths for tenths in SPEEDS if length * tenths <= wanted * 10), 0)
    return found if length * found >= FILLED * wanted * 10 else 0


def _played(samples: Tensor, tenths: int) -> Tensor:
    from torchaudio.functional import resample

    return samples if tenths == 10 else resample(samples, 10, tenths)


def _partners(clips: SpokenClips, length: int, by_voice: dict[str, list[int]]) -> dict[int, list[int]]:
    """The clips that can be scaled to a length, each with those of the same text in another voice."""
    rows = [
        row
        for row, one in enumerate(clips.lengths)
        if _speed(int(one), length) and by_voice.get(clips.voices[row])
    ]
    by_text: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_text[clips.texts[row]].append(row)
    found = {
        row: [one for one in by_text[clips.texts[row]] if clips.voices[one] != clips.voices[row]]
        for row in rows
    }
    return {row: others for row, others in found.items() if others}
