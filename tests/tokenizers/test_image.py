"""The picture tokenizer: the battery, aspect ratios, sizes, and its losses."""

import numpy as np
import pytest
import torch
from batteries import TokenizerBattery
from safetensors.torch import load_file

from anytoken.segments import Image
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.image import ImageTokenizer, fit_side, psnr_db, to_pixels, to_unit_range


def picture(height: int, width: int, seed: int = 0) -> Image:
    """Blocks of random colours, so that it survives scaling."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image(small).resize(height, width)


class TestImageTokenizer(TokenizerBattery):
    tokenizer_class = ImageTokenizer
    settings = {
        "width": 16, "encoder_depth": 1, "decoder_depth": 1, "refine_width": 8, "refine_depth": 1,
        "levels": [5, 5, 4],
    }  # fmt: skip

    def segment(self, seed):
        return picture(64, 64, seed)

    def odd(self):
        noise = np.random.default_rng(1).integers(0, 256, (63, 65, 3), dtype=np.uint8)
        return {
            "one pixel": Image(np.zeros((1, 1, 3), np.uint8)),
            "a row": Image(np.full((1, 300, 3), 255, np.uint8)),
            "a column": Image(np.full((1000, 1, 3), 90, np.uint8)),
            "huge": picture(2000, 3001),
            "noise": Image(noise),
        }

    def batch(self):
        return to_unit_range(np.stack([self.segment(seed).pixels for seed in range(3)]))

    def check_same_shape(self, segment, back):
        assert back.pixels.shape == segment.pixels.shape

    def check_close(self, one, other):
        assert one.pixels.shape == other.pixels.shape
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1

    @pytest.mark.parametrize(
        ("height", "width", "grid"),
        [
            (64, 64, (8, 8)),
            (10, 10, (8, 8)),
            (128, 64, (8, 4)),
            (90, 160, (4, 8)),
            (1, 1000, (1, 8)),
            (500, 3, (8, 1)),
        ],
    )
    def test_the_aspect_ratio_is_kept_to_whole_patches(self, tokenizer, height, width, grid):
        codes = tokenizer.encode(picture(height, width))
        assert codes.size == grid
        assert tokenizer.decode(codes).pixels.shape == (8 * grid[0], 8 * grid[1], 3)

    def test_without_a_side_pictures_keep_their_size(self):
        tokenizer = ImageTokenizer(**self.settings, side_px=0).eval()
        assert tokenizer.encode(picture(40, 72)).size == (5, 9)
        assert tokenizer.encode(picture(256, 512)).size == (8, 16), "at most 128 pixels a side"

    def test_larger_pictures_have_larger_grids(self):
        tokenizer = ImageTokenizer(**self.settings, side_px=160).eval()
        codes = tokenizer.encode(picture(300, 150))
        assert codes.size == (20, 10) and tokenizer.decode(codes).pixels.shape == (160, 80, 3)
        assert tokenizer.shape.max_size == (20, 20)

    @pytest.mark.parametrize(
        "wrong",
        [{"side_px": 60}, {"side_px": -8}, {"side_px": 64.0}, {"kernel": 4}, {"num_candidates": 0}],
    )
    def test_a_setting_that_cannot_be_is_an_error(self, wrong):
        with pytest.raises(TokenizerError, match=f"received {next(iter(wrong.values()))}"):
            ImageTokenizer(**{**self.settings, **wrong})

    def test_a_learned_codebook_in_place_of_fsq(self, tmp_path):
        torch.manual_seed(0)
        settings = {**self.settings, "quantizer": "vq", "codebook_size": 32}
        tokenizer = ImageTokenizer(**settings)
        tokenizer.train().training_loss(self.batch())  # k-means sets the codebook
        tokenizer.eval().drop_ema_buffers().save_pretrained(tmp_path / "vq")
        loaded = ImageTokenizer.from_pretrained(tmp_path / "vq")
        assert loaded.codebook_sizes == (32,)
        assert loaded.encode(self.segment(1)) == tokenizer.encode(self.segment(1))
        assert loaded.fingerprint() == tokenizer.fingerprint()
        sums = "quantize.inner._codebook.embed_avg"
        assert sums not in load_file(tmp_path / "vq" / "model.safetensors"), "only training needs it"
        torch.testing.assert_close(
            loaded.state_dict()[sums], tokenizer.state_dict()[sums], rtol=1e-2, atol=1e-2
        )


class TestImageTokenizerThatListensToItsDecoder(TestImageTokenizer):
    """Of each patch's three nearest codes the one stays that decodes best."""

    quantizer = {"kind": "vq", "code_dim": 4, "decay": 0.9}
    settings = {
        **TestImageTokenizer.settings,
        "quantizer": quantizer,
        "codebook_size": 32,
        "num_candidates": 3,
    }

    def test_codes_decode_nearer_to_the_picture_than_the_nearest_ones(self, tokenizer):
        plain = ImageTokenizer(**{**tokenizer.config, "num_candidates": 1}).eval()
        plain.load_state_dict(tokenizer.state_dict())
        for height, width in ((64, 64), (8, 64), (64, 8), (40, 64)):
            target = picture(height, width, seed=height + width)
            x = to_unit_range(target.pixels[None].copy())
            listening, nearest = (
                psnr_db(to_unit_range(one.decode(one.encode(target)).pixels[None]), x).item()
                for one in (tokenizer, plain)
            )
            assert listening > nearest

    def test_the_nearest_candidate_is_the_code_that_quantising_gives(self, tokenizer):
        latent = torch.randn(2, 30, tokenizer.config["width"], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            found = tokenizer.quantize.nearest(latent, 3)
            assert torch.equal(found[:, :, 0], tokenizer.quantize(latent).codes)
        assert all(len(set(row)) == 3 for row in found.flatten(0, 1)[..., 0].tolist())


@pytest.mark.parametrize(
    ("candidates", "quantizer"),
    [
        (2, "fsq"),
        (2, {"kind": "cosine", "residual": 2}),
        (2, {"kind": "vq", "groups": 2}),
        (9, "vq"),
        (1.5, "vq"),
    ],
)
def test_candidates_that_cannot_be_are_named(candidates, quantizer):
    with pytest.raises(TokenizerError, match=f"num_candidates is 1, or .*received {candidates} with"):
        ImageTokenizer(quantizer=quantizer, codebook_size=8, num_candidates=candidates)


class TestImageTokenizerOfFourCodebooks(TestImageTokenizer):
    """Two groups of channels with two residual codebooks each, delayed: the battery and the grid."""

    settings = {
        **TestImageTokenizer.settings,
        "quantizer": {"kind": "simvq", "residual": 2, "groups": 2, "codebook_pattern": "delay"},
        "codebook_size": 16,
    }

    def test_from_ids_back_to_codes(self, tokenizer):
        from anytoken.processor import Processor
        from anytoken.token_space import TokenSpace
        from anytoken.tokenizers.text import TextTokenizer

        text = TextTokenizer.train(["a"], 256)
        space = TokenSpace(256)
        space.append_modality("image", tokenizer.codebook_sizes, tokenizer.shape)
        processor = Processor(space, text, {"image": tokenizer})
        ids = processor.tokenize(self.segment(1))
        assert len(ids) == 2 + 2 + 64 * 4
        [piece] = processor.grammar.parse(ids)
        assert piece.kind == "image" and piece.codes == tokenizer.encode(self.segment(1))
        assert processor.detokenize(ids) == [tokenizer.decode(piece.codes)]


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_pixels(to_unit_range(pixels)), pixels)
    assert to_unit_range(pixels).shape == (1, 3, 16, 16)


def test_psnr_against_known_values():
    black = torch.full((2, 3, 8, 8), -1.0)
    nearly = black + torch.tensor([0.2, 2.0])[:, None, None, None]
    assert psnr_db(nearly, black).tolist() == pytest.approx([20.0, 0.0], abs=1e-4)


def test_fit_side_never_leaves_a_side_without_a_patch():
    assert fit_side(1, 5000, 64) == (8, 64)
    assert fit_side(7, 7, 64) == (64, 64)
