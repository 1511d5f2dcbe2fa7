"""The emoji world: about a thousand concepts drawn by five artists' sets, named in text, and animated.

`build_emoji` renders the registry packages into sprite arrays (for the tokenizers, which compose on the fly)
and into composed pictures and videos of the core concepts with captions (for the language model). Alpha
channels make the composition: 56x56 pixels of object, centred on one of eight backgrounds of 64x64.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache as memoize
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture
from tqdm import tqdm

from anytoken.data import splits
from anytoken.data.packages import PackageError, sources, unpack

STYLES = ("line", "noto", "twemoji", "flat", "3d")
BACKGROUNDS = {
    "white": (255, 255, 255), "black": (20, 20, 20), "red": (225, 60, 60), "orange": (245, 150, 50),
    "yellow": (250, 225, 90), "green": (80, 175, 90), "blue": (70, 120, 225), "purple": (150, 90, 190),
}  # fmt: skip
SPRITE_PX, CANVAS_PX, OBJECT_PX, FRAMES = 96, 64, 56, 8
FRAME_RATE_HZ = 4.0
ICONIFY = {"noto": "@iconify-json/noto", "twemoji": "@iconify-json/twemoji", "flat": "@iconify-json/fluent-emoji-flat"}
THREE_D = "@lobehub/fluent-emoji-3d"
ANIMATED = [f"@lobehub/fluent-emoji-anim-{part}" for part in range(1, 5)]
PACKAGE_NAMES = ["openmoji", *ICONIFY.values(), THREE_D, *ANIMATED]
# In order of preference. Few things besides animals and vehicles move, so faces come last and only to fill up.
CORE_GROUPS = ("animals-nature", "food-drink", "travel-places", "objects", "activities", "smileys-emotion")
# Families whose members differ by a detail that 64 pixels do not show, and names that are hard to picture.
NOT_CORE = re.compile(
    r"\b(clock|calendar|guide|service|wilted|oncoming|departure|done|small|glowing|hearts?|exclamation|decoration)\b"
)
NO_ARTICLE = re.compile(r"((?<![suio])s|wood|voltage)$")


class EmojiError(ValueError):
    """The emoji set cannot be built as asked."""


@dataclass(frozen=True)
class Concept:
    """One thing that every style draws; `file` is its name in the 3-D package, `animated` a clip that moves."""

    hexcode: str
    name: str
    group: str
    file: str
    animated: str | None

    @property
    def article(self) -> str:
        """The name with its article: "a red apple", "an owl", "grapes"."""
        if NO_ARTICLE.search(self.name):
            return self.name
        vowel = re.match("[aeio]|u(?!ni)", self.name)
        return f"{'an' if vowel else 'a'} {self.name}"


def build_emoji(
    out: Path, cache: Path | None = None, concepts: int = 160, workers: int = 2, limit: int | None = None,
    progress: bool = True,
) -> Path:
    """Build OUT/emoji from the registry packages; returns the folder.

    Finished parts are kept, so an interrupted build goes on. `concepts` core concepts are composed into
    pictures and videos; `limit` builds only so many concepts in all. EmojiError or PackageError if it cannot.
    """  # fmt: skip
    folder = Path(out) / "emoji"
    cache = Path(cache) if cache else Path(out) / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    roots = {name: unpack(name, cache) / "package" for name in PACKAGE_NAMES}
    known = find_concepts(roots)
    core = choose_core(known, concepts)
    if limit:
        core = core[:limit]
        known = core + [one for one in known if one not in core][: max(0, limit - len(core))]
    codes = {one.hexcode for one in core}
    write_lines(folder / "concepts.jsonl", ({**describe(one), "core": one.hexcode in codes} for one in known))
    with ProcessPoolExecutor(workers) as pool:
        sprites = _sprites(folder, known, roots, pool, progress)
        animations = _animations(folder, [one for one in known if one.animated], pool, progress)
        _compose_all(folder, core, sprites, animations, pool, progress)
    _write_manifest(folder, cache, len(known), len(core))
    return folder


def find_concepts(roots: dict[str, Path]) -> list[Concept]:
    """Concepts without people, flags and skin tones that all five styles draw, in OpenMoji's order."""
    three_d = {_plain(p.stem): p.name for p in (roots[THREE_D] / "assets").glob("*.webp")}
    animated = {_plain(p.stem): str(p) for name in ANIMATED for p in sorted((roots[name] / "assets").glob("*.webp"))}
    drawn = [set(_iconify(roots[name])[0]) for name in ICONIFY.values()]
    found = []
    with (roots["openmoji"] / "data" / "openmoji.csv").open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            code = _plain(row["hexcode"].lower())
            wanted = row["group"] not in ("people-body", "flags", "extras-openmoji", "extras-unicode", "component")
            if wanted and not row["skintone"] and code in three_d and all(code in names for names in drawn):
                name = row["annotation"].lower().replace("’", "'")
                clip = animated.get(code)
                moving = clip if clip and _moves(clip) else None
                found.append(Concept(row["hexcode"], name, row["group"], three_d[code], moving))
    if not found:
        raise EmojiError("No concept is drawn in all five styles: the packages are not what was pinned.")
    return found


def choose_core(known: list[Concept], count: int) -> list[Concept]:
    """The concepts the bundled model knows: they move, are called by at most two plain words and look distinct.

    Groups in order of preference, within a group by hash; none is a concept that tokenizers are tested on.
    """
    names = {one.name for one in known}
    fit = [
        one
        for one in known
        if one.animated
        and one.group in CORE_GROUPS
        and re.fullmatch(r"[a-z]+( [a-z]+)?", one.name)
        and one.name.removesuffix(" face") not in names - {one.name}
        and not NOT_CORE.search(one.name)
        and not splits.tokenizer_held_out(one.hexcode)
    ]
    if not 0 < count <= len(fit):
        raise EmojiError(f"{count} core concepts were asked for; 1 to {len(fit)} are animated and plainly named.")
    order = sorted(fit, key=lambda one: (CORE_GROUPS.index(one.group), "face" in one.name, splits.fraction(one.hexcode, "core")))
    return order[:count]


def describe(concept: Concept) -> dict[str, Any]:
    """The concept as a line of concepts.jsonl, hold-outs included."""
    return {
        "hexcode": concept.hexcode,
        "name": concept.name,
        "group": concept.group,
        "animated": concept.animated is not None,
        "style_held_out": splits.style_held_out(concept.hexcode),
        "video_held_out": splits.video_held_out(concept.hexcode),
        "tokenizer_held_out": splits.tokenizer_held_out(concept.hexcode),
    }


def compose(sprite: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """A sprite uint8 [S, S, 4] as a picture uint8 [64, 64, 3]: 56 pixels of object, centred, on a plain colour."""
    small = Picture.fromarray(sprite).resize((OBJECT_PX, OBJECT_PX), Picture.Resampling.LANCZOS)
    canvas = Picture.new("RGB", (CANVAS_PX, CANVAS_PX), color)
    offset = (CANVAS_PX - OBJECT_PX) // 2
    canvas.paste(small, (offset, offset), small)
    return np.asarray(canvas)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines to a file that appears only when it is whole."""
    partial_path = path.with_suffix(".tmp")
    with partial_path.open("w", encoding="utf-8") as handle:
        for line in lines:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial_path.replace(path)


# ---- rendering ----


def _plain(code: str) -> str:
    return code.lower().replace("-fe0f", "")


def _moves(clip: str) -> bool:
    """The animated packages also hold one-frame files for what was never animated."""
    with Picture.open(clip) as picture:
        return int(getattr(picture, "n_frames", 1)) > 1


@memoize
def _iconify(root: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Code point to icon name, and the icon table of an Iconify package."""
    icons = json.loads((root / "icons.json").read_text())
    names = {_plain(code): name for code, name in json.loads((root / "chars.json").read_text()).items()}
    return {code: name for code, name in names.items() if name in icons["icons"]}, icons


def _svg(text: str) -> np.ndarray:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=text, width=SPRITE_PX, height=SPRITE_PX)
    return _square(Picture.open(io.BytesIO(bytes(png))))


def _square(picture: Picture.Image) -> np.ndarray:
    size = (SPRITE_PX, SPRITE_PX)
    return np.asarray(picture.convert("RGBA").resize(size, Picture.Resampling.LANCZOS), dtype=np.uint8)


def _draw(job: tuple[Concept, dict[str, Path]]) -> np.ndarray:
    """All styles of one concept: uint8 [5, 96, 96, 4]."""
    concept, roots = job
    drawn = [_svg((roots["openmoji"] / "color" / "svg" / f"{concept.hexcode}.svg").read_text())]
    for package in ICONIFY.values():
        names, table = _iconify(roots[package])
        icon = table["icons"][names[_plain(concept.hexcode)]]
        width, height = (icon.get(side, table.get(side, 16)) for side in ("width", "height"))
        body = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        drawn.append(_svg(body + f'height="{height}">{icon["body"]}</svg>'))
    drawn.append(_square(Picture.open(roots[THREE_D] / "assets" / concept.file)))
    return np.stack(drawn)


def _animate(concept: Concept) -> tuple[np.ndarray, float]:
    """Eight frames spread over the loop, uint8 [8, 64, 64, 4], and the loop's seconds."""
    assert concept.animated
    with Picture.open(concept.animated) as clip:
        count = getattr(clip, "n_frames", 1)
        wanted, frames, total_ms = [int(i * count / FRAMES) for i in range(FRAMES)], {}, 0
        for index in range(count):
            clip.seek(index)
            clip.load()
            total_ms += int(clip.info.get("duration", 33))
            if index in wanted:
                small = clip.convert("RGBA").resize((CANVAS_PX, CANVAS_PX), Picture.Resampling.LANCZOS)
                frames[index] = np.asarray(small, dtype=np.uint8)
    return np.stack([frames[index] for index in wanted]), total_ms / 1000


def _sprites(
    folder: Path, known: list[Concept], roots: dict[str, Path], pool: ProcessPoolExecutor, progress: bool
) -> np.ndarray:
    path, size = folder / "sprites.npy", (len(known) * len(STYLES), SPRITE_PX, SPRITE_PX, 4)
    if not _has(path, size, [one for one in known for _ in STYLES]):
        jobs = [(concept, roots) for concept in known]
        drawn = _map(pool, _draw, jobs, "sprites", progress)
        _save(path, np.concatenate(drawn))
        rows = [{**describe(one), "style": style} for one in known for style in STYLES]
        write_lines(folder / "sprites.jsonl", ({"row": row, **line} for row, line in enumerate(rows)))
    return np.load(path, mmap_mode="r")


def _animations(
    folder: Path, known: list[Concept], pool: ProcessPoolExecutor, progress: bool
) -> dict[str, np.ndarray]:
    path, size = folder / "animations.npy", (len(known), FRAMES, CANVAS_PX, CANVAS_PX, 4)
    if not _has(path, size, known):
        drawn = _map(pool, _animate, known, "animations", progress)
        _save(path, np.stack([frames for frames, _ in drawn]))
        rows = [{**describe(one), "duration_seconds": t} for one, (_, t) in zip(known, drawn, strict=True)]
        write_lines(folder / "animations.jsonl", ({"row": row, **line} for row, line in enumerate(rows)))
    return {one.hexcode: frames for one, frames in zip(known, np.load(path, mmap_mode="r"), strict=True)}


def _compose_all(
    folder: Path, core: list[Concept], sprites: np.ndarray, animations: dict[str, np.ndarray],
    pool: ProcessPoolExecutor, progress: bool,
) -> None:  # fmt: skip
    lines = [json.loads(line) for line in (folder / "sprites.jsonl").read_text().splitlines()]
    row = {(line["hexcode"], line["style"]): line["row"] for line in lines}
    for name in ("images", "videos"):
        (folder / name).mkdir(exist_ok=True)
    jobs = [
        (one, {style: np.array(sprites[row[one.hexcode, style]]) for style in STYLES}, np.array(animations[one.hexcode]))
        for one in core
    ]
    made = _map(pool, partial(_compose_concept, folder), jobs, "compositions", progress)
    for index, name in enumerate(("images", "videos", "joint")):
        write_lines(folder / f"{name}.jsonl", (line for concept in made for line in concept[index]))


def _compose_concept(
    folder: Path, job: tuple[Concept, dict[str, np.ndarray], np.ndarray]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    concept, styles, frames = job
    images, videos, joint = [], [], []
    for color, rgb in BACKGROUNDS.items():
        base = {"hexcode": concept.hexcode, "name": concept.name, "background": color}
        for style in STYLES:
            path = Path("images") / f"{concept.hexcode}-{style}-{color}.png"
            if not (folder / path).is_file():
                _keep(folder / path, lambda p, s=style: Picture.fromarray(compose(styles[s], rgb)).save(p, "PNG"))
            text = f"{concept.article}, {style}, {color} background"
            why = splits.image_holdout(concept.hexcode, style, color)
            images.append({"text": text, "image": str(path), **base, "style": style, **_split(why)})
        path = Path("videos") / f"{concept.hexcode}-{color}.webp"
        if not (folder / path).is_file():
            _keep(folder / path, partial(_save_video, frames, rgb))
        why = splits.video_holdout(concept.hexcode, color)
        text = f"{concept.article}, animated, {color} background"
        videos.append({"text": text, "video": str(path), **base, **_split(why)})
        style = "flat" if splits.style_held_out(concept.hexcode) else "3d"
        image = f"images/{concept.hexcode}-{style}-{color}.png"
        joint.append({"image": image, "video": str(path), **base, "style": style, **_split(why)})
    return images, videos, joint


def _save_video(frames: np.ndarray, rgb: tuple[int, int, int], path: Path) -> None:
    shots = [Picture.fromarray(compose(frame, rgb)) for frame in frames]
    shots[0].save(
        path, "WEBP", save_all=True, append_images=shots[1:], duration=round(1000 / FRAME_RATE_HZ), loop=0, lossless=True
    )


def _split(why: str | None) -> dict[str, str | None]:
    return {"split": "test" if why else "train", "holdout": why}


def _keep(path: Path, write: Callable[[Path], None]) -> None:
    scratch = path.with_suffix(".tmp")
    write(scratch)
    scratch.replace(path)


def _has(path: Path, size: tuple[int, ...], owners: list[Concept]) -> bool:
    """Whether the array is there and holds the rows of just these concepts, in this order."""
    rows = path.with_suffix(".jsonl")
    if not (path.is_file() and rows.is_file() and np.load(path, mmap_mode="r").shape == size):
        return False
    return [json.loads(line)["hexcode"] for line in rows.read_text().splitlines()] == [one.hexcode for one in owners]


def _save(path: Path, array: np.ndarray) -> None:
    scratch = path.with_suffix(".tmp.npy")
    np.save(scratch, array)
    scratch.replace(path)


def _map(pool: ProcessPoolExecutor, work: Callable[[Any], Any], jobs: list[Any], title: str, progress: bool) -> list[Any]:
    return list(tqdm(pool.map(work, jobs, chunksize=4), total=len(jobs), desc=title, disable=not progress))


def _write_manifest(folder: Path, cache: Path, known: int, core: int) -> None:
    counts = {p.stem: sum(1 for _ in p.open()) for p in sorted(folder.glob("*.jsonl"))}
    held = {
        p.stem: sum(json.loads(line)["split"] == "test" for line in p.open())
        for p in (folder / f"{name}.jsonl" for name in ("images", "videos", "joint"))
    }
    manifest = {
        "concepts": known, "core": core, "lines": counts, "test_lines": held, "packages": sources(PACKAGE_NAMES, cache)
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    rows = "\n".join(f"| {p['name']} {p['version']} | {p['licence']} |" for p in manifest["packages"])  # type: ignore[attr-defined]
    (folder / "README.md").write_text(
        f"# The emoji world\n\n{known} concepts in {len(STYLES)} styles; {core} of them composed on "
        f"{len(BACKGROUNDS)} backgrounds, still and moving. Lines: {counts}; held out: {held}.\n\n"
        f"| package | licence |\n|---|---|\n{rows}\n"
    )


__all__ = ["EmojiError", "PackageError", "build_emoji"]
