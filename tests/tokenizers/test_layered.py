"""The layered image tokenizer: the battery, backgrounds that leave local codes as they are, recolouring."""

import copy
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from batteries import TokenizerBattery, parameters_without_gradient

from anytoken.segments import Image
from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.layered import (
    LayeredImageTokenizer,
    Matte,
    base_color,
    composed,
    empty_patches,
    find_base,
    hardened,
)
from anytoken.training.tokenizer.batches import BACKGROUNDS, layer_batches, training_rows

ROOT = Path(__file__).parents[2]
SPRITES = ROOT / "tests" / "assets" / "tiny" / "emoji" / "sprites.npy"
TINY = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "refine_width": 8, "refine_depth": 1, "kernel": 3,
        "levels": [5, 5, 4], "matte_width": 16, "matte_depth": 1}  # fmt: skip


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

    def test_the_training_loss_reaches_every_parameter(self, published):
        """An untrained matte finds no empty patch, so the vector of those has a gradient from a trained one only."""
        assert parameters_without_gradient(self.untrained().train(), self.batch()) == ["empty"]
        trained = copy.deepcopy(published).train()
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
    _, codes, _ = tokenizer._quantized(tokenizer._latents(layer), empty)
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


def test_one_codebook_only():
    with pytest.raises(TokenizerError, match="one codebook"):
        LayeredImageTokenizer(**TINY | {"quantizer": {"kind": "vq", "residual": 2}})


# ---- the published weights ----


@pytest.fixture(scope="module")
def published():
    return load_tokenizer(ROOT / "tokenizers" / "image" / "layered" / "weights")


@pytest.fixture(scope="module")
def on_backgrounds():
    """Drawings of held-out concepts on all backgrounds: [drawing][background] images."""
    sprites = torch.from_numpy(np.load(SPRITES)).movedim(-1, 1).float() / 255
    held = sorted(set(range(len(sprites))) - set(training_rows(SPRITES.with_suffix(".jsonl")).tolist()))[:8]
    small = torch.nn.functional.interpolate(sprites[held], (56, 56), mode="bilinear", antialias=True)
    padded = torch.nn.functional.pad(small, (4, 4, 4, 4))
    layers = torch.cat([(2 * padded[:, :3] - 1) * padded[:, 3:], padded[:, 3:]], 1)
    return [[on_color(layer, rgb) for rgb in BACKGROUNDS] for layer in layers]


def psnr(one, other):
    return 10 * np.log10(255**2 / np.mean((one.pixels.astype(float) - other.pixels) ** 2))


def test_local_codes_are_the_same_on_most_backgrounds(published, on_backgrounds):
    shares = []
    for images in on_backgrounds:
        codes = [one.values for one in published.encode_batch(images)]
        shares += [np.mean(a == b) for a, b in combinations(codes, 2)]
    assert np.mean(shares) >= 0.7


def test_an_image_is_recoloured_by_the_base_of_another(published, on_backgrounds):
    found, plain = [], []
    for images in on_backgrounds:
        changed = published.swap_global(images[0], images[5])
        assert published.encode(images[0]).header.tolist() != published.encode(images[5]).header.tolist()
        found.append(psnr(changed, images[5]))
        plain.append(psnr(published.decode(published.encode(images[5])), images[5]))
    assert np.mean(found) > np.mean(plain) - 1.5
