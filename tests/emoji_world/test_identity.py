"""The identity judge: names every drawing on backgrounds it never saw it on, through blur and noise."""

import numpy as np
import pytest
from PIL import Image as Picture
from PIL import ImageFilter

from anytoken.emoji_world.identity import Drawing, IdentityJudge
from anytoken.segments import DNA, Image, Video
from anytoken.utils.errors import EvaluationError


def blurred(image: Image, radius: float) -> Image:
    soft = Picture.fromarray(image.pixels).filter(ImageFilter.GaussianBlur(radius))
    return Image(np.asarray(soft))


def recoloured(image: Image, color: tuple[int, int, int]) -> Image:
    """The same drawing on a background that no composition has."""
    pixels = image.pixels.copy()
    pixels[(pixels == pixels[0, 0]).all(-1)] = color
    return Image(pixels)


@pytest.mark.parametrize("change", ["none", "blur", "noise", "new background"])
def test_every_drawing_is_named_with_its_style(world, change):
    rng = np.random.default_rng(0)
    for record in world.records("emoji/images.jsonl"):
        image = Image(world.pixels(record))
        if change == "blur":
            image = blurred(image, 1.5)
        if change == "noise":
            noisy = image.pixels + rng.normal(0, 25, image.pixels.shape)
            image = Image(noisy.clip(0, 255).astype(np.uint8))
        if change == "new background":
            image = recoloured(image, (120, 90, 200))
        seen = world.stills.identify(image)
        assert (seen.concept, seen.style) == (record["name"], record["style"]), record


def test_held_out_compositions_are_not_among_the_known_ones(world, monkeypatch):
    asked = []
    media = type(world).media
    monkeypatch.setattr(
        type(world),
        "media",
        lambda self, file, record, kind: asked.append(record) or media(self, file, record, kind),
    )
    world._identity("emoji/images.jsonl", "image")
    assert asked and "pair" not in {record["holdout"] for record in asked}
    assert "style" in {
        record["holdout"] for record in asked
    }  # a drawing held out on all backgrounds is known


def test_videos_are_named_by_their_frames_whatever_the_order(world):
    for record in world.records("emoji/videos.jsonl"):
        video = world.media("emoji/videos.jsonl", record, "video")
        assert world.clips.identify(video).concept == record["name"]
        assert world.clips.identify(Video(video.frames[::-1], 4.0)).concept == record["name"]


def test_concepts_are_ranked_and_each_stands_once(world):
    record = world.records("emoji/images.jsonl")[0]
    seen = world.stills.identify(Image(world.pixels(record)))
    assert sorted(seen.concepts) == ["bar", "cross", "disc"] and seen.concepts[0] == record["name"]


def test_one_composition_is_enough():
    def square(color: int, ground: int) -> Image:
        pixels = np.full((64, 64, 3), ground, np.uint8)
        pixels[16:48, 16:48] = color
        return Image(pixels)

    judge = IdentityJudge(
        [Drawing("dark", "flat", [square(10, 200)]), Drawing("light", "flat", [square(250, 200)])]
    )
    assert judge.identify(square(20, 90)).concept == "dark"
    assert judge.identify(square(230, 90)).concept == "light"


def test_what_cannot_be_judged_is_refused(world):
    with pytest.raises(EvaluationError, match="received DNA"):
        world.stills.identify(DNA("ACGT"))
    with pytest.raises(EvaluationError, match="received none"):
        IdentityJudge([])
