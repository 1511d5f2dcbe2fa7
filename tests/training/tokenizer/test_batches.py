"""Training batches: a batch is of its seed and number alone, pictures are composed right, own files will do."""

import json

import numpy as np
import pytest
import torch

from anytoken.segments import Image, Speech, Video
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.image import to_unit_range
from anytoken.training.tokenizer.batches import BACKGROUNDS, audio_batches, batches_for, place, training_rows

ARRAYS = {"image": "emoji/sprites.npy", "video": "emoji/animations.npy", "speech": "speech/train_audio.npy"}


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """A folder of a user's pictures, clips and recordings, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for n in range(3):
        pixels = rng.integers(0, 256, (30 + n, 40, 3), dtype=np.uint8)
        Image(pixels).save(folder / ("sub" if n else ".") / f"{n}.png")
        Video(np.stack([pixels] * (n + 2))).save(folder / f"{n}.gif")
        Speech(rng.uniform(-0.5, 0.5, 6_000 + 12_000 * n), 12_000).save(folder / f"{n}.wav")
    return folder


@pytest.fixture(params=["array", "files"])
def source(request, sets, own_files):
    return lambda kind: sets / ARRAYS[kind] if request.param == "array" else own_files


@pytest.mark.parametrize("kind", ["image", "video", "speech"])
def test_a_batch_depends_on_seed_and_number_only(source, kind):
    first, again, other = (batches_for(kind, source(kind), 4, seed) for seed in (7, 7, 8))
    five = first(5)
    for step in (0, 9, 3):
        first(step)
    assert torch.equal(first(5), five) and torch.equal(again(5), five)
    assert first(6).shape != five.shape or not torch.equal(first(6), five)
    assert other(5).shape != five.shape or not torch.equal(other(5), five)


@pytest.mark.parametrize("kind", ["image", "video", "speech"])
def test_batches_have_the_shape_and_range_tokenizers_train_on(source, kind):
    for step in range(4):
        batch = batches_for(kind, source(kind), 4, 0)(step)
        assert batch.dtype == torch.float32 and (kind == "speech" or batch.shape[:2] == (4, 3))
        assert batch.isfinite().all() and batch.abs().max() <= (1 if kind != "speech" else 1.3) + 1e-5
        if kind != "speech":
            assert all(side % 8 == 0 for side in batch.shape[-2:])
        assert kind != "video" or batch.shape[2] in (4, 8)


def test_pictures_come_in_other_sizes_too(sets):
    batch = batches_for("image", sets / ARRAYS["image"], 2, 0)
    sizes = {tuple(batch(step).shape[2:]) for step in range(30)}
    assert (64, 64) in sizes and len(sizes) > 2


def test_sounds_are_long_and_fewer_or_short_and_more(source):
    batches = batches_for("speech", source("speech"), 4, 0)
    shapes = {tuple(batches(step).shape) for step in range(40)}
    assert shapes == {(4, 16_000), (5, 12_800), (6, 9_600), (10, 6_400)}
    voiced = batches_for("speech", source("speech"), 4, 0, {"num_global_codes": 4})
    assert {tuple(voiced(step).shape) for step in range(40)} >= {(4, 32_000), (10, 12_800)}


@pytest.mark.parametrize("indexed", [True, False])
def test_a_third_of_the_crops_begin_and_a_third_end_with_a_clip_that_an_index_names(tmp_path, indexed):
    """Clips of 3 s at full level, each with 0.1 s at half level at both ends."""
    clip = np.full(48_000, 16_000, np.int16)
    clip[:1_600] = clip[-1_600:] = 8_000
    np.save(tmp_path / "a.npy", np.tile(clip, 20))
    if indexed:
        lines = [json.dumps({"start": 48_000 * n, "samples": 48_000}) for n in range(20)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
    batches = audio_batches(tmp_path / "a.npy", 60, 0)
    first = last = total = 0
    for step in range(12):
        crops = batches(step).abs()
        level = crops[:, crops.shape[1] // 3 : 2 * crops.shape[1] // 3].median(1).values
        soft = [(crops[:, part].mean(1) / level < 0.75) for part in (slice(100, 800), slice(-800, -100))]
        first, last, total = first + int(soft[0].sum()), last + int(soft[1].sum()), total + len(crops)
    shares = first / total, last / total
    assert all(0.25 < share < 0.5 for share in shares) if indexed else max(shares) < 0.2


def test_only_training_concepts_are_drawn_from(sets, colors):
    assert len(training_rows(sets / "emoji" / "sprites.jsonl")) == 12
    for kind in ("image", "video"):
        batches = batches_for(kind, sets / ARRAYS[kind], 8, 0)
        pixels = torch.cat([((batches(step) + 1) * 127.5).transpose(0, 1).flatten(1) for step in range(6)], 1)
        near = [((pixels - torch.tensor(color)[:, None]).abs() < 1.5).all(0).sum() for color in colors]
        assert near[0] > 100 and near[1] == 0


# ---- composing ----


def sprite(color, alpha: int = 255, side: int = 16) -> torch.Tensor:
    return torch.tensor([*color, alpha], dtype=torch.uint8).expand(side, side, 4)


def test_nothing_on_a_colour_is_that_colour():
    empty = torch.stack([sprite((255, 0, 255), alpha=0)] * 20)
    pictures = place(empty, 24, 40, np.random.default_rng(0))
    assert pictures.shape == (20, 3, 24, 40)
    flat = pictures.flatten(2)
    assert (flat - flat[:, :, :1]).abs().max() < 1e-5, (
        "a flat colour where alpha is 0, without the hidden pink"
    )
    colors = {tuple(((one[:, 0] + 1) * 127.5).round().int().tolist()) for one in flat}
    assert colors & set(BACKGROUNDS) and len(colors) > 5


def test_an_opaque_sprite_covers_its_place_and_nothing_else():
    whole = torch.stack([sprite((0, 255, 0), side=64)] * 40)
    pictures = ((place(whole, 64, 64, np.random.default_rng(0)) + 1) * 127.5).round()
    green = torch.tensor([0.0, 255.0, 0.0])[:, None, None]
    shares = (pictures == green).all(1).float().mean((1, 2))
    assert shares.min() > 0.3**2 and shares.max() <= 1
    standard = (shares - (56 / 64) ** 2).abs() < 0.06  # its border is blended
    assert 10 <= standard.sum() <= 30, "about half stand as in the composed set"
    corner = pictures[standard][0, :, :3, :3].flatten(1)
    assert (corner - corner[:, :1]).abs().max() == 0 and not torch.equal(corner[:, 0], green[:, 0, 0])


def test_half_alpha_is_half_of_each():
    (picture,) = place(torch.stack([sprite((200, 100, 0), alpha=128)]), 64, 64, np.random.default_rng(3))
    picture = (picture + 1) * 127.5
    centre = picture.flatten(1).mode(1).values
    grounds = [
        corner for corner in picture[:, ::63, ::63].flatten(1).T if not torch.allclose(corner, centre, atol=1)
    ]
    expected = torch.tensor([200.0, 100.0, 0.0]) * 128 / 255 + grounds[0] * 127 / 255
    torch.testing.assert_close(centre, expected, atol=1.0, rtol=0)


def test_the_frames_of_a_clip_share_colour_and_place():
    frames = torch.stack([sprite((0, 255, 0))] * 4 + [sprite((0, 0, 255))] * 4)
    placed = place(frames, 64, 64, np.random.default_rng(1), repeat=4)
    assert all(torch.equal(placed[0], placed[n]) for n in (1, 2, 3))
    assert all(torch.equal(placed[4], placed[n]) for n in (5, 6, 7)) and not torch.equal(placed[0], placed[4])


# ---- own files ----


def test_a_glob_chooses_files(own_files):
    assert batches_for("image", own_files / "sub" / "*.png", 2, 0)(0).shape == (2, 3, 48, 64)


def test_own_pictures_and_clips_come_as_their_tokenizer_encodes_them(tmp_path):
    rng = np.random.default_rng(0)
    for n, (height, width, frames) in enumerate([(90, 160, 16), (90, 160, 16), (120, 60, 5)]):
        clip = Video(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8))
        clip.save(tmp_path / f"{n}.webp")
        Image(clip.frames[0]).save(tmp_path / f"{n}.png")
    pictures = batches_for("image", tmp_path / "*.png", 4, 0, {"side_px": 96})
    assert {tuple(pictures(step).shape) for step in range(20)} == {(4, 3, 56, 96), (4, 3, 96, 48)}
    tall = next(batch for step in range(20) if (batch := pictures(step)).shape[2] == 96)
    assert torch.equal(tall[0], to_unit_range(Image.open(tmp_path / "2.png").resize(96, 48).pixels.copy()))
    clips = batches_for("video", tmp_path / "*.webp", 4, 0, {"side_px": 32, "max_steps": 4})
    assert {tuple(clips(step).shape) for step in range(20)} == {(4, 3, 16, 16, 32), (4, 3, 4, 32, 16)}


def test_a_short_recording_is_repeated(own_files):
    batches = batches_for("speech", own_files / "0.wav", 3, 0)
    batch = next(one for one in map(batches, range(20)) if one.shape == (3, 16_000))
    assert torch.equal(batch[:, 8_000:], batch[:, :8_000])
    assert batch[:, :8_000].abs().mean() > 0.1


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("image", "nowhere.npy", r"nowhere\.npy is missing: build the set first"),
        ("image", "nowhere", "nowhere holds no image files; expected .png"),
        ("speech", "*.xyz", "holds no speech files; expected .wav"),
    ],
)
def test_missing_data_is_named(tmp_path, kind, source, says):
    with pytest.raises(TokenizerError, match=says):
        batches_for(kind, tmp_path / source, 2, 0)


def test_half_of_the_clips_have_another_timbre_at_every_step(tmp_path):
    time = np.arange(400_000) / 16_000
    tones = sum(np.sin(2 * np.pi * pitch * time) for pitch in (300, 1_000, 2_500, 5_000))
    np.save(tmp_path / "audio.npy", (4_000 * tones).astype(np.int16))
    batches = batches_for("speech", tmp_path / "audio.npy", 32, 0)
    same = []
    for step in range(8):
        spectra = torch.fft.rfft(batches(step)).abs()
        peaks = spectra.topk(4, dim=1).values
        same += ((peaks.amax(1) / peaks.amin(1)) < 1.5).tolist()
    assert 0.25 < sum(same) / len(same) < 0.75
