"""Clips of several hundred concepts in every style, to learn how drawings move.

With clips of only 140 concepts a model memorizes them. To learn animation in general it needs many, so every drawing
outside the hold-outs is composed as a still and as a clip: the artist's animation if there is one, else the drawing
bounced, swayed, swung or pulsed. Of the core concepts, whose animations are in `videos.jsonl`, only the other styles
are. Hold-outs are those of the whole world (`splits.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import cos, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Picture

from anytoken.emoji_world import splits
from anytoken.segments import Image, Video

if TYPE_CHECKING:
    from anytoken.emoji_world.emoji import Concept

MOTIONS = ("bounce", "sway", "swing", "pulse")
CLIPS = 3  # backgrounds per concept
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


def compose_moving(
    folder: Path, concept: Concept, drawn: Sequence[np.ndarray], animation: np.ndarray | None, core: bool
) -> Iterator[dict[str, Any]]:
    """Write a concept's stills and clips under FOLDER/moving, and yield their records; nothing if it is held out.

    drawn: its sprites uint8 [96, 96, 4] in the order of STYLES. animation: its frames uint8 [8, 64, 64, 4], in 3-D.
    """
    from anytoken.emoji_world.emoji import BACKGROUNDS, FRAME_RATE_HZ, FRAMES, STYLES, compose

    code = concept.hexcode
    unseen = splits.style_held_out(code)
    if splits.video_held_out(code):
        return
    free = [name for name in BACKGROUNDS if not splits.pair_held_out(code, name)]
    for style, sprite in zip(STYLES, drawn, strict=True):
        by_artist = animation is not None and style == ("flat" if unseen else "3d")
        if (style == "3d" and unseen) or (by_artist and core):
            continue
        motion = min(MOTIONS, key=lambda name: splits.fraction(code, name, "motion", style))
        frames = animation if by_artist and animation is not None else move(sprite, motion, FRAMES)
        for background in sorted(free, key=lambda name: splits.fraction(code, name, "clip", style))[:CLIPS]:
            color = BACKGROUNDS[background]
            image, video = (f"moving/{code}-{style}-{background}.{suffix}" for suffix in ("png", "webp"))
            if not (folder / image).is_file():
                Image(compose(sprite, color)).save(folder / image)
            if not (folder / video).is_file():
                Video(np.stack([compose(frame, color) for frame in frames]), FRAME_RATE_HZ).save(
                    folder / video
                )
            kind = "animated" if style == "3d" or by_artist else f"animated, {style}"
            yield {
                "text": f"{concept.article}, {kind}, {background} background",
                "image": image,
                "video": video,
                "hexcode": code,
                "name": concept.name,
                "background": background,
                "style": style,
                "motion": "artist" if by_artist else motion,
                "split": "train",
                "holdout": None,
            }
