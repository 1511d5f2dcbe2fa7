"""Judges of generated media: what an image shows, what words are spoken in a clip, and in whose voice.

A judge never sees a generator's output before it judges one. What an image shows is named by the identity judge, which
knows the real drawings (`anytoken.emoji_world.identity`), and, independently, by a small classifier that was trained on
*other* drawing styles than the one it judges; words by pocketsphinx under a closed grammar of the known names
(`anytoken.evaluation.keyword_asr`); a voice by a linear classifier of spectra of real clips. (What DNA codes for is no
judgement: `anytoken.emoji_world.dna.translate`.) No judge is perfect: scores stand next to the judge's ceiling, its
score on real held-out media.
Shapes: B images, C classes, F frames.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from anytoken.evaluation.keyword_asr import RATE_HZ
from anytoken.segments import Image, Segment, Speech, Video
from anytoken.training.optim.take_step import take_step
from anytoken.utils.errors import EvaluationError

PIXELS = 32  # a concept is recognized as easily at this size, for a quarter of the work


def mel_frames(clip: Speech) -> Tensor:
    """Log-mel spectrum [F, 40] of a clip at 16 kHz, 100 frames per second; a clip shorter than a frame is padded."""
    samples = torch.from_numpy(np.ascontiguousarray(clip.resample(RATE_HZ).samples))
    samples = F.pad(samples, (0, max(0, 512 - len(samples))))
    mel = torchaudio.transforms.MelSpectrogram(RATE_HZ, n_fft=512, hop_length=160, n_mels=40)(samples)
    return mel.clamp_min(1e-6).log().T


class SpeakerClassifier:
    """Predicts which known voice speaks: ridge regression on the mean and spread of a clip's spectrum."""

    def __init__(self, clips: Sequence[Speech], voices: Sequence[str], ridge: float = 1.0) -> None:
        if len(set(voices)) < 2:
            raise EvaluationError(
                f"A voice judge needs clips of two voices or more; received {sorted(set(voices))}."
            )
        self.voices = sorted(set(voices))
        features = torch.stack([self._features(clip) for clip in clips])
        self._mean, self._scale = features.mean(0), features.std(0) + 1e-3
        inputs = self._standard(features)
        targets = F.one_hot(torch.tensor([self.voices.index(voice) for voice in voices])).double()
        square = inputs.T @ inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
        self._weights = torch.linalg.solve(square, inputs.T @ targets)

    def predict(self, clip: Speech) -> str:
        """The known voice that is closest to a clip."""
        return self.voices[int((self._standard(self._features(clip)) @ self._weights).argmax())]

    def _standard(self, features: Tensor) -> Tensor:
        scaled = ((features - self._mean) / self._scale).double()
        return torch.cat([scaled, torch.ones(*scaled.shape[:-1], 1, dtype=torch.float64)], -1)

    @staticmethod
    def _features(clip: Speech) -> Tensor:
        frames = mel_frames(clip)
        loud = frames[frames.mean(-1) >= frames.mean(-1).median()]  # silence does not identify a voice
        return torch.cat([loud.mean(0), loud.std(0, unbiased=False)])


class ImageClassifier(nn.Module):
    """A small convolutional classifier of images at 32x32."""

    def __init__(self, labels: Sequence[str], width: int = 32) -> None:
        super().__init__()
        self.labels = list(labels)
        sizes = [3, width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for inner, outer in pairwise(sizes):
            blocks += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(8, outer), nn.GELU()]
        self.trunk = nn.Sequential(*blocks)
        self.head = nn.Linear(sizes[-1] * 16, len(self.labels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, 32, 32] in [-1, 1]."""
        return self.head(F.dropout(self.trunk(pixels).flatten(1), 0.3, self.training))

    @torch.no_grad()
    def predict(self, segment: Segment) -> str:
        """The label of an image, or of a video by the mean over its frames."""
        logits = self.eval()(pixels_of(segment)).log_softmax(-1).mean(0)
        return self.labels[int(logits.argmax())]


def pixels_of(segment: Segment) -> Tensor:
    """An image [1, 3, 32, 32], or a video's frames [F, 3, 32, 32], in [-1, 1]."""
    if isinstance(segment, Image):
        return _shrink(segment.pixels[None])
    if isinstance(segment, Video):
        return _shrink(segment.frames)
    raise EvaluationError(f"An image judge accepts Image and Video; received {type(segment).__name__}.")


def _shrink(images: np.ndarray) -> Tensor:
    """Images uint8 [B, H, W, 3] as [B, 3, 32, 32] in [-1, 1]."""
    pixels = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)


def fit_classifier(
    images: np.ndarray,
    labels: Sequence[str],
    steps: int = 1500,
    seed: int = 0,
    batch: int = 64,
    width: int = 32,
) -> ImageClassifier:
    """Train on images uint8 [B, H, W, 3] with random shifts, scales, blur and noise; EvaluationError without any."""
    if not len(labels):
        raise EvaluationError("An image judge needs labelled images; received none.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageClassifier(sorted(set(labels)), width).train()
        index = {label: number for number, label in enumerate(model.labels)}
        targets = torch.tensor([index[label] for label in labels])
        everything = torch.cat([_shrink(part) for part in np.array_split(images, 1 + len(images) // 512)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        for step in range(steps):
            rows = torch.randint(len(targets), (batch,), generator=generator)
            pixels = _augment(everything[rows], generator)
            loss = F.cross_entropy(model(pixels), targets[rows], label_smoothing=0.05)
            lr = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            take_step(loss, optimizer, lr)
    return model.eval()


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random scale, rotation, shift, blur, brightness and noise, so that tokenizer artifacts do not matter."""
    count = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    scale, angle = uniform(0.85, 1.2), uniform(-0.2, 0.2)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [
        torch.stack([cosine, -sine, uniform(-0.12, 0.12)], 1),
        torch.stack([sine, cosine, uniform(-0.12, 0.12)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    small = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, pixels.shape[-2:], mode="bilinear", align_corners=False)
    amount = uniform(0, 1)[:, None, None, None]
    pixels = pixels + amount * (blurred - pixels)
    noise = torch.randn(pixels.shape, generator=generator) * 0.05
    return pixels * uniform(0.85, 1.15)[:, None, None, None] + noise


class BackgroundJudge:
    """Predicts a background by the nearest mean border color of real images."""

    def __init__(self, images: np.ndarray, labels: Sequence[str]) -> None:
        self.labels = sorted(set(labels))
        borders = np.stack([self._border(image) for image in images])
        names = np.array(labels)
        self._colours = np.stack([np.median(borders[names == label], 0) for label in self.labels])

    def predict(self, segment: Segment) -> str:
        """The background of an image, or of a video by its middle frame."""
        frames: Any = segment.pixels[None] if isinstance(segment, Image) else getattr(segment, "frames", None)
        if frames is None:
            raise EvaluationError(
                f"A background judge accepts Image and Video; received {type(segment).__name__}."
            )
        distance = np.abs(self._colours - self._border(frames[len(frames) // 2])).sum(-1)
        return self.labels[int(distance.argmin())]

    @staticmethod
    def _border(image: np.ndarray) -> np.ndarray:
        edges = [image[:2], image[-2:], image[:, :2], image[:, -2:]]
        return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]).astype(np.float32), 0)


def motion(video: Video) -> float:
    """The amount of motion in a video: the mean over pixels of the range over frames, in [0, 1]."""
    frames = video.frames.astype(np.int16)
    return float((frames.max(0) - frames.min(0)).mean() / 255)
