"""The speech tokenizer: the battery, other rates and channels, length limits, and its transforms."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from batteries import TokenizerBattery
from rapidfuzz.distance.Levenshtein import normalized_distance

from anytoken.segments import Segment, Speech
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.losses.audio import envelope_loss, log_mel, perceptual_distance
from anytoken.tokenizers.speech import HOP, ISTFTHead, LogMel, SpeechTokenizer

ROOT = Path(__file__).parents[2]


def tone(seconds: float, pitch_hz: float = 220.0, rate: int = 16_000) -> Speech:
    """A harmonic tone that swells, so that frames differ."""
    time = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch_hz * k * time) / k for k in range(1, 8))
    return Speech((0.2 * wave * np.sin(np.pi * time / seconds) ** 2).astype(np.float32), rate)


class TestSpeechTokenizer(TokenizerBattery):
    tokenizer_class = SpeechTokenizer
    settings = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "levels": [5, 5, 4], "max_frames": 50}

    def segment(self, seed):
        return tone(0.4, 150 + 40 * seed)

    def odd(self):
        noise = np.random.default_rng(1).uniform(-1, 1, 5_001).astype(np.float32)
        return {
            "one sample": Speech(np.ones(1)),
            "one code": tone(0.02),
            "one sample more": Speech(np.zeros(HOP + 1)),
            "silence": Speech(np.zeros(8_000)),
            "noise": Speech(noise),
            "too loud": Speech(50 * noise),
            "as long as may be": tone(1.0),
            "8 kHz": tone(0.3, rate=8_000),
            "44.1 kHz": tone(0.3, rate=44_100),
        }

    def batch(self):
        return torch.from_numpy(np.stack([self.segment(seed).samples for seed in range(2)]))

    def check_same_shape(self, segment, back):
        assert back.sample_rate_hz == 16_000 and len(back.samples) == len(segment.samples)

    def check_close(self, one, other):
        np.testing.assert_allclose(one.samples, other.samples, atol=2e-4)

    def test_every_20_ms_are_a_code(self, tokenizer):
        assert tokenizer.frame_rate_hz == 50
        for samples in (1, 319, 320, 321, 6_400):
            assert len(tokenizer.encode(Speech(np.zeros(samples)))) == math.ceil(samples / 320)

    def test_stereo_at_48_khz_is_averaged_and_resampled(self, tokenizer, tmp_path):
        sound = tone(0.5, rate=48_000).samples
        soundfile.write(tmp_path / "stereo.wav", np.stack([sound, 0.5 * sound], 1), 48_000, subtype="FLOAT")
        opened = Speech.open(tmp_path / "stereo.wav")
        codes = tokenizer.encode(opened)
        assert len(codes) == 25
        assert codes == tokenizer.encode(Speech(0.75 * sound, 48_000).resample(16_000))
        assert tokenizer.decode(codes).sample_rate_hz == 16_000

    def test_too_long_is_a_clear_error(self, tokenizer):
        assert len(tokenizer.encode(tone(1.0))) == 50
        with pytest.raises(TokenizerError, match=r"1\.1 s is 55 codes; at most 50 \(1 s\).*cut it"):
            tokenizer.encode(tone(1.1))
        with pytest.raises(TokenizerError, match="cut it"):
            tokenizer.encode(tone(1.1, rate=48_000))

    def test_decoded_samples_stay_within_one(self, tokenizer):
        loud = tokenizer.decode(tokenizer.encode(self.odd()["too loud"]))
        assert np.abs(loud.samples).max() <= 1


class TestSpeechTokenizerOfThreeCodebooks(TestSpeechTokenizer):
    """Residual codebooks of unit vectors, in the delayed order."""

    settings = {
        **TestSpeechTokenizer.settings,
        "quantizer": {"kind": "cosine", "residual": 3, "codebook_pattern": "delay"},
        "codebook_size": 16,
    }


class TestSpeechTokenizerOf25CodesASecond(TestSpeechTokenizer):
    """Two frames a code, and of the residual codebooks that dropout trained both."""

    quantizer = {
        "kind": "vq",
        "residual": 2,
        "dropout": True,
        "code_dim": 4,
        "decay": 0.9,
        "threshold_ema_dead_code": 0.1,
    }
    settings = {
        **TestSpeechTokenizer.settings,
        # Twice as many codes would, for two tones to learn from, lie no further apart than rounding reaches.
        "quantizer": quantizer, "codebook_size": 8, "frames_per_code": 2, "max_frames": 25,
    }  # fmt: skip

    def check_same_shape(self, segment, back):
        assert len(back.samples) == math.ceil(len(segment.samples) / 640) * 640

    def test_every_20_ms_are_a_code(self, tokenizer):
        assert tokenizer.frame_rate_hz == 25
        for samples in (1, 639, 640, 641, 6_400):
            assert len(tokenizer.encode(Speech(np.zeros(samples)))) == math.ceil(samples / 640)

    def test_stereo_at_48_khz_is_averaged_and_resampled(self, tokenizer):
        codes = tokenizer.encode(tone(0.5, rate=48_000))
        assert len(codes) == 13 and tokenizer.decode(codes).sample_rate_hz == 16_000

    def test_too_long_is_a_clear_error(self, tokenizer):
        assert len(tokenizer.encode(tone(1.0))) == 25
        with pytest.raises(TokenizerError, match=r"1\.1 s is 28 codes; at most 25 \(1 s\).*cut it"):
            tokenizer.encode(tone(1.1))

    def test_the_first_codebook_alone_is_a_tokenizer_of_half_the_rate(self, tokenizer, tmp_path):
        coarse = tokenizer.first_codebooks(1)
        both, first = (one.encode(tone(0.4)) for one in (tokenizer, coarse))
        assert np.array_equal(first.values[:, 0], both.values[:, 0]) and first.values.shape[1] == 1
        saved = SpeechTokenizer.from_pretrained(coarse.save_pretrained(tmp_path / "coarse"))
        assert saved.encode(tone(0.4)) == first and saved.decode(first) == coarse.decode(first)
        assert coarse.decode(first) != tokenizer.decode(both)
        with pytest.raises(TokenizerError, match="1 to residual"):
            tokenizer.first_codebooks(3)


class TestSpeechTokenizerWithAVoice(TestSpeechTokenizerOf25CodesASecond):
    """Three global codes say the voice."""

    settings = {**TestSpeechTokenizerOf25CodesASecond.settings, "num_global_codes": 3, "codebook_size": 8}

    def batch(self):
        return torch.from_numpy(np.stack([tone(0.8, 150 + 40 * seed).samples for seed in range(2)]))

    def test_the_first_codebook_alone_is_a_tokenizer_of_half_the_rate(self, tokenizer):
        coarse = tokenizer.first_codebooks(1)
        both, first = (one.encode(tone(0.4)) for one in (tokenizer, coarse))
        assert np.array_equal(first.header, both.header)
        assert np.array_equal(first.values[:, 0], both.values[:, 0])

    def test_loudness_and_a_filter_are_the_voice_s(self, tokenizer):
        """A louder clip has the same spectrum but for its mean: its frames have the same codes, its voice has not."""
        noise = (
            np.random.default_rng(0).normal(0, 0.01, 12_800).astype(np.float32)
        )  # no frame is at the floor
        clip = Speech(tone(0.8).samples + noise)
        loud, soft = (tokenizer.encode(Speech(gain * clip.samples)) for gain in (1.0, 0.5))
        assert np.array_equal(loud.values, soft.values)
        with torch.inference_mode():
            seen = [tokenizer._scaled_mel(torch.from_numpy(g * clip.samples)[None]) for g in (1.0, 0.5)]
            assert not torch.allclose(*(tokenizer.voice.listen(mel).mean(2) for mel in seen), atol=1e-3)

    def test_spans_joined_are_the_whole_clip(self, tokenizer):
        codes = tokenizer.encode(tone(1.0))
        whole = tokenizer.decode(codes).samples
        for step in (3, 10):
            spans = [
                tokenizer.decode_span(codes, n, min(n + step, len(codes))) for n in range(0, len(codes), step)
            ]
            np.testing.assert_allclose(np.concatenate([span.samples for span in spans]), whole, atol=1e-5)

    def test_the_former_name_of_the_setting_loads(self, tokenizer):
        settings = {**self.settings, "voice_codes": self.settings["num_global_codes"]}
        del settings["num_global_codes"]
        former = SpeechTokenizer(**settings).eval()
        former.load_state_dict(tokenizer.state_dict())
        assert former.config == tokenizer.config and former.fingerprint() == tokenizer.fingerprint()


class TestSpeechTokenizerOfTwoSpectraAFrame(TestSpeechTokenizerWithAVoice):
    """Each frame is seen and made by two spectra of half the window."""

    settings = {**TestSpeechTokenizerWithAVoice.settings, "spectra_per_frame": 2}

    def test_frames_are_seen_in_halves(self, tokenizer):
        """A click in either half of a frame is told by the bands of that half."""
        sounds = torch.zeros(2, 6_400)
        sounds[0, 3_280], sounds[1, 3_440] = 1, 1  # frame 10 begins at 3,200
        bands = tokenizer._scaled_mel(sounds)[:, :, 10].unflatten(1, (80, 2)).mean(1)
        assert bands[0, 0] > bands[0, 1] + 0.1 and bands[1, 1] > bands[1, 0] + 0.1


class TestSpeechTokenizerThatListens(TestSpeechTokenizerWithAVoice):
    """Of three codes, or pairs of codes, each position has the one whose sound is heard nearest."""

    settings = {**TestSpeechTokenizerWithAVoice.settings, "num_candidates": 3}

    def plain(self, tokenizer):
        nearest = SpeechTokenizer(**{**tokenizer.config, "num_candidates": 1}).eval()
        nearest.load_state_dict(tokenizer.state_dict())
        return nearest

    @pytest.mark.parametrize("books", [1, 2])
    def test_clips_are_heard_nearer_than_with_the_nearest_codes(self, tokenizer, books):
        listening, nearest = (one.first_codebooks(books).eval() for one in (tokenizer, self.plain(tokenizer)))
        for seconds, pitch in ((0.04, 200), (0.4, 150), (0.76, 300)):
            clip = tone(seconds, pitch)
            bands = [
                log_mel(torch.from_numpy(sound.samples[: len(clip.samples)].copy())[None])
                for sound in (
                    clip,
                    listening.decode(listening.encode(clip)),
                    nearest.decode(nearest.encode(clip)),
                )
            ]
            ours, theirs = (perceptual_distance(one, bands[0]).mean().item() for one in bands[1:])
            assert ours <= theirs and (ours < theirs or seconds < 0.1)

    def test_the_voice_is_told_as_without(self, tokenizer):
        clip = tone(0.4)
        ours, theirs = (one.encode(clip) for one in (tokenizer, self.plain(tokenizer)))
        assert np.array_equal(ours.header, theirs.header) and not np.array_equal(ours.values, theirs.values)

    def test_the_first_codebook_alone_is_a_tokenizer_of_half_the_rate(self, tokenizer):
        coarse = tokenizer.first_codebooks(1).encode(tone(0.4))
        assert coarse.values.shape == (10, 1) and coarse.header.shape == (3,)


@pytest.mark.parametrize("codes", [-1, 1.5, "two"])
def test_a_number_of_voice_codes_that_cannot_be_is_named(codes):
    with pytest.raises(TokenizerError, match="num_global_codes is a whole number, 0 for none; received"):
        SpeechTokenizer(num_global_codes=codes)


@pytest.mark.parametrize("frames", [0, -1, 1.5])
def test_a_code_has_whole_frames(frames):
    with pytest.raises(TokenizerError, match=f"frames_per_code is a whole number from 1; received {frames}"):
        SpeechTokenizer(**TestSpeechTokenizer.settings, frames_per_code=frames)


@pytest.mark.parametrize("count", [0, 3, "2"])
def test_a_frame_has_one_spectrum_or_two(count):
    with pytest.raises(TokenizerError, match=f"spectra_per_frame is one of 1, 2; received {count!r}"):
        SpeechTokenizer(**TestSpeechTokenizer.settings, spectra_per_frame=count)


@pytest.mark.parametrize("spectra", [1, 2])
def test_a_head_s_frames_add_up_to_what_their_spectra_say(spectra):
    """Of noise the spectra of every frame, in the place of a projection, give the noise back."""
    head = ISTFTHead(4, spectra)
    frames = 12 * spectra
    noise = torch.randn(2, frames * head.hop, generator=torch.Generator().manual_seed(0))
    edge = (head.size - head.hop) // 2
    seen = torch.nn.functional.pad(noise, (edge, edge)).unfold(1, head.size, head.hop) * head.window
    spectrum = torch.fft.rfft(seen)
    told = torch.cat([spectrum.abs().clamp_min(1e-9).log(), spectrum.angle()], -1)
    head.project = torch.nn.Identity()
    back = head(told.unflatten(1, (12, spectra)).flatten(2).transpose(1, 2))
    torch.testing.assert_close(back, noise, atol=1e-3, rtol=0)


def test_log_mel_tells_pitch_and_level():
    mel = LogMel()
    frames = mel(torch.from_numpy(np.stack([tone(0.4, 200).samples, tone(0.4, 2_000).samples])))
    assert frames.shape == (2, 80, 20)
    low, high = frames[:, :, 10].argmax(1).tolist()
    assert low < high
    louder = mel(torch.from_numpy(2 * tone(0.4, 200).samples[None]))
    assert (louder[0, low, 10] - frames[0, low, 10]).item() == pytest.approx(math.log(2), abs=1e-3)
    assert mel(torch.zeros(1, 3_200)).unique().item() == pytest.approx(math.log(1e-5))


class TestThePublishedWeights:
    """tokenizers/speech/content, on clips of two voices that it never heard."""

    tokenizer = SpeechTokenizer.from_pretrained(
        ROOT / "anytoken" / "pretrained" / "mini" / "tokenizers" / "speech"
    )
    names = ("1F69C-100", "1F994-100", "1F9AC-100", "2708-100")

    def clip(self, voice: str, name: str) -> Speech:
        return Speech.open(ROOT / "tests" / "assets" / "audio" / voice / f"{name}.flac").resample(16_000)

    def likeness(self, clip: Speech, back: Speech) -> float:
        length = min(len(clip.samples), len(back.samples))
        a, b = (torch.from_numpy(one.samples[:length].copy())[None] for one in (clip, back))
        return 1 - envelope_loss(b, a).item()

    @pytest.mark.parametrize("voice", ["awb", "rms"])
    def test_syllables_rise_and_fall_as_they_did(self, voice):
        clips = [self.clip(voice, name) for name in self.names]
        decoded = [self.tokenizer.decode(self.tokenizer.encode(clip)) for clip in clips]
        own = np.mean([self.likeness(*pair) for pair in zip(clips, decoded, strict=True)])
        others = np.mean([self.likeness(clips[n], decoded[n - 1]) for n in range(4)])
        assert own > 0.75 and others < 0.6

    def test_two_voices_have_more_codes_in_common_for_one_word_than_for_two(self):
        """What language models need: the codes of a word are nearly those that another voice has for it."""
        awb, rms = (
            [self.tokenizer.encode(self.clip(voice, name)).values[:, 0].tolist() for name in self.names]
            for voice in ("awb", "rms")
        )
        apart = [[normalized_distance(ours, theirs) for theirs in rms] for ours in awb]
        same = np.mean([apart[n][n] for n in range(4)])
        other = np.mean([apart[n][m] for n in range(4) for m in range(4) if n != m])
        assert same < 0.8 < other - 0.1

    def test_the_header_says_who_speaks(self):
        """Words of one voice with the global codes of the other: the shape of their spectrum moves to the other's.

        On average over eight names, of the louder half of the frames: pauses and levels belong to the local codes.
        """

        def timbre(clip: Segment) -> np.ndarray:
            bands = LogMel()(torch.from_numpy(clip.samples.copy())[None])[0].numpy()
            level = bands.mean(0)
            shape = bands[:, level > np.median(level)].mean(1)
            return shape - shape.mean()

        to_other, to_spoken = [], []
        for path in sorted((ROOT / "tests" / "assets" / "audio" / "awb").glob("*-100.flac")):
            awb, rms = (self.clip(voice, path.stem) for voice in ("awb", "rms"))
            swapped = timbre(self.tokenizer.swap_global(awb, rms))
            spoken, other = (
                timbre(self.tokenizer.decode(self.tokenizer.encode(clip))) for clip in (awb, rms)
            )
            to_other.append(np.abs(swapped - other).mean())
            to_spoken.append(np.abs(swapped - spoken).mean())
        assert len(to_other) == 8 and np.mean(to_other) < 0.7 * np.mean(to_spoken)
