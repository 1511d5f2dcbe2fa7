"""The emoji world, built from a miniature of its packages: which concepts, how they look, what is held out."""

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from anytoken.data.dataset_card import checksums, read_lines
from anytoken.emoji_world import emoji, splits
from anytoken.emoji_world.emoji import (
    BACKGROUNDS,
    PACKAGE_NAMES,
    STYLES,
    Concept,
    build_emoji,
    choose_core,
    compose,
    find_concepts,
)
from anytoken.emoji_world.motions import MOTIONS, move
from anytoken.emoji_world.packages import PACKAGES
from anytoken.segments import Image, Video
from anytoken.utils.errors import DataError

# hexcode as OpenMoji writes it, name, group
WORLD = [
    ("1F44B", "waving hand", "people-body"),
    ("1F984", "unicorn", "animals-nature"),
    ("1F989", "owl", "animals-nature"),  # tokenizers are tested on it, so it is not core
    ("1F419", "octopus", "animals-nature"),  # never on green in training
    ("1F347", "grapes", "food-drink"),
    ("1F34E", "red apple", "food-drink"),  # never in 3-D in training
    ("1F95A", "egg", "food-drink"),  # its clip has one frame: it does not move
    ("1F9ED", "compass", "travel-places"),  # never moving in training
    ("2708-FE0F", "Airplane", "travel-places"),  # file names with and without the variation selector
    ("1FAB5", "wood", "travel-places"),  # not drawn in 3-D
    ("1F3C1", "chequered flag", "flags"),
]
KNOWN = ["unicorn", "owl", "octopus", "grapes", "red apple", "egg", "compass", "airplane"]
CORE = ["octopus", "unicorn", "grapes", "red apple", "airplane", "compass"]
COLORS = {  # of each style's drawings here
    "line": (200, 10, 10), "noto": (10, 200, 10), "twemoji": (10, 10, 200), "flat": (200, 200, 10),
    "3d": (10, 200, 200),
}  # fmt: skip
CLIP_FRAMES, CLIP_MS = 12, 50


# ---- the packages in miniature ----


def frame_color(frame: int) -> tuple[int, int, int]:
    return 20 * frame, 250 - 20 * frame, 100


def block(color: tuple[int, int, int], side: int = 256) -> Picture.Image:
    """A coloured square in the middle half, transparent around."""
    picture = Picture.new("RGBA", (side, side), (0, 0, 0, 0))
    picture.paste((*color, 255), (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    return picture


def rectangle(style: str, side: int) -> str:
    red, green, blue = COLORS[style]
    place = f'x="{side // 4}" y="{side // 4}" width="{side // 2}" height="{side // 2}"'
    return f'<rect {place} fill="rgb({red},{green},{blue})"/>'


def make_packages(cache: Path) -> Path:
    """Every package unpacked beside something in place of its archive."""
    roots = {}
    for name in PACKAGE_NAMES:
        archive = cache / PACKAGES[name].file
        roots[name] = archive.with_suffix(".unpacked") / "package"
        roots[name].mkdir(parents=True)
        archive.write_text(f"stands for {name}")
    make_openmoji(roots["openmoji"])
    for style, name in emoji.ICONIFY.items():
        make_iconify(roots[name], style)
    for name in (emoji.THREE_D, *emoji.ANIMATED):
        (roots[name] / "assets").mkdir()
    for number, (code, name, _) in enumerate(WORLD):
        file = f"{code.lower()}.webp"
        if name != "wood":
            block(COLORS["3d"]).save(roots[emoji.THREE_D] / "assets" / file, lossless=True)
        count = 1 if name == "egg" else CLIP_FRAMES
        first, *rest = (block(frame_color(frame), 64) for frame in range(count))
        more: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": CLIP_MS} if rest else {}
        first.save(roots[emoji.ANIMATED[number % 4]] / "assets" / file, lossless=True, **more)
    return cache


def make_openmoji(root: Path) -> None:
    (root / "data").mkdir()
    (root / "color" / "svg").mkdir(parents=True)
    with (root / "data" / "openmoji.csv").open("w", newline="", encoding="utf-8") as handle:
        table = csv.DictWriter(handle, ["emoji", "hexcode", "group", "annotation", "skintone"])
        table.writeheader()
        for code, name, group in WORLD:
            table.writerow({"hexcode": code, "group": group, "annotation": name, "skintone": ""})
        toned = {
            "hexcode": "1F984",
            "group": "animals-nature",
            "annotation": "unicorn: dark",
            "skintone": "5",
        }
        table.writerow(toned)
    for code, _, _ in WORLD:
        body = rectangle("line", 72)
        svg = f'<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{body}</svg>'
        (root / "color" / "svg" / f"{code}.svg").write_text(svg)


def make_iconify(root: Path, style: str) -> None:
    """Most icons have the table's size, one its own."""
    names = {code: name.lower().replace(" ", "-") for code, name, _ in WORLD}
    icons: dict[str, dict[str, Any]] = {name: {"body": rectangle(style, 128)} for name in names.values()}
    icons["unicorn"] = {"body": rectangle(style, 32), "width": 32, "height": 32}
    table = {"prefix": style, "icons": icons, "width": 128, "height": 128}
    (root / "icons.json").write_text(json.dumps(table))
    chars = {code.lower().removesuffix("-fe0f"): name for code, name in names.items()}
    (root / "chars.json").write_text(json.dumps(chars | {"1f64f": "an-alias-without-icon"}))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        for name in PACKAGE_NAMES:
            patch.setitem(PACKAGES, name, replace(PACKAGES[name], sha256=None))
        yield make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def roots(cache: Path) -> dict[str, Path]:
    folders = {name: (cache / PACKAGES[name].file).with_suffix(".unpacked") for name in PACKAGE_NAMES}
    return {name: folder / "package" for name, folder in folders.items()}


@pytest.fixture(scope="module")
def built(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of six core concepts, read only."""
    out = tmp_path_factory.mktemp("sets")
    return build_emoji(out, cache=cache, concepts=6, workers=2, progress=False)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_lines(folder / f"{name}.jsonl")


def one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return found


def near(pixel: np.ndarray, color: tuple[int, ...]) -> bool:
    return bool(np.abs(pixel.astype(int) - color).max() <= 2)


# ---- which concepts ----


def test_concepts_are_what_all_five_styles_draw(roots: dict[str, Path]) -> None:
    found = find_concepts(roots)
    assert [concept.name for concept in found] == KNOWN  # no people, flags, skin tones; OpenMoji's order
    assert [concept.name for concept in found if concept.animated is None] == ["egg"]
    plane = found[-1]
    assert (plane.hexcode, plane.file) == ("2708-FE0F", "2708-fe0f.webp")
    assert plane.animated and plane.animated.endswith("assets/2708-fe0f.webp")


def test_packages_without_a_common_concept_are_refused(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "packages")
    for picture in (tmp_path / "packages").glob("lobehub-fluent-emoji-3d*/package/assets/*"):
        picture.unlink()
    with pytest.raises(DataError, match="No concept is drawn in all five styles"):
        build_emoji(tmp_path, cache=tmp_path / "packages", progress=False)


def test_core_goes_by_group_and_leaves_out_what_tokenizers_are_tested_on(roots: dict[str, Path]) -> None:
    known = find_concepts(roots)
    assert [concept.name for concept in choose_core(known, 6)] == CORE
    assert choose_core(list(reversed(known)), 3) == choose_core(known, 6)[:3]


def concept(
    name: str, group: str = "animals-nature", code: str = "1F984", animated: str | None = "x"
) -> Concept:
    return Concept(code, name, group, "x.webp", animated)


@pytest.mark.parametrize(
    "odd",
    [
        concept("man", "people-body"),
        concept("egg", animated=None),
        concept("three little pigs"),
        concept("piñata"),
        concept("small fish"),
        concept("alarm clock"),
        concept("heart"),
        concept("owl", code="1F989"),
        concept("dog face"),  # beside "dog"
    ],
    ids=lambda odd: odd.name,
)
def test_what_is_not_core(odd: Concept) -> None:
    known = [concept("dog"), odd]
    assert [found.name for found in choose_core(known, 1)] == ["dog"]
    with pytest.raises(DataError, match=r"2 core concepts were asked for; 1 to 1 "):
        choose_core(known, 2)


def test_faces_come_last_in_their_group() -> None:
    faces = [
        concept("cat face", code="1F347"),
        concept("bear", code="1F40C"),
        concept("tram", "travel-places"),
    ]
    order = [found.name for found in choose_core(faces, 3)]
    assert splits.fraction("1F347", "core") < splits.fraction("1F40C", "core")  # by hash alone it came first
    assert order == ["bear", "cat face", "tram"]


def test_too_many_or_too_few_concepts_are_refused(cache: Path, tmp_path: Path) -> None:
    for count in (0, 7):
        with pytest.raises(DataError, match=rf"^{count} core concepts were asked for; 1 to 6 are animated"):
            build_emoji(tmp_path, cache=cache, concepts=count, progress=False)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("owl", "an owl"), ("red apple", "a red apple"), ("eagle", "an eagle"), ("ice", "an ice"),
        ("umbrella", "an umbrella"), ("unicorn", "a unicorn"), ("octopus", "an octopus"), ("compass", "a compass"),
        ("bus", "a bus"), ("tennis", "a tennis"), ("grapes", "grapes"), ("chopsticks", "chopsticks"),
        ("wood", "wood"), ("high voltage", "high voltage"), ("alien monster", "an alien monster"),
    ],
)  # fmt: skip
def test_articles(name: str, text: str) -> None:
    assert concept(name).article == text


# ---- composing ----


def test_compose_centres_56_pixels_of_object() -> None:
    sprite = np.full((96, 96, 4), (10, 20, 30, 255), dtype=np.uint8)
    picture = compose(sprite, (225, 60, 60))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[4:60, 4:60] == (10, 20, 30)).all()
    picture = picture.copy()
    picture[4:60, 4:60] = (225, 60, 60)
    assert (picture == (225, 60, 60)).all()


def test_compose_blends_by_alpha() -> None:
    sprite = np.full((96, 96, 4), (255, 255, 255, 128), dtype=np.uint8)
    assert near(compose(sprite, (20, 20, 20))[32, 32], (138, 138, 138))
    sprite[..., 3] = 0
    assert (compose(sprite, (20, 20, 20)) == 20).all()


# ---- the build ----


def test_sprites_are_every_concept_in_every_style(built: Path) -> None:
    sprites, rows = np.load(built / "sprites.npy"), lines(built, "sprites")
    assert sprites.shape == (len(KNOWN) * 5, 96, 96, 4) and sprites.dtype == np.uint8
    assert [(row["row"], row["name"], row["style"]) for row in rows] == [
        (5 * index + place, name, style)
        for index, name in enumerate(KNOWN)
        for place, style in enumerate(STYLES)
    ]
    for sprite, row in zip(sprites, rows, strict=True):
        assert near(sprite[48, 48], (*COLORS[row["style"]], 255)), row
        assert near(sprite[30, 66], (*COLORS[row["style"]], 255)), (
            row
        )  # the middle half, also of odd view boxes
        assert sprite[16, 16, 3] == sprite[80, 80, 3] == 0, row


def test_animations_are_eight_frames_of_the_loop(built: Path) -> None:
    clips, rows = np.load(built / "animations.npy"), lines(built, "animations")
    assert clips.shape == (7, 8, 64, 64, 4)
    assert [row["name"] for row in rows] == [name for name in KNOWN if name != "egg"]
    assert [row["row"] for row in rows] == list(range(7))
    assert {row["duration_seconds"] for row in rows} == {CLIP_FRAMES * CLIP_MS / 1000}
    for clip in clips:
        for frame, source in zip(clip, (0, 1, 3, 4, 6, 7, 9, 10), strict=True):
            assert near(frame[32, 32], (*frame_color(source), 255)) and frame[4, 4, 3] == 0


def test_concepts_say_what_they_are_held_out_from(built: Path) -> None:
    rows = lines(built, "concepts")
    assert [row["name"] for row in rows] == KNOWN
    flags = {
        row["name"]: [key for key in ("style", "video", "tokenizer") if row[f"{key}_held_out"]]
        for row in rows
    }
    assert flags["owl"] == ["style", "tokenizer"] and flags["compass"] == ["video"]
    assert flags["red apple"] == flags["airplane"] == ["style"] and flags["grapes"] == []
    assert {row["name"] for row in rows if row["core"]} == set(CORE)
    assert [row["name"] for row in rows if not row["animated"]] == ["egg"]


def test_pictures_show_what_their_captions_say(built: Path) -> None:
    rows = lines(built, "images")
    assert len(rows) == 6 * 8 * 5 == len(list((built / "images").iterdir()))
    assert list(dict.fromkeys(row["name"] for row in rows)) == CORE
    assert rows[0]["text"] == "an octopus, line, white background"
    articles = dict(
        zip(
            CORE,
            ("an octopus", "a unicorn", "grapes", "a red apple", "an airplane", "a compass"),
            strict=True,
        )
    )
    for row in rows:
        style, background = row["style"], row["background"]
        assert row["text"] == f"{articles[row['name']]}, {style}, {background} background"
        assert row["image"] == f"images/{row['hexcode']}-{style}-{background}.png"
        picture = Image.open(built / row["image"]).pixels
        assert picture.shape == (64, 64, 3)
        assert near(picture[2, 2], BACKGROUNDS[background]) and near(picture[12, 12], BACKGROUNDS[background])
        assert near(picture[32, 32], COLORS[style])


def test_videos_move_on_their_background(built: Path) -> None:
    rows = lines(built, "videos")
    assert len(rows) == 6 * 8
    assert one(rows, name="grapes", background="red")["text"] == "grapes, animated, red background"
    for row in rows:
        clip = Video.open(built / row["video"])
        assert clip.frames.shape == (8, 64, 64, 3) and clip.frame_rate_hz == 4
        assert near(clip.frames[5, 2, 2], BACKGROUNDS[row["background"]])
        assert [near(clip.frames[i, 32, 32], frame_color(source)) for i, source in ((0, 0), (7, 10))] == [
            True
        ] * 2


def test_what_is_held_out(built: Path) -> None:
    images, videos, joint = (lines(built, name) for name in ("images", "videos", "joint"))
    for row in (*images, *videos, *joint):
        assert row["split"] == ("train" if row["holdout"] is None else "test")
    apple = [row for row in images if row["name"] == "red apple"]
    assert {row["style"] for row in apple if row["holdout"] == "style"} == {"3d"}
    assert all(row["holdout"] == "style" for row in apple if row["style"] == "3d")
    octopus = [row for row in images if row["name"] == "octopus"]
    assert [row["style"] for row in octopus if row["holdout"] == "pair"] == list(STYLES)
    assert {row["background"] for row in octopus if row["holdout"]} == {"green"}
    assert {row["holdout"] for row in images if row["name"] == "grapes"} == {None}
    assert {row["holdout"] for row in videos if row["name"] == "compass"} == {"video"}
    assert {row["holdout"] for row in images if row["name"] == "compass"} == {None}  # still it may be seen
    assert one(videos, name="octopus", background="green")["holdout"] == "pair"
    assert one(videos, name="red apple", background="white")["holdout"] is None


def test_joint_pictures_are_of_the_training_styles(built: Path) -> None:
    rows = lines(built, "joint")
    assert len(rows) == 6 * 8
    styles = {row["name"]: row["style"] for row in rows}
    assert styles == dict.fromkeys(CORE, "3d") | {"red apple": "flat", "airplane": "flat"}
    assert all(row["style"] == styles[row["name"]] for row in rows)
    trained = {row["image"] for row in lines(built, "images") if row["split"] == "train"}
    videos = {row["video"]: row["holdout"] for row in lines(built, "videos")}
    for row in rows:
        assert row["background"] in row["image"] and row["background"] in row["video"]
        assert row["holdout"] == videos[row["video"]]
        assert row["split"] == "test" or row["image"] in trained


def test_stills_of_clips_know_the_caption_of_the_clip(built: Path) -> None:
    captions = {row["image"]: row["caption"] for row in lines(built, "joint")}
    assert {
        row["image"]: row["clip_caption"] for row in lines(built, "images") if "clip_caption" in row
    } == captions


def test_the_card_counts(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert (manifest["concepts"], manifest["moving"], manifest["core"]) == (8, 7, 6)
    assert [source["name"] for source in manifest["sources"]] == PACKAGE_NAMES
    held_out = sum(row["split"] == "test" for row in lines(built, "images"))
    assert manifest["files"]["images.jsonl"] == {"lines": 240, "test": held_out}
    assert manifest["sha256"] == checksums(built)
    assert "8 concepts without people" in (built / "README.md").read_text()


# ---- going on ----


def times(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if path.suffix in (".npy", ".png", ".webp"))
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "emoji"))


def rebuild(copy: Path, cache: Path, **options: Any) -> Path:
    return build_emoji(copy.parent, cache=cache, workers=1, progress=False, concepts=6, **options)


def test_only_what_is_missing_is_made_again(copy: Path, cache: Path) -> None:
    sums, before = checksums(copy), times(copy)
    lost = {"images/1F347-3d-red.png", "videos/1F347-red.webp"}
    for name in lost:
        (copy / name).unlink()
    (copy / "images.jsonl").unlink()
    rebuild(copy, cache)
    after = times(copy)
    assert {name for name in before if before[name] != after[name]} == lost
    assert checksums(copy) == sums


@pytest.mark.parametrize("lost", ["sprites.npy", "sprites.jsonl", "animations.npy", "animations.jsonl"])
def test_a_lost_array_is_drawn_again(copy: Path, cache: Path, lost: str) -> None:
    sums, before = checksums(copy), times(copy)
    (copy / lost).unlink()
    rebuild(copy, cache)
    after = times(copy)
    drawn = Path(lost).with_suffix(".npy").as_posix()
    assert {name for name in before if before[name] != after[name]} == {drawn}
    assert checksums(copy) == sums


def test_arrays_of_other_concepts_are_drawn_again(copy: Path, cache: Path) -> None:
    swapped = lines(copy, "sprites")
    for row in swapped:
        row["hexcode"] = {"1F347": "1F34E", "1F34E": "1F347"}.get(row["hexcode"], row["hexcode"])
    (copy / "sprites.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    before = times(copy)
    rebuild(copy, cache)
    assert times(copy)["sprites.npy"] != before["sprites.npy"]
    assert [row["name"] for row in lines(copy, "sprites")][::5] == KNOWN


def test_an_interrupted_drawing_does_not_pass_for_a_finished_one(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the array of fewer concepts and its index: the old index must not vouch for it."""
    shapes: list[tuple[int, ...]] = []

    def write_lines(path: Path, rows: Any) -> None:
        if path.name == "sprites.jsonl":
            shapes.append(np.load(copy / "sprites.npy", mmap_mode="r").shape)
            raise KeyboardInterrupt
        real(path, rows)

    real = emoji.write_lines
    monkeypatch.setattr(emoji, "write_lines", write_lines)
    with pytest.raises(KeyboardInterrupt):
        rebuild(copy, cache, limit=3)
    monkeypatch.undo()
    assert shapes == [(15, 96, 96, 4)]
    assert not (copy / "sprites.jsonl").is_file()
    rebuild(copy, cache)
    assert np.load(copy / "sprites.npy", mmap_mode="r").shape[0] == 5 * len(lines(copy, "concepts")) == 40


def test_limit_keeps_core_concepts_first(cache: Path, tmp_path: Path) -> None:
    few = build_emoji(tmp_path / "few", cache=cache, concepts=5, workers=1, limit=2, progress=False)
    assert [row["name"] for row in lines(few, "concepts")] == CORE[:2]
    assert len(lines(few, "images")) == 2 * 8 * 5
    more = build_emoji(tmp_path / "more", cache=cache, concepts=1, workers=1, limit=3, progress=False)
    assert [(row["name"], row["core"]) for row in lines(more, "concepts")] == [
        ("octopus", True),
        ("unicorn", False),
        ("owl", False),
    ]
    assert np.load(more / "sprites.npy").shape[0] == 15 and len(lines(more, "joint")) == 8


# ---- more concepts, sizes and places ----


def test_more_core_concepts_begin_with_those_that_move(roots: dict[str, Path]) -> None:
    known = find_concepts(roots)
    more = choose_core(known, 7, still=True)
    assert [concept.name for concept in more] == [*CORE, "egg"]
    with pytest.raises(DataError, match=r"8 core concepts were asked for; 1 to 7 are plainly named"):
        choose_core(known, 8, still=True)


def test_a_concept_that_does_not_move_has_images_only(cache: Path, tmp_path: Path) -> None:
    folder = build_emoji(tmp_path, cache=cache, concepts=7, workers=1, progress=False, still=True)
    assert {row["name"] for row in lines(folder, "images")} == {*CORE, "egg"}
    assert {row["name"] for row in lines(folder, "videos")} == set(CORE)
    assert {row["name"] for row in lines(folder, "joint")} == set(CORE)
    assert not (folder / "layouts.jsonl").exists()  # they are an option


def test_sizes_and_places_are_as_the_captions_say(cache: Path, tmp_path: Path) -> None:
    folder = build_emoji(tmp_path, cache=cache, concepts=6, workers=1, progress=False, layouts=True)
    rows = lines(folder, "layouts")
    assert len(rows) == 6 * 8 * 5 and len({(row["size"], row["place"]) for row in rows}) == 10
    centres = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
    for row in rows:
        assert row["text"].split(", ")[1:] == [row["place"], row["style"], f"{row['background']} background"]
        assert row["size"] in row["text"] and row["name"] in row["text"]
        pixels = Image.open(folder / row["image"]).pixels.astype(int)
        # The drawings here are squares, half as wide as their sprite.
        inside = np.argwhere(np.abs(pixels - COLORS[row["style"]]).max(-1) <= 2)
        (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
        side = {"small": 32, "large": 48}[row["size"]]
        assert abs(right - left - side // 2) <= 2 and abs(bottom - top - side // 2) <= 2, row
        across, down = centres[row["place"]]
        offsets = ((left + right) / 2 - 32, (top + bottom) / 2 - 32)
        free = (64 - side) / 2
        assert np.allclose(offsets, (free * across, free * down), atol=1.5), row
        assert free % 8 == 0  # shifts are of whole patches


def test_clips_of_every_style_move_and_respect_what_is_held_out(cache: Path, tmp_path: Path) -> None:
    folder = build_emoji(tmp_path, cache=cache, concepts=2, workers=1, progress=False, moving=True)
    rows = lines(folder, "moving")
    concepts = {row["hexcode"]: row for row in lines(folder, "concepts")}
    assert {row["style"] for row in rows} == set(STYLES) and {row["core"] for row in concepts.values()} == {
        True,
        False,
    }
    assert {concepts[row["hexcode"]]["core"] for row in rows} == {True, False}
    for row in rows:
        code, style, concept = row["hexcode"], row["style"], concepts[row["hexcode"]]
        assert concept["core"] or not concept["tokenizer_held_out"]
        assert not splits.video_held_out(code) and not splits.pair_held_out(code, row["background"])
        unseen = splits.style_held_out(code)
        assert style != "3d" or not unseen
        by_artist = row["motion"] == "artist"
        # The artist animates in 3-D; where that still may not be seen, its clip goes with the flat one. Core:
        # videos.jsonl.
        drawn_like = "flat" if unseen else "3d"
        assert by_artist == (concept["animated"] and not concept["core"] and style == drawn_like)
        assert not (concept["core"] and concept["animated"] and style == drawn_like)
        styled = "" if style == "3d" or by_artist else f", {style}"
        assert row["split"] == "train"
        assert row["text"].endswith(f", animated{styled}, {row['background']} background")
        still, clip = Image.open(folder / row["image"]), Video.open(folder / row["video"])
        assert clip.frames.shape == (8, *still.pixels.shape)
        assert np.abs(np.diff(clip.frames.astype(int), axis=0)).max() > 30
        if not by_artist:
            assert np.abs(clip.frames[0].astype(int) - still.pixels).max() <= 2  # at rest


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_is_a_loop_that_keeps_the_drawing_in_the_frame(motion: str) -> None:
    sprite = np.zeros((96, 96, 4), np.uint8)
    sprite[24:72, 32:64] = (200, 60, 20, 255)
    frames = move(sprite, motion, 8)
    assert frames.shape == (8, 96, 96, 4) and np.abs(frames[0].astype(int) - sprite).max() <= 2
    areas = (frames[..., 3] > 127).sum((1, 2))
    if motion == "pulse":
        assert areas.argmin() == 4 and 0.75 < areas.min() / areas[0] < 0.8
    else:
        assert np.abs(areas / areas[0] - 1).max() < 0.02
    rows, columns = (frames[..., 3] > 127).any(2), (frames[..., 3] > 127).any(1)
    assert not rows[:, [0, -1]].any() and not columns[:, [0, -1]].any()
    middles = [np.argwhere(frame[..., 3] > 127).mean(0) for frame in frames]
    highest, rightmost = (int(np.argmin([y for y, _ in middles])), int(np.argmax([x for _, x in middles])))
    assert highest == 4 or motion != "bounce"
    assert rightmost == 2 or motion != "sway"


def test_layouts_are_held_out_by_combination(cache: Path, tmp_path: Path) -> None:
    folder = build_emoji(tmp_path, cache=cache, concepts=6, workers=1, progress=False, layouts=True)
    for row in lines(folder, "layouts"):
        image = splits.image_holdout(row["hexcode"], row["style"], row["background"])
        layout = splits.layout_held_out(row["hexcode"], row["size"], row["place"])
        assert row["holdout"] == (image or ("layout" if layout else None))
        assert row["split"] == ("test" if row["holdout"] else "train")
    assert "layout" in (folder / "README.md").read_text()
    assert not emoji.PLACES.keys() & emoji.SIZES_PX.keys()


def test_compositions_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    sprite = rng.integers(0, 256, (96, 96, 4), dtype=np.uint8)
    assert hashlib.sha256(compose(sprite, (70, 120, 225)).tobytes()).hexdigest()[:16] == "8e9bbc35b92a3063"
