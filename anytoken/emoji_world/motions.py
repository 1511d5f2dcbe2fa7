"""Clips of several hundred concepts in every style, to learn how drawings move.

With clips of only 140 concepts a model memorizes them. To learn animation in general it needs many, so every drawing
outside the hold-outs is composed as a still and as a clip: the artist's animation if there is one, else the drawing
bounced, swayed, swung or pulsed. Of the core concepts, whose animations are in `videos.jsonl`, only the other styles
are. Hold-outs are those of the whole world (`splits.py`).
"""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np
from PIL import Image as Picture

MOTIONS = ("bounce", "sway", "swing", "pulse")
SHIFT, ANGLE, GROWTH = 0.08, pi / 15, 0.12  # of the drawing's side, in radians, of its size


def move(sprite: np.ndarray, motion: str, frames: int) -> np.ndarray:
    """A drawing uint8 [S, S, 4] as a loop uint8 [frames, S, S, 4]; `motion` is one of MOTIONS."""
    picture, side = Picture.fromarray(sprite), sprite.shape[0]
    made = []
    for phase in (2 * pi * frame / frames for frame in range(frames)):
        right = SHIFT * sin(phase) if motion == "sway" else 0.0
        up = SHIFT * abs(sin(phase / 2)) if motion == "bounce" else 0.0
        angle = ANGLE * sin(phase) if motion == "swing" else 0.0
        size = 1 - GROWTH / 2 * (1 - cos(phase)) if motion == "pulse" else 1.0
        # Pillow wants, for a pixel of the result, where in the drawing it comes from.
        c, s, middle = cos(angle) / size, sin(angle) / size, side / 2
        x, y = middle + right * side, middle - up * side
        matrix = (c, s, middle - c * x - s * y, -s, c, middle + s * x - c * y)
        moved = picture.transform((side, side), Picture.Transform.AFFINE, matrix, Picture.Resampling.BICUBIC)
        made.append(np.asarray(moved))
    return np.stack(made)
