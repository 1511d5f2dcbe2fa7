"""Identity judge: which known drawing an image or a video shows, on any background.

It knows every real drawing, so its ceiling is near 100 % and errors are those of the generator. A drawing is
learned as a matte from its real compositions: every pixel is `paint + clear * background`, linear in the background
colour, so two backgrounds or more give both by least squares (a trimap-free form of triangulation matting, Smith and
Blinn, SIGGRAPH 1996). A drawing is then compared as it would look on the background that was observed, at 16x16, where
blur and the tokenizer's faults hardly show. Nothing is trained, so the judge is deterministic.
Shapes: K compositions, D drawings, F frames, P pixels (16x16).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from anytoken.segments import Image, Segment, Video
from anytoken.utils.errors import EvaluationError

SIDE = 16  # blur and a tokenizer's faults lie above this resolution, what tells drawings apart below it
NEAR = 8.0  # a drawing seen on one background only: pixels this near to it are taken as clear


@dataclass(frozen=True)
class Drawing:
    """One known drawing with its real compositions: media of equal length."""

    concept: str
    style: str
    media: Sequence[Segment]


@dataclass(frozen=True)
class Identity:
    """The judge's result: concepts from the most to the least likely, and the style of the nearest drawing."""

    concepts: tuple[str, ...]
    style: str

    @property
    def concept(self) -> str:
        """The most likely concept."""
        return self.concepts[0]


class IdentityJudge:
    """Finds the known drawing nearest to an image, or to a video by its frames."""

    def __init__(self, drawings: Iterable[Drawing]) -> None:
        labels: list[tuple[str, str]] = []
        paints, clears, owners = [], [], []
        for drawing in drawings:
            for paint, clear in zip(*_matte(drawing.media), strict=True):
                paints.append(paint.ravel())
                clears.append(clear)
                owners.append(len(labels))
            labels.append((drawing.concept, drawing.style))
        if not labels:
            raise EvaluationError("An identity judge needs known drawings; received none.")
        self._paint, self._clear = np.stack(paints), np.stack(clears)  # [D * F, 3P], [D * F, P]
        self._owner, self._labels = np.array(owners), labels
        self.concepts = sorted({concept for concept, _ in labels})
        self._concept = np.array([self.concepts.index(concept) for concept, _ in labels])

    def identify(self, segment: Segment) -> Identity:
        """What an Image or a Video shows; EvaluationError for another kind."""
        nearest = np.zeros(len(self._labels))
        frames = _small(segment)
        for frame in frames:
            distance = np.full(len(self._labels), np.inf)
            np.minimum.at(distance, self._owner, self._distances(frame))
            nearest += distance / len(frames)
        by_concept = np.full(len(self.concepts), np.inf)
        np.minimum.at(by_concept, self._concept, nearest)
        order = np.argsort(by_concept, kind="stable")
        return Identity(
            tuple(self.concepts[index] for index in order), self._labels[int(nearest.argmin())][1]
        )

    def _distances(self, frame: np.ndarray) -> np.ndarray:
        """Mean squared difference of a frame [P, 3] from every known frame on its background: [D * F]."""
        ground = _border(frame)
        known = self._paint + (self._clear[..., None] * ground).reshape(self._paint.shape)
        return ((known - frame.ravel()) ** 2).mean(-1)


def _small(segment: Segment) -> np.ndarray:
    """An image or a video's frames as float32 [F, P, 3] at 16x16: means over blocks."""
    if isinstance(segment, Image):
        frames = segment.resize(64, 64).pixels[None]
    elif isinstance(segment, Video):
        frames = np.stack([Image(frame).resize(64, 64).pixels for frame in segment.frames])
    else:
        raise EvaluationError(
            f"An identity judge accepts Image and Video; received {type(segment).__name__}."
        )
    block = 64 // SIDE
    parts = frames.astype(np.float32).reshape(len(frames), SIDE, block, SIDE, block, 3)
    return parts.mean((2, 4)).reshape(len(frames), SIDE * SIDE, 3)


def _border(frame: np.ndarray) -> np.ndarray:
    """The median colour [3] along the edge of a frame [P, 3]."""
    grid = frame.reshape(SIDE, SIDE, 3)
    edge = np.concatenate([grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]])
    return np.median(edge, 0)


def _matte(media: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Paint [F, P, 3] and clearness [F, P] of a drawing from its compositions."""
    seen = np.stack([_small(one) for one in media])  # [K, F, P, 3]
    ground = np.stack([[_border(frame) for frame in one] for one in seen])[:, :, None]  # [K, F, 1, 3]
    from_mean, ground_from_mean = seen - seen.mean(0), ground - ground.mean(0)
    spread = (ground_from_mean**2).sum((0, 3))
    if (spread > 0).all():
        clear = ((from_mean * ground_from_mean).sum((0, 3)) / spread).clip(0, 1)
    else:
        clear = (np.abs(seen - ground).max(-1).mean(0) < NEAR).astype(np.float32)
    return seen.mean(0) - clear[..., None] * ground.mean(0), clear
