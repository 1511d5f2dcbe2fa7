"""Test data of tokenizers: a modality's registered test set, the held-out items of its class, or a user's own files.

Items are a fixed choice for a seed, each with a name and the group it is scored in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anytoken.segments import Image, Segment, Video
from anytoken.tokenizers.base import ModalityTokenizer, TokenizerError
from anytoken.training.tokenizer.batches import SUFFIXES, list_media_files
from anytoken.utils.json_lines import read_json_lines

MOST_PX = 512


@dataclass(frozen=True)
class TestExample:
    """One item: its segment, name, and group (a style, a voice), or "".

    says_name: of speech, whether the name is what is said.
    """

    segment: Segment
    name: str
    group: str = ""
    says_name: bool = True


@dataclass(frozen=True)
class TestSet:
    """The built sets that tokenizers of one modality are measured on, all below the folder that `--data` names.

    folders: their manifests say what they are made of. held_out(data, count, rng): at most `count` items that no
    tokenizer was trained on. captioned: JSON lines of training and held-out items with their texts.
    variants(data, count, seed): groups of items that differ only in what global codes hold.
    """

    folders: tuple[str, ...]
    held_out: Callable[[Path, int | None, np.random.Generator], list[TestExample]]
    captioned: str = ""
    variants: Callable[[Path, int, int], list[list[Segment]]] | None = None


TEST_SETS: dict[str, TestSet] = {}  # by modality; a world's module adds its own when it is imported


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
    if kind not in TEST_SETS:
        known = ", ".join(TEST_SETS)
        raise TokenizerError(f"There is no held-out set for {kind!r}; there is one for {known}.")
    items = TEST_SETS[kind].held_out(data, count, np.random.default_rng((seed, 1)))
    if not items:
        raise TokenizerError(
            f"{data} has no held-out {kind} items: build the complete sets, without --limit."
        )
    return items


def own_held_out(
    tokenizer: ModalityTokenizer, data: Path, source: Path, count: int | None, seed: int
) -> list[TestExample]:
    """At most `count` (None: all) items: the built sets' for a modality of theirs, else what the class holds out.

    source: what it was trained on, for `ModalityTokenizer.held_out`.
    """
    if tokenizer.name in TEST_SETS:
        return held_out_items(tokenizer.name, data, count, seed)
    pairs = tokenizer.held_out(source)
    chosen = np.random.default_rng((seed, 1)).permutation(len(pairs))[:count]
    items = [TestExample(pairs[i][1], f"{tokenizer.name} {i + 1}", pairs[i][0]) for i in chosen]
    if not items:
        raise TokenizerError(f"{source} has no held-out items for {tokenizer.name}.")
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


def data_provenance(kind: str, data: Path, trained_on: str = "") -> list[dict[str, str]]:
    """What the sets that a kind is trained and measured on are made of: set, name, version, licence of each source.

    trained_on: a path whose first folder names one more set. Empty where the sets say nothing of themselves (a
    manifest.json is written when a set is built).
    """
    found = []
    folders = TEST_SETS[kind].folders if kind in TEST_SETS else ()
    for name in dict.fromkeys([*folders, *Path(trained_on).parts[:1]]):
        path = data / name / "manifest.json"
        sources = json.loads(path.read_text(encoding="utf-8"))["sources"] if path.is_file() else []
        found += [
            {"set": name} | {key: one[key] for key in ("name", "version", "licence")} for one in sources
        ]
    return found
