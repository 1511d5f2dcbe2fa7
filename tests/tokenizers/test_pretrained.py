"""Pretrained codecs: tiny random checkpoints on disk give the codes that their class gives, through one interface."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from batteries import TokenizerBattery
from transformers import (
    ChameleonVQVAE,
    DacModel,
    Emu3VQVAE,
    EncodecModel,
    JanusVQVAE,
    MimiModel,
    XcodecModel,
)
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.segments import Image, Speech, Video
from anytoken.tokenizers.base import Codes, TokenizerError, load_tokenizer
from anytoken.tokenizers.image import to_unit_range
from anytoken.tokenizers.pretrained import (
    CODECS,
    PretrainedImage,
    PretrainedSpeech,
    PretrainedVideo,
    pretrained_tokenizer,
)

DAC = {
    "encoder_hidden_size": 8, "decoder_hidden_size": 16, "downsampling_ratios": [4, 8], "upsampling_ratios": [8, 4],
    "n_codebooks": 3, "codebook_size": 32, "codebook_dim": 4,
}  # fmt: skip
PICTURES = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8}
HUBERT = {
    "model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "conv_dim": [8, 8], "conv_stride": [8, 4], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
}  # fmt: skip
TINY = {
    "mimi": (MimiModel, {
        "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [8, 4], "codebook_size": 32, "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8, "upsample_groups": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "num_quantizers": 4,
    }),
    "dac": (DacModel, DAC),
    "encodec": (EncodecModel, {
        "num_filters": 4, "hidden_size": 16, "upsampling_ratios": [8, 4], "codebook_size": 32, "codebook_dim": 16,
        "num_lstm_layers": 1, "target_bandwidths": [7.5, 15.0], "sampling_rate": 24_000,
    }),
    "xcodec": (XcodecModel, {
        "acoustic_model_config": {"model_type": "dac", **DAC}, "semantic_model_config": HUBERT, "codebook_size": 32,
        "codebook_dim": 272, "target_bandwidths": [5.0, 7.5], "sample_rate": 16_000, "unit_dilations": [1],
        "strides": [1], "channel_ratios": [1], "block_dilations": [1],
    }),
    "emu3_vqgan": (Emu3VQVAE, {**PICTURES, "latent_channels": 8, "codebook_size": 32, "attn_resolutions": [1],
                               "hidden_size": 32, "num_attention_heads": 1}),
    "janus_vqgan": (JanusVQVAE, {**PICTURES, "latent_channels": 8, "num_embeddings": 32, "num_patches": 6}),
    "chameleon_vqgan": (ChameleonVQVAE, {**PICTURES, "latent_channels": 8, "num_embeddings": 32, "resolution": 12}),
}  # fmt: skip


@cache
def random_codec(name: str) -> torch.nn.Module:
    """A codec with random weights, its codebooks spread so that codes vary."""
    cls, settings = TINY[name]
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("embed", "embed_sum")):
                tensor.normal_(std=0.1)
            elif key.endswith("cluster_usage"):
                tensor.fill_(1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("codecs")
    return {name: random_codec(name).save_pretrained(root / name) or root / name for name in TINY}


def settings_of(name: str, **more):
    return {"model_config": random_codec(name).config.to_dict(), **more}


def sound(length: int, seed: int = 0, rate: int = 24_000) -> Speech:
    rng = np.random.default_rng(seed)
    tone = np.sin(np.arange(length) * rng.uniform(0.05, 0.5))
    return Speech((0.5 * tone + 0.2 * rng.standard_normal(length)).clip(-1, 1), rate)


def picture(height: int, width: int, seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class CodecBattery(TokenizerBattery):
    """The battery, on a codec's random weights; what a codec does not do is left out."""

    codec: str

    def build(self, seed=0):
        tokenizer = self.tokenizer_class(**self.settings)
        tokenizer.model.load_state_dict(random_codec(self.codec).state_dict())
        if seed:
            with torch.no_grad():
                next(tokenizer.parameters()).add_(0.1)
        return tokenizer.eval()

    test_the_training_loss_reaches_every_parameter = None
    test_a_few_steps_lower_the_training_loss = None

    def test_there_is_nothing_to_train(self, tokenizer):
        assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
        with pytest.raises(TokenizerError, match="nothing to train"):
            tokenizer.training_loss(torch.zeros(1))

    def test_a_configuration_of_something_else_is_named(self, saved):
        path = saved / "config.json"
        header = json.loads(path.read_text())
        for wrong in ({"no_such_setting": 1}, {"model_config": {"model_type": "smell"}}):
            path.write_text(json.dumps({**header, "config": {**header["config"], **wrong}}))
            with pytest.raises(TokenizerError, match=r"config\.json"):
                load_tokenizer(saved)


class SpeechBattery(CodecBattery):
    tokenizer_class = PretrainedSpeech

    def segment(self, seed):
        return sound(640, seed, 24_000 if self.codec in ("mimi", "encodec") else 16_000)

    def odd(self):
        rate = self.segment(0).sample_rate_hz
        return {
            "one sample": Speech(np.zeros(1), rate),
            "odd length": sound(333, 3, rate),
            "another rate": sound(700, 4, 8_000),
            "silence": Speech(np.zeros(640), rate),
            "full scale": Speech(np.tile([1.0, -1.0], 200), rate),
        }

    def check_same_shape(self, segment, back):
        assert back.sample_rate_hz == segment.sample_rate_hz and len(back.samples) == len(segment.samples)

    def check_close(self, one, other):
        np.testing.assert_allclose(one.samples, other.samples, atol=1e-4)


class TestMimi(SpeechBattery):
    codec, settings = "mimi", settings_of("mimi", num_codebooks=3, max_seconds=0.1)


class TestDac(SpeechBattery):
    codec, settings = "dac", settings_of("dac", max_seconds=0.1, codebook_pattern="delay")


class TestEncodec(SpeechBattery):
    codec, settings = "encodec", settings_of("encodec", max_seconds=0.1)


class TestXcodec(SpeechBattery):
    codec, settings = "xcodec", settings_of("xcodec", num_codebooks=1, max_seconds=0.1)


class PictureBattery(CodecBattery):
    tokenizer_class = PretrainedImage

    def segment(self, seed):
        return picture(12, 12, seed)

    def odd(self):
        return {
            "one pixel": picture(1, 1),
            "wide": picture(3, 90),
            "black": Image(np.zeros((12, 12, 3), np.uint8)),
            "white": Image(np.full((13, 11, 3), 255, np.uint8)),
        }

    def check_same_shape(self, segment, back):
        assert back.pixels.shape == segment.pixels.shape

    def check_close(self, one, other):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


class TestEmu3(PictureBattery):
    codec, settings = "emu3_vqgan", settings_of("emu3_vqgan", side_px=12)


class TestJanus(PictureBattery):
    codec, settings = "janus_vqgan", settings_of("janus_vqgan")


class TestChameleon(PictureBattery):
    """Encode only: what would decode says that it cannot, after the checks that every codec's codes go through."""

    codec, settings = "chameleon_vqgan", settings_of("chameleon_vqgan")

    test_round_trip_keeps_kind_and_shape = None
    test_any_legal_codes_decode = None

    def test_encoding_and_decoding_are_deterministic(self, tokenizer):
        segment = self.segment(1)
        assert tokenizer.encode(segment) == tokenizer.encode(segment) == self.build().encode(segment)

    def test_a_batch_gives_what_single_segments_give(self, tokenizer):
        segments = [self.segment(1), *self.odd().values(), self.segment(2)]
        assert tokenizer.encode_batch(segments) == [tokenizer.encode(segment) for segment in segments]

    def test_odd_sizes_and_extremes(self, tokenizer):
        for segment in self.odd().values():
            tokenizer.check_codes(tokenizer.encode(segment))

    def test_saved_and_loaded_it_gives_the_same_codes(self, tokenizer, saved):
        loaded = load_tokenizer(saved)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode(self.segment(1)) == tokenizer.encode(self.segment(1))

    def test_saved_in_bfloat16_it_loads_and_stays_as_it_is(self, tokenizer, tmp_path):
        loaded = load_tokenizer(tokenizer.save_pretrained(tmp_path / "small", dtype=torch.bfloat16))
        again = load_tokenizer(loaded.save_pretrained(tmp_path / "again", dtype=torch.bfloat16))
        assert again.fingerprint() == loaded.fingerprint()
        assert again.encode(self.segment(1)) == loaded.encode(self.segment(1))

    def test_whatever_would_decode_says_that_it_cannot(self, tokenizer):
        for decode in (tokenizer.decode, tokenizer.preview, lambda codes: tokenizer.decode_batch([codes])):
            with pytest.raises(
                TokenizerError, match=r"published without its decoder.*emu3_vqgan, janus_vqgan"
            ):
                decode(tokenizer.encode(picture(12, 12)))


class TestEmu3Video(CodecBattery):
    codec, settings = "emu3_vqgan", settings_of("emu3_vqgan", side_px=12, max_steps=2)
    tokenizer_class = PretrainedVideo

    def segment(self, seed):
        return Video(np.stack([picture(12, 12, 10 * seed + n).pixels for n in range(8)]))

    def odd(self):
        return {
            "a still": Video(picture(12, 12).pixels[None]),
            "five frames": Video(np.stack([picture(9, 30, n).pixels for n in range(5)])),
        }

    def check_same_shape(self, segment, back):
        assert back.frames.shape == segment.frames.shape

    def check_close(self, one, other):
        assert np.abs(one.frames.astype(int) - other.frames).max() <= 1


@pytest.mark.parametrize("name", ["mimi", "dac", "encodec", "xcodec"])
def test_sound_gets_the_codes_that_the_class_gives(folders, name):
    tokenizer, model = pretrained_tokenizer(folders[name]), random_codec(name)
    clip = sound(20 * tokenizer.hop, 1, tokenizer.sample_rate_hz)
    x = torch.from_numpy(clip.samples)[None, None]
    wide = {} if name in ("mimi", "dac") else {"bandwidth": model.config.target_bandwidths[-1]}
    with torch.inference_mode():
        codes = model.encode(x, **wide).audio_codes
        codes = (codes[0] if name == "encodec" else codes)[..., :20]  # X-Codec gives one more than fits
        call = (
            {"audio_codes": codes}
            if name != "encodec"
            else {"audio_codes": codes[None], "audio_scales": [None]}
        )
        output = model.decode(**call).audio_values.flatten()
    found = tokenizer.encode(clip)
    assert np.array_equal(found.values, codes[0].T.numpy()) and len(np.unique(found.values)) > 3
    back = tokenizer.decode(found).samples
    assert len(back) == len(clip.samples)
    length = min(len(back), len(output))
    np.testing.assert_allclose(back[:length], output[:length].clamp(-1, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["emu3_vqgan", "janus_vqgan", "chameleon_vqgan"])
def test_a_picture_gets_the_codes_that_the_class_gives(folders, name):
    tokenizer, model = (
        pretrained_tokenizer(folders[name], **({"side_px": 12} if "emu3" in name else {})),
        random_codec(name),
    )
    x = to_unit_range(picture(12, 12, 2).pixels)[None]
    sizes = (torch.tensor([[12, 12]]),) if "emu3" in name else ()
    with torch.inference_mode():
        codes = model.encode(x, *sizes).image_tokens
    codes = codes[0] if isinstance(codes, list) else codes
    found = tokenizer.encode(picture(12, 12, 2))
    assert found.size == (6, 6) and np.array_equal(found.values[:, 0], codes.flatten().numpy())
    assert len(np.unique(found.values)) > 3
    assert torch.equal(tokenizer.codebook_vectors(), model.quantize.embedding.weight)


def test_a_clip_gets_the_codes_that_the_class_gives(folders):
    tokenizer, model = (
        pretrained_tokenizer(folders["emu3_vqgan"], "video", side_px=12),
        random_codec("emu3_vqgan"),
    )
    clip = TestEmu3Video().segment(1)
    x = to_unit_range(clip.frames)[None]
    with torch.inference_mode():
        # The class cuts steps and rows where it means rows and columns, so it is told of a size that cuts nothing.
        (codes,) = model.encode(x, torch.tensor([[99, 99]])).image_tokens
    found = tokenizer.encode(clip)
    assert found.size == (2, 6, 6) and np.array_equal(found.values[:, 0], codes.flatten().numpy())


def test_fewer_codebooks_are_the_first_ones(folders):
    clip = sound(640, 1)
    whole, two = pretrained_tokenizer(folders["mimi"]), pretrained_tokenizer(folders["mimi"], num_codebooks=2)
    assert whole.shape.num_codebooks == 4
    assert np.array_equal(whole.encode(clip).values[:, :2], two.encode(clip).values)
    assert two.decode(two.encode(clip)) != whole.decode(whole.encode(clip))
    with pytest.raises(TokenizerError, match="1 to 4 codebooks; received 5"):
        pretrained_tokenizer(folders["mimi"], num_codebooks=5)


def test_a_codec_inside_a_larger_checkpoint_is_taken_out(tmp_path):
    from safetensors.torch import save_file
    from transformers import ChameleonConfig

    inner = random_codec("chameleon_vqgan")
    ChameleonConfig(vq_config=inner.config.to_dict(), hidden_size=8, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    tensors = {f"model.vqmodel.{key}": value.contiguous() for key, value in inner.state_dict().items()}
    save_file({**tensors, "model.embed_tokens.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    found = pretrained_tokenizer(tmp_path).encode(picture(12, 12, 5))
    tokenizer = PretrainedImage(inner.config.to_dict())
    tokenizer.model.load_state_dict(inner.state_dict())
    assert found == tokenizer.eval().encode(picture(12, 12, 5))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TokenizerError, match="lacks weights of its codec"):
        pretrained_tokenizer(tmp_path)


@pytest.mark.parametrize("name", TINY)
def test_weights_that_are_not_there_are_never_made_up(name, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders[name], tmp_path / name)
    path = tmp_path / name / "model.safetensors"
    weights = load_file(path)
    lost = next(key for key in weights if "conv" in key)
    save_file({key: one for key, one in weights.items() if key != lost}, path, metadata={"format": "pt"})
    with pytest.raises(TokenizerError, match=r"lacks weights of its codec, 1 in all, such as .*conv"):
        pretrained_tokenizer(tmp_path / name)
    save_file({**weights, lost: weights[lost][..., None]}, path, metadata={"format": "pt"})
    with pytest.raises(TokenizerError, match=r"does not (load as a codec of transformers|fit its codec)"):
        pretrained_tokenizer(tmp_path / name)


def test_of_a_larger_model_on_the_hub_only_the_codecs_files_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    from safetensors.torch import save_file
    from transformers import ChameleonConfig

    inner = random_codec("chameleon_vqgan")
    config = ChameleonConfig(vq_config=inner.config.to_dict(), hidden_size=8, num_hidden_layers=1)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda source: config)
    tensors = {f"model.vqmodel.{key}": value.contiguous() for key, value in inner.state_dict().items()}
    save_file(tensors, tmp_path / "model-2.safetensors")
    places = {"model.embed_tokens.weight": "model-1.safetensors"} | dict.fromkeys(
        tensors, "model-2.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    fetched = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda source, allow_patterns: fetched.append((source, allow_patterns)) or str(tmp_path),
    )
    found = pretrained_tokenizer("some/chameleon")
    assert fetched == [("some/chameleon", ["*.json"]), ("some/chameleon", ["model-2.safetensors"])]
    assert torch.equal(found.codebook_vectors(), inner.quantize.embedding.weight)


def test_what_is_no_codec_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(TokenizerError, match="No speech codec 'bert'; there are mimi, dac, encodec, xcodec"):
        pretrained_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="does not load as a codec of transformers"):
        pretrained_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="received 'smell'"):
        pretrained_tokenizer(tmp_path, "smell")


def test_a_codec_is_imported_on_the_command_line(folders, tmp_path):
    words = ["tokenizer", "import", str(folders["dac"]), "--out", str(tmp_path / "dac")]
    done = CliRunner().invoke(app, [*words, "num_codebooks=2", "codebook_pattern=delay"])
    assert done.exit_code == 0, done.output
    loaded = load_tokenizer(tmp_path / "dac")
    assert (loaded.shape.num_codebooks, loaded.shape.order) == (2, "delay")
    for wrong, says in [
        ("num_codebooks", "Settings are key=value; received 'num_codebooks'"),
        (
            "num_codebook=2",
            "PretrainedSpeech has the settings num_codebooks, max_seconds, codebook_pattern; received num_codebook",
        ),
        ("kind=video", "No video codec 'dac'; there are emu3_vqgan"),
    ]:
        done = CliRunner().invoke(app, [*words, wrong])
        assert done.exit_code == 2 and says in " ".join(done.stderr.split()), done.stderr


def test_stereo_and_scales_are_refused():
    stereo = {**random_codec("encodec").config.to_dict(), "audio_channels": 2}
    with pytest.raises(TokenizerError, match="stereo or stores a loudness"):
        PretrainedSpeech(stereo)


def test_more_than_a_segment_takes_is_an_error(folders):
    tokenizer = pretrained_tokenizer(folders["dac"], max_seconds=0.01)
    with pytest.raises(TokenizerError, match=r"Speech of 0\.1 s is longer than 0\.01 s"):
        tokenizer.encode(sound(1600, rate=16_000))
    clip = pretrained_tokenizer(folders["emu3_vqgan"], "video", side_px=12, max_steps=1)
    with pytest.raises(TokenizerError, match="at most 4 frames; received 8"):
        clip.encode(TestEmu3Video().segment(0))


def test_every_codec_of_the_table_is_tried_here():
    assert set(TINY) == set(CODECS)
    assert Codes(np.zeros((1, 1))) == Codes(np.zeros((1, 1)))
