"""What no tokenizer was trained on: concepts never seen in any style, voices never heard, genes of other products.

The split was made when the sets were built (a hash of the concept, the voice, or the product text); here its
held-out side is read back, a fixed choice of items for a seed, each with a name and the group it is scored in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
from anytoken.tokenizers.base import ModalityTokenizer, TokenizerError
from anytoken.tokenizers.dna.base import MAX_TOKENS
from anytoken.tokenizers.dna.vq import WINDOW
from anytoken.tokenizers.image import to_pixels
from anytoken.training.tokenizer.batches import (
    BACKGROUNDS,
    OBJECT_SHARE,
    SUFFIXES,
    compose,
    list_media_files,
    place,
)
from anytoken.utils.json_lines import read_json_lines

SIDE_PX = 64
MOST_PX = 512
SETS = {
    "image": ["emoji"],
    "video": ["emoji"],
    "speech": ["speech"],
    "dna": ["dna"],
    "text": ["emoji", "dna"],
}
TEXTS = {  # group: file, field
    "captions": ("emoji/images.jsonl", "text"),
    "gene products": ("dna/genes.jsonl", "product"),
    "proteins": ("dna/translate.jsonl", "text"),
}


@dataclass(frozen=True)
class TestExample:
    """One item: what is encoded, what it is called, and its group (a style, a voice), or "".

    says_name: of speech, whether the name is what is said.
    """

    segment: Segment
    name: str
    group: str = ""
    says_name: bool = True


def by_group(items: Sequence[TestExample], scores: Sequence[float]) -> dict[str, float]:
    """Mean score of each group, in alphabetical order; empty if there are no groups."""
    groups = sorted({item.group for item in items if item.group})
    return {
        group: float(np.mean([s for item, s in zip(items, scores, strict=True) if item.group == group]))
        for group in groups
    }


def held_out_items(kind: str, data: Path, count: int | None, seed: int) -> list[TestExample]:
    """At most `count` (None: all) held-out items of a kind from the built sets in `data`, the same for the same seed.

    TokenizerError for a kind that has no held-out set, or a set that is not there.
    """
    readers: dict[str, Callable[[Path, int | None, np.random.Generator], list[TestExample]]] = {
        "image": _images, "video": _clips, "speech": _voices, "dna": _genes, "text": _texts,
    }  # fmt: skip
    if kind not in readers:
        raise TokenizerError(f"There is no held-out set for {kind!r}; there is one for {', '.join(readers)}.")
    items = readers[kind](data, count, np.random.default_rng((seed, 1)))
    if not items:
        raise TokenizerError(f"{data} has no held-out {kind} items: build the sets whole, without --limit.")
    return items


def own_held_out(
    tokenizer: ModalityTokenizer, data: Path, source: Path, count: int | None, seed: int
) -> list[TestExample]:
    """At most `count` (None: all) items: the built sets' for a modality of theirs, else what the class holds out.

    source: what it was trained on, for `ModalityTokenizer.held_out`.
    """
    if tokenizer.name in SETS:
        return held_out_items(tokenizer.name, data, count, seed)
    pairs = tokenizer.held_out(source)
    chosen = np.random.default_rng((seed, 1)).permutation(len(pairs))[:count]
    items = [TestExample(pairs[i][1], f"{tokenizer.name} {i + 1}", pairs[i][0]) for i in chosen]
    if not items:
        raise TokenizerError(f"{source} has nothing that is held out for {tokenizer.name}.")
    return items


def file_items(tokenizer: ModalityTokenizer, source: Path, count: int | None, seed: int) -> list[TestExample]:
    """At most `count` (None: all) items from a user's own files: those in the folder `source`, or of a glob.

    Whether a training saw them is not known here. Images and clips are measured with at most MOST_PX a side: other
    coders take minutes for a photograph. TokenizerError if there are none.
    """
    suffixes = SUFFIXES.get(tokenizer.name, ("",))
    files = list_media_files(source, suffixes)
    if not files:
        raise TokenizerError(
            f"{source} holds no {tokenizer.name} files; expected {', '.join(suffixes) or 'any'}."
        )
    chosen = np.random.default_rng((seed, 1)).permutation(len(files))[:count]
    opened = [(_smaller(tokenizer.segment_type.open(files[i])), files[i].stem) for i in chosen]
    return [TestExample(segment, name, says_name=False) for segment, name in opened]


def _smaller(segment: Segment) -> Segment:
    if isinstance(segment, Video):
        frames = np.stack([_at_most(Image(frame)).pixels for frame in segment.frames])
        return Video(frames, segment.frame_rate_hz)
    return _at_most(segment) if isinstance(segment, Image) else segment


def _at_most(image: Image) -> Image:
    scale = min(1.0, MOST_PX / max(image.height, image.width))
    return image.resize(*(max(1, round(side * scale)) for side in (image.height, image.width)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a built set; TokenizerError if the file is not there."""
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: --data names the folder of the built sets.")
    return list(read_json_lines(path))


def _chosen(
    lines: list[dict[str, Any]], count: int | None, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    return (lines[i] for i in rng.permutation(len(lines))[:count])


def _test_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(path) if line["split"] == "test"]


def _drawn(
    index: Path, count: int | None, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Lines of held-out concepts, and their rows uint8 [B, ..., S, S, 4] of the array next to the index."""
    lines = [line for line in read_lines(index) if line["tokenizer_held_out"]]
    lines = list(_chosen(lines, count, rng))
    path = index.with_suffix(".npy")
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: build the set again.")
    array = np.load(path, mmap_mode="r")
    return lines, array[[line["row"] for line in lines]]


def _images(data: Path, count: int | None, rng: np.random.Generator) -> list[TestExample]:
    lines, sprites = _drawn(data / "emoji" / "sprites.jsonl", count, rng)
    if not lines:
        return []
    placed = to_pixels(place(torch.from_numpy(sprites), SIDE_PX, SIDE_PX, rng))
    return [
        TestExample(Image(one), line["name"], line["style"]) for one, line in zip(placed, lines, strict=True)
    ]


def _clips(data: Path, count: int | None, rng: np.random.Generator) -> list[TestExample]:
    lines, clips = _drawn(data / "emoji" / "animations.jsonl", count, rng)
    if not lines:
        return []
    frames: Tensor = place(
        torch.from_numpy(clips).flatten(0, 1), SIDE_PX, SIDE_PX, rng, repeat=clips.shape[1]
    )
    placed = to_pixels(frames.unflatten(0, clips.shape[:2]))
    return [TestExample(Video(one), line["name"]) for one, line in zip(placed, lines, strict=True)]


def _voices(data: Path, count: int | None, rng: np.random.Generator) -> list[TestExample]:
    folder = data / "speech"
    lines = [line for line in _test_lines(folder / "speech.jsonl") if line["holdout"] == "voice"]
    return [
        TestExample(Speech.open(folder / line["speech"]), line["text"], line["voice"])
        for line in _chosen(lines, count, rng)
    ]


def on_backgrounds(kind: str, data: Path, count: int, seed: int) -> list[list[Segment]]:
    """At most `count` held-out drawings, still or moving, on each background; placed as in the composed set."""
    index = {"image": "sprites.jsonl", "video": "animations.jsonl"}[kind]
    _, drawn = _drawn(data / "emoji" / index, count, np.random.default_rng((seed, 5)))
    repeat = drawn.shape[1] if kind == "video" else 1
    sprites = torch.from_numpy(drawn).reshape(-1, *drawn.shape[-3:])
    scale = np.full(len(drawn), OBJECT_SHARE * SIDE_PX)
    offset = np.full((len(drawn), 2), (1 - OBJECT_SHARE) / 2 * SIDE_PX)
    groups: list[list[Segment]] = [[] for _ in drawn]
    for background in BACKGROUNDS:
        colors = np.full((len(drawn), 3), background, dtype=np.float32)
        frames = to_pixels(compose(sprites, colors, scale, offset, SIDE_PX, SIDE_PX, repeat))
        for group, one in zip(groups, frames.reshape(len(drawn), repeat, *frames.shape[1:]), strict=True):
            group.append(Video(one) if kind == "video" else Image(one[0]))
    return groups


def said_by_two_voices(data: Path, count: int, seed: int) -> list[tuple[Segment, Segment]]:
    """At most `count` names, each by the first two held-out voices; TokenizerError without such names."""
    folder = data / "speech"
    lines = [line for line in _test_lines(folder / "speech.jsonl") if line["holdout"] == "voice"]
    voices = sorted({line["voice"] for line in lines})[:2]
    files = {(line["text"], line["voice"]): folder / line["speech"] for line in lines}
    names = [text for text, voice in files if voice == voices[0] and (text, voices[-1]) in files]
    if len(voices) < 2 or not names:
        raise TokenizerError(f"{folder} has no name said by two held-out voices; build the set whole.")
    chosen = np.random.default_rng((seed, 5)).permutation(len(names))[:count]
    first, second = voices
    return [(Speech.open(files[names[i], first]), Speech.open(files[names[i], second])) for i in chosen]


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


def data_provenance(kind: str, data: Path, trained_on: str = "") -> list[dict[str, str]]:
    """What the sets that a kind is trained and measured on are made of: set, name, version, licence of each source.

    trained_on: a path whose first folder names one more set. Empty where the sets say nothing of themselves (a
    manifest.json is written when a set is built).
    """
    found = []
    for name in dict.fromkeys([*SETS.get(kind, []), *Path(trained_on).parts[:1]]):
        path = data / name / "manifest.json"
        sources = json.loads(path.read_text(encoding="utf-8"))["sources"] if path.is_file() else []
        found += [
            {"set": name} | {key: one[key] for key in ("name", "version", "licence")} for one in sources
        ]
    return found
