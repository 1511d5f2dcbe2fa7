"""Layered images and clips: the battery of images, backgrounds that leave local codes as they are, recolouring."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from batteries import TokenizerBattery, parameters_without_gradient

from anytoken.data.shards import Shards, tokenize_records
from anytoken.processor import Processor
from anytoken.segments import Image, Video
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.layered import (
    LayeredImageTokenizer,
    LayeredVideoTokenizer,
    Matte,
    base_color,
    composed,
    empty_patches,
    find_base,
    hardened,
)
from anytoken.tokenizers.modules.convnext import patchify
from anytoken.tokenizers.text import TextTokenizer
from anytoken.tokenizers.video import STEP_FRAMES, TUBELET, VideoTokenizer
from anytoken.training.tokenizer.batches import BACKGROUNDS, layer_batches, training_rows

ROOT = Path(__file__).parents[2]
MINI = ROOT / "anytoken" / "pretrained" / "mini" / "tokenizers"
EMOJI = ROOT / "tests" / "assets" / "tiny" / "emoji"
SPRITES, ANIMATIONS = EMOJI / "sprites.npy", EMOJI / "animations.npy"
PUBLISHED = {"image": SPRITES, "video": ANIMATIONS}
TINY = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "refine_width": 8, "refine_depth": 1, "kernel": 3,
        "levels": [5, 5, 4], "matte_width": 16, "matte_depth": 1}  # fmt: skip
TINY_VIDEO = {key: value for key, value in TINY.items() if not key.startswith(("refine", "kernel"))}


def drawing(seed=0):
    """A true layer [4, 64, 64]: a disc of blocks of colour with a soft edge."""
    rng = np.random.default_rng(seed)
    blocks = torch.from_numpy(rng.uniform(-1, 1, (3, 8, 8)).astype(np.float32)).repeat_interleave(8, 1)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    coverage = (21 - ((y - 32) ** 2 + (x - 32) ** 2).sqrt()).clamp(0, 1)[None]
    return torch.cat([blocks.repeat_interleave(8, 2) * coverage, coverage])


def on_color(layer, rgb):
    base = torch.tensor(rgb, dtype=torch.float32) / 127.5 - 1
    pixels = composed(layer[None], base[None])[0]
    return Image(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy())


class TestLayeredImageTokenizer(TokenizerBattery):
    tokenizer_class = LayeredImageTokenizer
    settings = TINY

    def segment(self, seed):
        small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        return Image(small).resize(64, 64)

    def odd(self):
        return {
            "one pixel": Image(np.zeros((1, 1, 3), np.uint8)),
            "a row": Image(np.full((1, 300, 3), 255, np.uint8)),
            "one colour": Image(np.full((64, 64, 3), 90, np.uint8)),
            "plain border": on_color(drawing(), (225, 60, 60)),
        }

    def batch(self):
        return layer_batches(SPRITES, 3, 0)(0)

    def check_same_shape(self, segment, back):
        assert back.pixels.shape == segment.pixels.shape

    def check_close(self, one, other):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1

    def test_the_training_loss_reaches_every_parameter(self):
        """An untrained matte finds no empty patch, so the vector of those has a gradient from a trained one only."""
        assert parameters_without_gradient(self.untrained().train(), self.batch()) == ["empty"]
        trained = load_tokenizer(MINI / "image").train()
        assert not parameters_without_gradient(trained, self.batch())


def test_the_base_is_the_border_of_plain_images_only():
    plain = torch.stack([composed(drawing()[None], torch.tensor([[1.0, -1.0, 0.1]]))[0]] * 2)
    plain[1, :, :48] = torch.rand(3, 48, 64) * 2 - 1
    codes, found = find_base(plain)
    assert found.tolist() == [True, False]
    assert (base_color(codes)[0] - torch.tensor([1.0, -1.0, 0.1])).abs().max() <= 1 / 31


def test_a_true_matte_takes_composed_images_apart():
    """With the true coverage, premultiplied colour and coverage are those of the drawing on any base."""
    layer = drawing()[None]
    for rgb in BACKGROUNDS:
        base = torch.tensor([rgb]) / 127.5 - 1
        color = composed(layer, base) - (1 - layer[:, 3:]) * base[:, :, None, None]
        assert torch.allclose(color, layer[:, :3], atol=1e-5)


def test_patches_without_coverage_have_one_code_and_decode_to_the_base():
    torch.manual_seed(0)
    tokenizer = LayeredImageTokenizer(**TINY).eval()
    layer = drawing()[None]
    empty = empty_patches(layer)
    assert 0.2 < empty.float().mean() < 0.8
    _, codes, _ = tokenizer._matched(tokenizer._latents(layer), empty)
    assert (codes[empty] == tokenizer.empty_code).all() and (codes[~empty] != tokenizer.empty_code).all()
    assert hardened(torch.tensor([0.02, 0.5, 0.98])).tolist() == [0.0, 0.5, 1.0]


def test_a_matte_learns_coverage():
    torch.manual_seed(0)
    matte, layers = Matte(16, 1), torch.stack([drawing(seed) for seed in range(4)])
    bases = torch.rand(4, 3) * 2 - 1
    optimizer = torch.optim.Adam(matte.parameters(), 1e-2)
    first = None
    for _ in range(60):
        loss = Matte.loss(matte(composed(layers, bases)), layers)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 4


def test_weights_of_a_plain_image_tokenizer_are_a_beginning():
    """Over mid-grey, coverage 0.5 by chance: latents of the layer are those of the plain tokenizer's image."""
    settings = {key: value for key, value in TINY.items() if not key.startswith("matte")}
    torch.manual_seed(0)
    plain, layered = ImageTokenizer(**settings).eval(), LayeredImageTokenizer(**TINY).eval()
    layered.load_state_dict(layered.adapted_state(plain.state_dict()))
    layer = drawing()[None]
    expected = plain._encode_pixels(layer[:, :3]).flatten(2).transpose(1, 2)
    assert torch.allclose(layered._latents(layer), expected, atol=1e-5)


def test_weights_of_a_causal_video_tokenizer_are_a_beginning():
    settings = {key: value for key, value in TINY_VIDEO.items() if not key.startswith("matte")}
    torch.manual_seed(0)
    plain, layered = (
        VideoTokenizer(**settings, causal=True).eval(),
        LayeredVideoTokenizer(**TINY_VIDEO).eval(),
    )
    layered.load_state_dict(layered.adapted_state(plain.state_dict()))
    layer = drawing()[None, :, None].expand(-1, -1, STEP_FRAMES, -1, -1)
    expected = plain.encoder(patchify(layer[:, :3], TUBELET)).flatten(2).transpose(1, 2)
    assert torch.allclose(layered._latents(layer), expected, atol=1e-5)
    vectors = torch.randn(1, 64, 16)
    color = layered._layer(vectors, (1, 8, 8))[:, :3]
    assert torch.allclose(color, plain._decode_vectors(vectors, (1, 8, 8)), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tiny"), [(LayeredImageTokenizer, TINY), (LayeredVideoTokenizer, TINY_VIDEO)]
)
def test_one_codebook_only(kind, tiny):
    with pytest.raises(TokenizerError, match=f"A {kind.kind} tokenizer has one codebook"):
        kind(**tiny | {"quantizer": {"kind": "vq", "residual": 2}})
    with pytest.raises(TokenizerError, match=f"A {kind.kind} tokenizer takes no num_candidates"):
        kind(**{**tiny, "quantizer": "vq", "num_candidates": 4})


def test_a_clip_is_taken_apart_frame_by_frame_over_the_base_of_its_first_step():
    torch.manual_seed(0)
    matte, layers = Matte(16, 1).eval(), torch.stack([drawing(seed) for seed in range(8)], 1)[None]
    x = composed(layers, torch.tensor([[1.0, -1.0, 0.1]]))
    x[:, :, STEP_FRAMES:, :2] = -1.0  # what comes later does not change the base
    found = matte(x)
    assert found.plain.tolist() == [True]
    for frame in range(8):
        alone = matte(x[:, :, frame], (found.codes, found.plain))
        assert torch.allclose(found.layer[:, :, frame], alone.layer, atol=1e-5)
    assert torch.equal(matte(x[:, :, :STEP_FRAMES]).codes, found.codes)


def test_a_tubelet_is_empty_if_nothing_is_there_in_any_of_its_frames():
    layer = torch.zeros(1, 4, 8, 16, 16)
    layer[0, 3, 5, 9, 3] = 1.0
    assert empty_patches(layer, TUBELET)[0].tolist() == [True] * 6 + [False, True]


def test_layers_of_clips_stand_alike_in_all_frames():
    planes = layer_batches(ANIMATIONS, 2, 0)(0)
    assert planes.shape == (2, 10, 8, 64, 64)
    assert torch.equal(planes[:, 4:], planes[:, 4:, :1, :1, :1].expand_as(planes[:, 4:]))
    moved = (planes[:, :4] - planes[:, :4, :1]).abs().amax((1, 2, 3, 4))
    assert (moved > 0.1).any(), "clips move"


def test_the_base_of_a_clip_is_in_its_shard_and_in_its_tokens(tmp_path):
    torch.manual_seed(0)
    tokenizer = LayeredVideoTokenizer(**TINY_VIDEO).eval()
    drawn = torch.from_numpy(np.load(ANIMATIONS, mmap_mode="r")[0].copy()).movedim(-1, -3).float() / 255
    clips = [on_all_backgrounds(drawn)[place] for place in (2, 6)]
    for row, clip in enumerate(clips):
        clip.save(tmp_path / f"{row}.webp")
    (tmp_path / "set.jsonl").write_text(
        "".join(f'{{"text": "a clip", "video": "{row}.webp"}}\n' for row in range(2))
    )
    out = tokenize_records(tmp_path / "set.jsonl", {"video": tokenizer}, tmp_path / "out", progress=False)
    shards = Shards(out, {"video": tokenizer})
    text = TextTokenizer.train(["a clip"], 260)
    space = TokenSpace(text.vocab_size)
    space.append_modality("video", tokenizer.codebook_sizes, tokenizer.shape, tokenizer.global_codebook_size)
    processor = Processor(space, text, {"video": tokenizer})
    for row, clip in enumerate(clips):
        codes = shards.codes(row, "video")
        assert codes == tokenizer.encode(clip)
        base = np.array(BACKGROUNDS[(2, 6)[row]]) / 255 * 31
        assert np.abs(codes.header - base).max() <= 0.5
        ids = processor.segment_ids(clip)
        assert [space.token_name(one) for one in ids[4:7]] == [f"video.global:{one}" for one in codes.header]
        [piece] = processor.grammar.parse(ids)
        assert (piece.kind, piece.codes) == ("video", codes)


# ---- the published weights ----


@pytest.fixture(scope="module", params=PUBLISHED)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def published(kind):
    return load_tokenizer(MINI / kind)


@pytest.fixture(scope="module")
def on_backgrounds(kind):
    """Drawings of held-out concepts on all backgrounds: [drawing][background] images or clips."""
    path = PUBLISHED[kind]
    drawn = torch.from_numpy(np.load(path)).movedim(-1, -3).float() / 255
    held = sorted(set(range(len(drawn))) - set(training_rows(path.with_suffix(".jsonl")).tolist()))[:8]
    return [on_all_backgrounds(drawn[row]) for row in held]


def on_all_backgrounds(drawn):
    """A drawing [4, S, S] as images, or frames [T, 4, S, S] as clips, 56 of 64 pixels wide."""
    frames = drawn if drawn.ndim == 4 else drawn[None]
    small = torch.nn.functional.interpolate(frames, (56, 56), mode="bilinear", antialias=True)
    padded = torch.nn.functional.pad(small, (4, 4, 4, 4))
    layers = torch.cat([(2 * padded[:, :3] - 1) * padded[:, 3:], padded[:, 3:]], 1)
    clips = [[on_color(layer, rgb) for layer in layers] for rgb in BACKGROUNDS]
    return [Video(np.stack([one.pixels for one in clip])) if drawn.ndim == 4 else clip[0] for clip in clips]


def values(segment):
    return (segment.frames if isinstance(segment, Video) else segment.pixels).astype(float)


def psnr(one, other):
    return 10 * np.log10(255**2 / np.mean((values(one) - values(other)) ** 2))


def test_local_codes_are_the_same_on_most_backgrounds(published, on_backgrounds):
    shares = []
    for items in on_backgrounds:
        codes = [one.values for one in published.encode_batch(items)]
        shares += [np.mean(a == b) for a, b in combinations(codes, 2)]
    assert np.mean(shares) >= 0.7


def test_the_base_of_another_recolours(published, on_backgrounds):
    found, plain = [], []
    for items in on_backgrounds:
        changed = published.swap_global(items[0], items[5])
        assert published.encode(items[0]).header.tolist() != published.encode(items[5]).header.tolist()
        found.append(psnr(changed, items[5]))
        plain.append(psnr(published.decode(published.encode(items[5])), items[5]))
    assert np.mean(found) > np.mean(plain) - 1.5
