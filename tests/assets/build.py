"""Choose the small real files that tests and the demo read, from the built sets: python tests/assets/build.py SETS

tests/assets holds only held-out files (no training of the bundled model saw them); tests/assets/tiny is a training
set in miniature, laid out like SETS, so that the whole pipeline runs without a registry. The same SETS give the
same files.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from anytoken.data.dataset_card import read_lines, write_lines, write_text
from anytoken.emoji_world.splits import fraction, tokenizer_held_out

HERE = Path(__file__).parent
Lines = list[dict[str, Any]]
TINY_STYLES, TINY_BACKGROUNDS, SPRITE_PX, FRAME_PX = ("flat", "3d"), ("blue", "yellow"), 48, 32


def main(sets: Path) -> None:
    for name in ("images", "videos", "audio", "tiny"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    names = held_out_pictures(sets / "emoji")
    held_out_speech(sets / "speech", names)
    held_out_genes(sets / "dna")
    core_names(sets / "emoji")
    chosen = tiny_emoji(sets / "emoji", HERE / "tiny" / "emoji")
    tiny_speech(sets / "speech", HERE / "tiny" / "speech", chosen)
    tiny_dna(sets / "dna", HERE / "tiny" / "dna")


def stirred(lines: Iterable[dict[str, Any]], *keys: str) -> Lines:
    """The lines in an order that depends on nothing but what they are."""
    return sorted(lines, key=lambda line: fraction(*(str(line[key]) for key in keys), "assets"))


def once(lines: Iterable[dict[str, Any]], key: str) -> Lines:
    """The first line of each value of `key`."""
    found: dict[Any, dict[str, Any]] = {}
    for line in lines:
        found.setdefault(line[key], line)
    return list(found.values())


def keep(lines: Lines, kind: str, source: Path, folder: Path, index: str) -> None:
    """Copy the files of these lines and write their index."""
    for line in lines:
        (folder / line[kind]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / line[kind], folder / line[kind])
    write_lines(folder / index, lines)


def held_out_pictures(emoji: Path) -> list[str]:
    """24 pictures, half held out by style, half by pair, and 6 videos; returns the pictures' names."""
    images = stirred(read_lines(emoji / "images.jsonl"), "image")
    spoken = {line["name"] for line in images if " " not in line["name"] and "face" not in line["name"]}
    plain = [line for line in images if line["name"] in spoken]
    by_style = once((line for line in plain if line["holdout"] == "style"), "name")[:12]
    taken = {line["name"] for line in by_style}
    by_pair = once((one for one in plain if one["holdout"] == "pair" and one["name"] not in taken), "name")[
        :12
    ]
    pictures = [line for both in zip(by_style, by_pair, strict=True) for line in both]
    keep(pictures, "image", emoji, HERE, "images.jsonl")
    shutil.copyfile(HERE / pictures[0]["image"], HERE / "images" / "sample.png")
    videos = stirred((line for line in read_lines(emoji / "videos.jsonl") if line["holdout"]), "video")
    by_reason = [[line for line in videos if line["holdout"] == reason] for reason in ("video", "pair")]
    both = [
        line for pair in zip(*(once(lines, "name") for lines in by_reason), strict=False) for line in pair
    ]
    keep(once(both, "name")[:6], "video", emoji, HERE, "videos.jsonl")
    return [line["name"] for line in pictures]


def held_out_speech(speech: Path, names: list[str]) -> None:
    """16 clips of the two voices no training heard: the first eight pictures' names, said by both."""
    lines = {
        (one["name"], one["voice"]): one
        for one in read_lines(speech / "speech.jsonl")
        if one["holdout"] == "voice"
    }
    clips = [lines[name, voice] for voice in ("awb", "rms") for name in names[:8]]
    keep(clips, "speech", speech, HERE, "speech.jsonl")


def held_out_genes(dna: Path) -> None:
    """12 short genes of held-out products as FASTA, and 24 fragments of such genes with their residues."""
    genes = [
        one for one in read_lines(dna / "genes.jsonl") if one["split"] == "test" and len(one["dna"]) <= 300
    ]
    records = (
        f">gene at {one['start']}, strand {one['strand']:+d}\n{one['dna']}\n"
        for one in stirred(genes, "start")[:12]
    )
    write_text(HERE / "genes.fasta", "".join(records))
    fragments = [one for one in read_lines(dna / "translate.jsonl") if one["split"] == "test"]
    write_lines(HERE / "translate.jsonl", stirred(fragments, "dna")[:24])


def core_names(emoji: Path) -> None:
    """One name per line: every concept that the composed images show."""
    names = dict.fromkeys(line["name"] for line in read_lines(emoji / "images.jsonl"))
    (HERE / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def tiny_emoji(emoji: Path, folder: Path) -> list[str]:
    """10 core concepts in 2 styles on 2 backgrounds, still and moving, and 2 that tokenizers never see."""
    known = read_lines(emoji / "concepts.jsonl")
    core = stirred((one for one in known if one["core"] and "face" not in one["name"]), "hexcode")[:10]
    unseen = stirred(
        (one for one in known if one["animated"] and tokenizer_held_out(one["hexcode"])), "hexcode"
    )[:2]
    folder.mkdir(parents=True)
    write_lines(folder / "concepts.jsonl", core + unseen)
    codes = [one["hexcode"] for one in core]
    for kind, name in (("image", "images"), ("video", "videos"), ("image", "joint")):
        lines = [one for one in read_lines(emoji / f"{name}.jsonl") if one["hexcode"] in codes]
        lines = [
            one
            for one in lines
            if one["background"] in TINY_BACKGROUNDS and one.get("style", "3d") in TINY_STYLES
        ]
        if name == "images":
            keep(lines, kind, emoji, folder, "images.jsonl")
            continue
        lines = [
            one for one in lines if one["background"] == TINY_BACKGROUNDS[codes.index(one["hexcode"]) % 2]
        ]
        keep(lines, "video", emoji, folder, f"{name}.jsonl")
    codes += [one["hexcode"] for one in unseen]
    for name in ("sprites", "animations"):
        tiny_array(emoji / f"{name}.npy", folder / f"{name}.npy", codes)
    return codes[:10]


def tiny_array(source: Path, target: Path, codes: list[str]) -> None:
    """The rows of these concepts, scaled down."""
    lines = [one for one in read_lines(source.with_suffix(".jsonl")) if one["hexcode"] in codes]
    lines = [one for one in lines if one.get("style", "3d") in TINY_STYLES]
    side = SPRITE_PX if "style" in lines[0] else FRAME_PX
    array = np.load(source, mmap_mode="r")
    rows = [np.array(array[one["row"]]) for one in lines]
    small = [np.stack([scaled(frame, side) for frame in row.reshape(-1, *row.shape[-3:])]) for row in rows]
    np.save(target, np.stack(small).reshape(len(rows), *rows[0].shape[:-3], side, side, 4))
    write_lines(target.with_suffix(".jsonl"), ({**one, "row": row} for row, one in enumerate(lines)))


def scaled(frame: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Picture.fromarray(frame).resize((side, side), Picture.Resampling.LANCZOS))


def tiny_speech(speech: Path, folder: Path, codes: list[str]) -> None:
    """20 clips: the concepts by slt, six of them by kal16, four by a voice that is held out; audio of the trained."""
    lines = [
        one for one in read_lines(speech / "speech.jsonl") if one["hexcode"] in codes and one["rate"] == 1.0
    ]
    lines.sort(key=lambda one: codes.index(one["hexcode"]))
    counts = {"slt": 10, "kal16": 6, "awb": 4}
    chosen = [
        line
        for voice, count in counts.items()
        for line in [one for one in lines if one["voice"] == voice][:count]
    ]
    keep(chosen, "speech", speech, folder, "speech.jsonl")
    varied = [one for one in read_lines(speech / "varied.jsonl") if one["hexcode"] in codes[:3]]
    faster = [one for one in varied if one["voice"] == "slt"][:8]
    accents = [one for one in varied if "speed" not in one][:3]
    keep(faster + accents, "speech", speech, folder, "varied.jsonl")
    index = {one["speech"]: one for one in read_lines(speech / "train_audio.jsonl")}
    places = [index[one["speech"]] for one in chosen if one["speech"] in index][:12]
    audio = np.load(speech / "train_audio.npy", mmap_mode="r")
    clips = [np.array(audio[one["start"] : one["start"] + one["samples"]]) for one in places]
    np.save(folder / "train_audio.npy", np.concatenate(clips))
    starts = np.cumsum([0, *map(len, clips)]).tolist()
    write_lines(
        folder / "train_audio.jsonl", ({**one, "start": at} for one, at in zip(places, starts, strict=False))
    )


def tiny_dna(dna: Path, folder: Path) -> None:
    """48 fragments to learn from and 12 to test on, and 24 + 8 windows that are coding or not."""
    folder.mkdir(parents=True)
    for name, train, test in (("translate", 48, 12), ("coding", 24, 8)):
        lines = read_lines(dna / f"{name}.jsonl")
        chosen = [
            line
            for split, count in (("train", train), ("test", test))
            for line in [one for one in lines if one["split"] == split][:count]
        ]
        write_lines(folder / f"{name}.jsonl", chosen)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/assets/build.py SETS")
    main(Path(sys.argv[1]))
