"""The clip tokenizer: the battery, and how many frames of a clip are taken."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from batteries import TokenizerBattery, parameters_without_gradient

from anytoken.segments import Image, Video
from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.tokenizers.image import to_unit_range
from anytoken.tokenizers.layered import LayeredVideoTokenizer
from anytoken.tokenizers.video import VideoTokenizer, fit_clip
from anytoken.training.tokenizer.batches import layer_batches

ROOT = Path(__file__).parents[2]
ANIMATIONS = ROOT / "tests" / "assets" / "tiny" / "emoji" / "animations.npy"


def clip(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Video:
    """Frames of random blocks of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return Video(np.stack([Image(frame).resize(height, width).pixels for frame in small]))


class TestVideoTokenizer(TokenizerBattery):
    tokenizer_class = VideoTokenizer
    settings = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "levels": [5, 5, 4], "side_px": 32}

    def segment(self, seed):
        return clip(8, seed=seed)

    def odd(self):
        return {
            "one frame": clip(1),
            "three frames": clip(3),
            "one pixel": Video(np.zeros((1, 1, 1, 3), np.uint8)),
            "long": clip(50),
            "wide": clip(2, 20, 90),
            "large": clip(4, 700, 901),
            "noise": Video(np.random.default_rng(1).integers(0, 256, (5, 31, 33, 3), dtype=np.uint8)),
        }

    def batch(self):
        return to_unit_range(np.stack([self.segment(seed).frames for seed in range(2)])).transpose(1, 2)

    def check_same_shape(self, segment, back):
        assert back.frames.shape == segment.frames.shape

    def check_close(self, one, other):
        assert one.frames.shape == other.frames.shape
        assert np.abs(one.frames.astype(int) - other.frames).max() <= 1

    @pytest.mark.parametrize(
        ("count", "steps"), [(1, 1), (3, 1), (4, 1), (5, 1), (6, 2), (8, 2), (9, 2), (100, 2)]
    )
    def test_clips_become_four_or_eight_frames(self, tokenizer, count, steps):
        codes = tokenizer.encode(clip(count))
        assert codes.size == (steps, 4, 4)
        assert len(tokenizer.decode(codes).frames) == 4 * steps

    def test_frames_are_spread_evenly_over_the_clip(self, tokenizer):
        long = clip(16)
        assert tokenizer.encode(long) == tokenizer.encode(Video(long.frames[::2]))

    def test_a_still_is_one_picture_repeated(self, tokenizer):
        still = clip(1)
        assert tokenizer.encode(still) == tokenizer.encode(Video(still.frames.repeat(4, 0)))

    def test_the_rate_of_a_clip_is_no_part_of_its_codes(self, tokenizer):
        fast = Video(clip(8).frames, 25.0)
        assert tokenizer.encode(fast) == tokenizer.encode(clip(8))
        assert tokenizer.decode(tokenizer.encode(fast)).frame_rate_hz == 4.0

    def test_tall_clips_keep_their_aspect_ratio(self, tokenizer):
        assert tokenizer.encode(clip(4, 64, 32)).size == (1, 4, 2)


class TestCausalVideoTokenizer(TestVideoTokenizer):
    """Up to four steps, of which none sees a later one."""

    settings = {**TestVideoTokenizer.settings, "causal": True, "max_steps": 4}

    @pytest.mark.parametrize(("count", "steps"), [(1, 1), (5, 1), (6, 2), (12, 3), (16, 4), (100, 4)])
    def test_clips_become_four_or_eight_frames(self, tokenizer, count, steps):
        super().test_clips_become_four_or_eight_frames(tokenizer, count, steps)

    def test_frames_are_spread_evenly_over_the_clip(self, tokenizer):
        long = clip(32)
        assert tokenizer.encode(long) == tokenizer.encode(Video(long.frames[::2]))

    def test_no_step_depends_on_a_later_one(self, tokenizer):
        long = clip(16)
        codes = tokenizer.encode(long)
        for steps in (1, 2, 3):
            begun = tokenizer.encode(Video(long.frames[: 4 * steps]))
            assert np.array_equal(begun.values, codes.values[: len(begun)])
            frames = tokenizer.decode(begun).frames.astype(int)
            assert np.abs(frames - tokenizer.decode(codes).frames[: 4 * steps]).max() <= 1
        other = Video(np.concatenate([clip(4, seed=9).frames, long.frames[4:]]))
        assert not np.array_equal(tokenizer.encode(other).values[16:32], codes.values[16:32]), (
            "the past is seen"
        )

    @pytest.mark.parametrize("pieces", [(4, 4, 4, 4), (1,) * 16, (3, 9, 4), (16,)])
    def test_frames_that_come_in_pieces_get_the_codes_of_the_whole(self, tokenizer, pieces):
        long, ends = clip(16, 40, 28), np.cumsum(pieces)
        parts = [Video(long.frames[end - count : end]) for end, count in zip(ends, pieces, strict=True)]
        steps = list(tokenizer.encode_stream(iter(parts)))
        whole = tokenizer.encode(long)
        assert [one.size for one in steps] == [(1, *whole.size[1:])] * 4
        assert np.array_equal(np.concatenate([one.values for one in steps]), whole.values)

    def test_codes_that_come_in_pieces_give_the_frames_of_the_whole(self, tokenizer):
        whole = tokenizer.encode(clip(16))
        for counts in ((1, 1, 1, 1), (2, 1, 1), (4,)):
            ends = 16 * np.cumsum(counts)
            pieces = (
                replace(whole, values=whole.values[end - 16 * n : end], size=(n, 4, 4))
                for end, n in zip(ends, counts, strict=True)
            )
            back = np.concatenate([one.frames for one in tokenizer.decode_stream(pieces)]).astype(int)
            assert np.abs(back - tokenizer.decode(whole).frames).max() <= 1

    def test_a_stream_comes_step_by_step_and_has_no_longest_length(self, tokenizer):
        read = []

        def camera():
            for n in range(30):
                read.append(n)
                yield clip(1, seed=n)

        stream = tokenizer.encode_stream(camera())
        first = next(stream)
        assert len(read) == 4, "codes come as soon as their frames are there"
        rest = list(stream)
        assert len([first, *rest]) == 8 > tokenizer.shape.max_size[0]
        still = tokenizer.encode_stream([clip(1)])
        assert next(still) == tokenizer.encode(clip(1)), "what is not whole is filled up"

    def test_frames_of_a_stream_have_one_size(self, tokenizer):
        with pytest.raises(TokenizerError, match=r"received \(32, 24\) after \(32, 32\)"):
            list(tokenizer.encode_stream([clip(2), clip(2, 32, 24)]))

    def test_a_picture_is_a_clip_of_one_step(self, tokenizer):
        still = clip(1)
        moving = Video(np.concatenate([still.frames.repeat(4, 0), clip(4, seed=5).frames]))
        assert np.array_equal(tokenizer.encode(moving).values[:16], tokenizer.encode(still).values)


class TestCausalVideoTokenizerThatListensToItsDecoder(TestCausalVideoTokenizer):
    """Of each tubelet's three nearest codes the one stays that decodes best after the steps before."""

    quantizer = {"kind": "vq", "code_dim": 4, "decay": 0.9}
    settings = {
        **TestCausalVideoTokenizer.settings,
        "quantizer": quantizer,
        "codebook_size": 32,
        "num_candidates": 3,
    }

    def test_codes_decode_nearer_to_the_clip_than_the_nearest_ones(self, tokenizer):
        plain = VideoTokenizer(**{**tokenizer.config, "num_candidates": 1}).eval()
        plain.load_state_dict(tokenizer.state_dict())
        target = self.segment(5)
        errors = [
            np.square(one.decode(one.encode(target)).frames.astype(float) - fit_clip(target, 32, 4)).mean()
            for one in (tokenizer, plain)
        ]
        assert errors[0] < errors[1]


class TestLayeredVideoTokenizer(TestCausalVideoTokenizer):
    """The layer over the base colour of the first step."""

    tokenizer_class = LayeredVideoTokenizer
    settings = {**TestVideoTokenizer.settings, "max_steps": 4, "matte_width": 16, "matte_depth": 1}

    def batch(self):
        return layer_batches(ANIMATIONS, 2, 0)(0)

    def test_the_training_loss_reaches_every_parameter(self):
        """An untrained matte finds no empty patch, so the vector of those has a gradient from a trained one only."""
        assert parameters_without_gradient(self.untrained().train(), self.batch()) == ["empty"]
        trained = load_tokenizer(ROOT / "anytoken" / "pretrained" / "mini" / "tokenizers" / "video").train()
        assert not parameters_without_gradient(trained, self.batch())

    def test_every_step_of_a_stream_says_the_base_of_the_first(self, tokenizer):
        one, other = (Video(np.full((4, 32, 32, 3), level, np.uint8)) for level in (0, 255))
        steps = list(tokenizer.encode_stream([one, other]))
        assert [step.header.tolist() for step in steps] == [[0, 0, 0]] * 2
        (whole,) = tokenizer.encode_batch([Video(np.concatenate([one.frames, other.frames]))])
        assert whole.header.tolist() == [0, 0, 0]
        assert tokenizer.encode(other).header.tolist() == [31, 31, 31]


def test_candidates_need_a_causal_tokenizer():
    with pytest.raises(TokenizerError, match="1, or causal=true; received 4 without"):
        VideoTokenizer(quantizer="vq", num_candidates=4)


@pytest.mark.parametrize("side_px", [60, 0, 4])
def test_a_side_of_no_whole_patches_is_an_error(side_px):
    with pytest.raises(TokenizerError, match=f"multiple of 8 pixels, 8 or more; received {side_px}"):
        VideoTokenizer(**{**TestVideoTokenizer.settings, "side_px": side_px})


def test_without_causality_the_first_step_sees_the_second():
    tokenizer = TestVideoTokenizer().build()
    long = clip(8)
    begun = tokenizer.encode(Video(long.frames[:4]))
    assert not np.array_equal(tokenizer.encode(long).values[:16], begun.values)
    for stream in (tokenizer.encode_stream([long]), tokenizer.decode_stream([begun])):
        with pytest.raises(TokenizerError, match=r"config\.causal=true"):
            next(stream)
