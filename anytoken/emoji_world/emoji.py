"""The emoji world: about a thousand concepts drawn by five artists' sets, named in text, and animated.

`build_emoji` renders the registry packages into sprite arrays (for the tokenizers, which compose on the fly)
and into composed images and videos of the core concepts with captions (for the language model). Alpha
channels make the composition: 56x56 pixels of object, centred on one of eight backgrounds of 64x64.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache as memoize
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture
from tqdm import tqdm

from anytoken.data.dataset_card import read_lines, write_card, write_lines
from anytoken.emoji_world import splits
from anytoken.emoji_world.motions import MOTIONS, move
from anytoken.emoji_world.packages import sources, unpack
from anytoken.segments import Image, Video
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError

STYLES = ("line", "noto", "twemoji", "flat", "3d")
BACKGROUNDS = {
    "white": (255, 255, 255), "black": (20, 20, 20), "red": (225, 60, 60), "orange": (245, 150, 50),
    "yellow": (250, 225, 90), "green": (80, 175, 90), "blue": (70, 120, 225), "purple": (150, 90, 190),
}  # fmt: skip
SPRITE_PX, CANVAS_PX, OBJECT_PX, FRAMES = 96, 64, 56, 8
MOVING_BACKGROUNDS = 3  # of each concept and style in moving.jsonl
FRAME_RATE_HZ = 4.0
# Sizes and places of objects in `layouts`: multiples of 8 pixels, so that a tokenizer with patches of 8 sees a shift as
# the same patches elsewhere. A place is how many times the free half goes to the left of the object, and above it.
SIZES_PX = {"small": 32, "large": 48}
PLACES = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2), "centre": (1, 1)}
ICONIFY = {
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "flat": "@iconify-json/fluent-emoji-flat",
}
THREE_D = "@lobehub/fluent-emoji-3d"
ANIMATED = [f"@lobehub/fluent-emoji-anim-{part}" for part in range(1, 5)]
PACKAGE_NAMES = ["openmoji", *ICONIFY.values(), THREE_D, *ANIMATED]
LEFT_OUT = ("people-body", "flags", "extras-openmoji", "extras-unicode", "component")
# In order of preference. Few things besides animals and vehicles move, so faces come last and only to fill up.
CORE_GROUPS = ("animals-nature", "food-drink", "travel-places", "objects", "activities", "smileys-emotion")
# Families whose members differ by a detail that 64 pixels do not show, and names that are hard to draw.
NOT_CORE = re.compile(
    r"\b(clock|calendar|guide|service|wilted|oncoming|departure|done|small|glowing|hearts?|exclamation|decoration)\b"
)
NO_ARTICLE = re.compile(r"((?<![suio])s|wood|voltage)$")


Lines = list[dict[str, Any]]


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


Job = tuple[Concept, list[np.ndarray], np.ndarray | None]  # a concept, its sprites and its animation


def build_emoji(
    out: Path,
    cache: Path | None = None,
    concepts: int = 160,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
    still: bool = False,
    layouts: bool = False,
    moving: bool = False,
) -> Path:
    """Build OUT/emoji from the registry packages; returns the folder.

    Finished parts are kept, so an interrupted build resumes. `concepts` core concepts are composed into
    images and videos; `limit` builds at most that many concepts in all. still: core concepts may be some that do not
    move, which come after all that do; layouts: also images of sizes and places; moving: also clips in
    every style, of the other concepts too. DataError if it cannot.
    """  # fmt: skip
    folder = Path(out) / "emoji"
    cache = Path(cache) if cache else Path(out) / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    roots = {name: unpack(name, cache) / "package" for name in PACKAGE_NAMES}
    known = find_concepts(roots)
    core = choose_core(known, concepts, still)
    if limit:
        core = core[:limit]
        others = [one for one in known if one not in core]
        known = core + others[: max(0, limit - len(core))]
    codes = {one.hexcode for one in core}
    write_lines(folder / "concepts.jsonl", ({**describe(one), "core": one.hexcode in codes} for one in known))
    with ProcessPoolExecutor(workers) as pool:
        sprites = _sprites(folder, known, roots, pool, progress)
        animations = _animations(folder, [one for one in known if one.animated], pool, progress)
        jobs = partial(_jobs, folder, sprites, animations)
        compose_all = partial(_compose_all, folder, pool, progress)
        compose_all(_compose_concept, jobs(core), "images", "videos", "joint")
        if layouts:
            compose_all(_lay_out_concept, jobs(core), "layouts")
        if moving:
            seen = [one for one in known if one in core or not splits.tokenizer_held_out(one.hexcode)]
            compose_all(partial(_move_concept, core=codes), jobs(seen), "moving")
    _write_card(folder, known, core, cache)
    return folder


def find_concepts(roots: dict[str, Path]) -> list[Concept]:
    """Concepts without people, flags and skin tones that all five styles draw, in OpenMoji's order."""
    three_d = {_plain(p.stem): p.name for p in (roots[THREE_D] / "assets").glob("*.webp")}
    animated = {
        _plain(p.stem): str(p) for name in ANIMATED for p in sorted((roots[name] / "assets").glob("*.webp"))
    }
    drawn = [set(_iconify(roots[name])[0]) for name in ICONIFY.values()]
    found = []
    with (roots["openmoji"] / "data" / "openmoji.csv").open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            code = _plain(row["hexcode"].lower())
            if (
                row["group"] not in LEFT_OUT
                and not row["skintone"]
                and code in three_d
                and all(code in names for names in drawn)
            ):
                name = row["annotation"].lower().replace("’", "'")
                clip = animated.get(code)
                moving = clip if clip and _moves(clip) else None
                found.append(Concept(row["hexcode"], name, row["group"], three_d[code], moving))
    if not found:
        raise DataError("No concept is drawn in all five styles: the packages differ from the pinned ones.")
    return found


def choose_core(known: list[Concept], count: int, still: bool = False) -> list[Concept]:
    """The concepts the bundled model knows: they move, are called by at most two plain words and look distinct.

    Groups in order of preference, within a group by hash; none is a concept that tokenizers are tested on. With
    `still`, those that do not move follow, in the same order.
    """
    names = {one.name for one in known}
    fit = [
        one
        for one in known
        if (one.animated or still)
        and one.group in CORE_GROUPS
        and re.fullmatch(r"[a-z]+( [a-z]+)?", one.name)
        and one.name.removesuffix(" face") not in names - {one.name}
        and not NOT_CORE.search(one.name)
        and not splits.tokenizer_held_out(one.hexcode)
    ]
    if not 0 < count <= len(fit):
        raise DataError(
            f"{count} core concepts were asked for; 1 to {len(fit)} are {'' if still else 'animated and '}"
            "plainly named."
        )
    order = sorted(
        fit,
        key=lambda one: (
            one.animated is None,
            CORE_GROUPS.index(one.group),
            "face" in one.name,
            splits.fraction(one.hexcode, "core"),
        ),
    )
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


def compose(
    sprite: np.ndarray, color: tuple[int, int, int], side_px: int = OBJECT_PX, place: str = "centre"
) -> np.ndarray:
    """A sprite uint8 [S, S, 4] as an image uint8 [64, 64, 3]: an object of `side_px` pixels on a plain colour."""
    small = Picture.fromarray(sprite).resize((side_px, side_px), Picture.Resampling.LANCZOS)
    canvas = Picture.new("RGB", (CANVAS_PX, CANVAS_PX), color)
    across, down = PLACES[place]
    free = (CANVAS_PX - side_px) // 2
    canvas.paste(small, (free * across, free * down), small)
    return np.asarray(canvas)


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


def _jobs(
    folder: Path, sprites: np.ndarray, animations: dict[str, np.ndarray], concepts: list[Concept]
) -> list[Job]:
    """Each concept with its sprites in the order of the styles, and the frames of its animation, if it has one."""
    row = {(line["hexcode"], line["style"]): line["row"] for line in read_lines(folder / "sprites.jsonl")}
    return [
        (
            one,
            [np.array(sprites[row[one.hexcode, style]]) for style in STYLES],
            np.array(animations[one.hexcode]) if one.animated else None,
        )
        for one in concepts
    ]


def _compose_all(
    folder: Path, pool: ProcessPoolExecutor, progress: bool, work: Callable[..., tuple[Lines, ...]], jobs: list[Job],
    *names: str,
) -> None:  # fmt: skip
    """Compose concepts by `work`, and write the lines that it returns of each to `names`.jsonl."""
    made = _map(pool, partial(work, folder), jobs, names[0], progress)
    for name, found in zip(names, zip(*made, strict=True), strict=True):
        write_lines(folder / f"{name}.jsonl", chain.from_iterable(found))


def _move_concept(folder: Path, job: Job, core: set[str]) -> tuple[Lines]:
    """A concept's stills and clips in every style under FOLDER/moving, and their records; none if it is held out.

    core: concepts whose animations by the artist are in videos.jsonl already.
    """
    concept, drawn, animation = job
    lines: Lines = []
    code = concept.hexcode
    unseen = splits.style_held_out(code)
    if splits.video_held_out(code):
        return ([],)
    free = [name for name in BACKGROUNDS if not splits.pair_held_out(code, name)]
    for style, sprite in zip(STYLES, drawn, strict=True):
        by_artist = animation is not None and style == ("flat" if unseen else "3d")
        if (style == "3d" and unseen) or (by_artist and code in core):
            continue
        motion = min(MOTIONS, key=lambda name: splits.fraction(code, name, "motion", style))
        frames = animation if by_artist and animation is not None else move(sprite, motion, FRAMES)
        chosen = sorted(free, key=lambda name: splits.fraction(code, name, "clip", style))
        for background in chosen[:MOVING_BACKGROUNDS]:
            color = BACKGROUNDS[background]
            image, video = (f"moving/{code}-{style}-{background}.{suffix}" for suffix in ("png", "webp"))
            if not (folder / image).is_file():
                Image(compose(sprite, color)).save(folder / image)
            if not (folder / video).is_file():
                Video(np.stack([compose(frame, color) for frame in frames]), FRAME_RATE_HZ).save(
                    folder / video
                )
            kind = "animated" if style == "3d" or by_artist else f"animated, {style}"
            lines.append({
                "text": f"{concept.article}, {kind}, {background} background", "image": image, "video": video,
                "hexcode": code, "name": concept.name, "background": background, "style": style,
                "motion": "artist" if by_artist else motion, "split": "train", "holdout": None,
            })  # fmt: skip
    return (lines,)


def _lay_out_concept(folder: Path, job: Job) -> tuple[Lines]:
    """One concept in every style on every background, each in one size and place that a hash decides."""
    concept, drawn, _ = job
    lines: Lines = []
    for background, color in BACKGROUNDS.items():
        for style, sprite in zip(STYLES, drawn, strict=True):
            chances = {
                layout: splits.fraction(concept.hexcode, style, background, *layout)
                for layout in product(SIZES_PX, PLACES)
            }
            size, place = min(chances, key=chances.__getitem__)
            image = f"layouts/{concept.hexcode}-{style}-{background}.png"
            if not (folder / image).is_file():
                Image(compose(sprite, color, SIZES_PX[size], place)).save(folder / image)
            named = (
                f"{size} {concept.name}" if concept.article == concept.name else f"a {size} {concept.name}"
            )
            base = {"hexcode": concept.hexcode, "name": concept.name, "background": background}
            text = f"{named}, {place}, {style}, {background} background"
            why = splits.image_holdout(concept.hexcode, style, background)
            why = why or ("layout" if splits.layout_held_out(concept.hexcode, size, place) else None)
            laid_out = {"style": style, "size": size, "place": place}
            lines.append({"text": text, "image": image, **base, **laid_out, **_split(why)})
    return (lines,)


def _compose_concept(folder: Path, job: Job) -> tuple[Lines, Lines, Lines]:
    """One concept on every background, where that is not there yet; the lines of images, videos and joint."""
    concept, drawn, frames = job
    lines: tuple[Lines, Lines, Lines] = ([], [], [])
    still = "flat" if splits.style_held_out(concept.hexcode) else "3d"  # the style that is paired with clips
    for background, color in BACKGROUNDS.items():
        base = {"hexcode": concept.hexcode, "name": concept.name, "background": background}
        images = {style: f"images/{concept.hexcode}-{style}-{background}.png" for style in STYLES}
        moving = f"{concept.article}, animated, {background} background"
        for (style, image), sprite in zip(images.items(), drawn, strict=True):
            if not (folder / image).is_file():
                Image(compose(sprite, color)).save(folder / image)
            text = f"{concept.article}, {style}, {background} background"
            why = splits.image_holdout(concept.hexcode, style, background)
            drawing = {"text": text, "image": image, **base, "style": style, **_split(why)}
            animated = frames is not None and style == still
            lines[0].append(drawing | {"clip_caption": moving} if animated else drawing)
        if frames is None:
            continue
        video = f"videos/{concept.hexcode}-{background}.webp"
        if not (folder / video).is_file():
            Video(np.stack([compose(frame, color) for frame in frames]), FRAME_RATE_HZ).save(folder / video)
        why = splits.video_holdout(concept.hexcode, background)
        lines[1].append({"text": moving, "video": video, **base, **_split(why)})
        paired = {"image": images[still], "video": video, "caption": moving}
        lines[2].append({**paired, **base, "style": still, **_split(why)})
    return lines


def _split(why: str | None) -> dict[str, str | None]:
    return {"split": "test" if why else "train", "holdout": why}


def _has(path: Path, size: tuple[int, ...], owners: list[Concept]) -> bool:
    """Whether the array is there and holds the rows of just these concepts, in this order."""
    rows = path.with_suffix(".jsonl")
    if not (path.is_file() and rows.is_file() and np.load(path, mmap_mode="r").shape == size):
        return False
    return [line["hexcode"] for line in read_lines(rows)] == [one.hexcode for one in owners]


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array whole; the index of the last one goes first, or it would vouch for this one's rows."""
    path.with_suffix(".jsonl").unlink(missing_ok=True)
    write_file(path, lambda scratch: np.save(scratch, array))


def _map(
    pool: ProcessPoolExecutor, work: Callable[[Any], Any], jobs: list[Any], title: str, progress: bool
) -> list[Any]:
    return list(tqdm(pool.map(work, jobs, chunksize=4), total=len(jobs), desc=title, disable=not progress))


def _write_card(folder: Path, known: list[Concept], core: list[Concept], cache: Path) -> None:
    moving = sum(one.animated is not None for one in known)
    about = f"""
{len(known):,} concepts without people, flags and skin tones, each drawn in {len(STYLES)} styles
({", ".join(STYLES)}); {moving} of them move. {len(core)} core concepts are composed on {len(BACKGROUNDS)}
backgrounds ({", ".join(BACKGROUNDS)}), still (64x64 PNG) and moving (lossless animated WebP, {FRAMES}
frames, {FRAME_RATE_HZ:g} per second).

Held out of training: `style`, the 3-D images of {splits.STYLE_SHARE:.0%} of the concepts (their videos, which are
drawn in 3-D too, are not: what is unseen is the still image); `video`, the videos of {splits.VIDEO_SHARE:.0%};
`pair`, {splits.PAIR_SHARE:.0%} of the (concept, background) pairs in every style and moving. Tokenizers never see
{splits.TOKENIZER_SHARE:.0%} of the concepts, none of them core (`tokenizer_held_out`)."""
    if (folder / "layouts.jsonl").is_file():
        about += f"""
layouts.jsonl: the same drawings small ({SIZES_PX["small"]} pixels) or large ({SIZES_PX["large"]}), at one of
{len(PLACES)} places; `layout`, {splits.LAYOUT_SHARE:.0%} of (concept, size, place), is held out too."""
    if (folder / "moving.jsonl").is_file():
        about += """
moving.jsonl: stills and clips of drawings in every style, by the artist or by a simple motion."""
    facts = {
        "concepts": len(known),
        "moving": moving,
        "core": len(core),
        "sources": sources(PACKAGE_NAMES, cache),
    }
    write_card(folder, "The emoji world", about, facts)
