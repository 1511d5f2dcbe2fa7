"""Held-out data for tokenizers: concepts unseen in any style, unseen voices, and genes of unseen products.

`splits.py` decides the split when the sets are built, by a hash of the concept, the voice, or the product text; this
module reads the held-out part. Importing it registers it for `anytoken.evaluation.tokenizers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anytoken.evaluation.tokenizers.test_sets import TEST_SETS, TestExample, TestSet, read_lines
from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.dna.base import MAX_TOKENS
from anytoken.tokenizers.dna.vq import WINDOW
from anytoken.tokenizers.image import to_pixels
from anytoken.training.tokenizer.batches import BACKGROUNDS, OBJECT_SHARE, compose, place

SIDE_PX = 64
SPRITES = {"image": "emoji/sprites.jsonl", "video": "emoji/animations.jsonl"}
TEXTS = {  # group: file, field
    "captions": ("emoji/images.jsonl", "text"),
    "gene products": ("dna/genes.jsonl", "product"),
    "proteins": ("dna/translate.jsonl", "text"),
}


def _chosen(
    lines: list[dict[str, Any]], count: int | None, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    return (lines[i] for i in rng.permutation(len(lines))[:count])


def _test_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(path) if line["split"] == "test"]


# ---- drawings, still or moving ----


def _drawn(
    kind: str, data: Path, count: int | None, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Lines of held-out concepts, and their drawings uint8 [B, T, S, S, 4]; T is 1 for images."""
    index = data / SPRITES[kind]
    held_out = [line for line in read_lines(index) if line["tokenizer_held_out"]]
    lines = list(_chosen(held_out, count, rng))
    path = index.with_suffix(".npy")
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: build the set again.")
    drawn = np.load(path, mmap_mode="r")[[line["row"] for line in lines]]
    return lines, drawn if kind == "video" else drawn[:, None]


def _segment(kind: str, frames: np.ndarray) -> Segment:
    return Video(frames) if kind == "video" else Image(frames[0])


def _drawings(kind: str, data: Path, count: int | None, rng: np.random.Generator) -> list[TestExample]:
    lines, drawn = _drawn(kind, data, count, rng)
    if not lines:
        return []
    sprites = torch.from_numpy(drawn).flatten(0, 1)
    placed = place(sprites, SIDE_PX, SIDE_PX, rng, repeat=drawn.shape[1]).unflatten(0, drawn.shape[:2])
    return [
        TestExample(_segment(kind, one), line["name"], line.get("style", ""))
        for one, line in zip(to_pixels(placed), lines, strict=True)
    ]


def on_backgrounds(kind: str, data: Path, count: int, seed: int) -> list[list[Segment]]:
    """At most `count` held-out drawings, still or moving, on each background; placed as in the composed set."""
    _, drawn = _drawn(kind, data, count, np.random.default_rng((seed, 5)))
    sprites = torch.from_numpy(drawn).flatten(0, 1)
    scale = np.full(len(drawn), OBJECT_SHARE * SIDE_PX)
    offset = np.full((len(drawn), 2), (1 - OBJECT_SHARE) / 2 * SIDE_PX)
    groups: list[list[Segment]] = [[] for _ in drawn]
    for background in BACKGROUNDS:
        colors = np.full((len(drawn), 3), background, dtype=np.float32)
        frames = compose(sprites, colors, scale, offset, SIDE_PX, SIDE_PX, drawn.shape[1])
        for group, one in zip(groups, to_pixels(frames.unflatten(0, drawn.shape[:2])), strict=True):
            group.append(_segment(kind, one))
    return groups


# ---- speech, genes, texts ----


def _new_voices(data: Path) -> list[dict[str, Any]]:
    return [line for line in _test_lines(data / "speech" / "speech.jsonl") if line["holdout"] == "voice"]


def _speech(data: Path, count: int | None, rng: np.random.Generator) -> list[TestExample]:
    return [
        TestExample(Speech.open(data / "speech" / line["speech"]), line["text"], line["voice"])
        for line in _chosen(_new_voices(data), count, rng)
    ]


def said_by_two_voices(data: Path, count: int, seed: int) -> list[list[Segment]]:
    """At most `count` names, each by the first two held-out voices; TokenizerError without such names."""
    lines = _new_voices(data)
    voices = sorted({line["voice"] for line in lines})[:2]
    files = {(line["text"], line["voice"]): data / "speech" / line["speech"] for line in lines}
    names = [text for text, voice in files if voice == voices[0] and (text, voices[-1]) in files]
    if len(voices) < 2 or not names:
        raise TokenizerError(
            f"{data / 'speech'} has no name said by two held-out voices; build the complete set."
        )
    chosen = np.random.default_rng((seed, 5)).permutation(len(names))[:count]
    return [[Speech.open(files[names[i], voice]) for voice in voices] for i in chosen]


def _genes(data: Path, count: int | None, rng: np.random.Generator) -> list[TestExample]:
    lines = [
        one for one in _test_lines(data / "dna" / "genes.jsonl") if len(one["dna"]) <= MAX_TOKENS * WINDOW
    ]
    return [TestExample(DNA(line["dna"]), line["product"]) for line in _chosen(lines, count, rng)]


def _texts(data: Path, count: int | None, rng: np.random.Generator) -> list[TestExample]:
    """As many of each group, captions first."""
    share = None if count is None else -(-count // len(TEXTS))
    items = [
        TestExample(Text(line[field]), line[field], group)
        for group, (file, field) in TEXTS.items()
        for line in _chosen([one for one in _test_lines(data / file) if one.get(field)], share, rng)
    ]
    return items[:count]


TEST_SETS |= {
    "image": TestSet(
        ("emoji",), partial(_drawings, "image"), "emoji/images.jsonl", partial(on_backgrounds, "image")
    ),
    "video": TestSet(
        ("emoji",), partial(_drawings, "video"), "emoji/videos.jsonl", partial(on_backgrounds, "video")
    ),
    "speech": TestSet(("speech",), _speech, "speech/speech.jsonl", said_by_two_voices),
    "dna": TestSet(("dna",), _genes),
    "text": TestSet(("emoji", "dna"), _texts),
}
