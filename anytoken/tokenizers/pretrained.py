"""Pretrained codecs of transformers as tokenizers: `pretrained_tokenizer("kyutai/mimi")`, from a hub id or a folder.

    speech   Mimi (arXiv 2410.00037), DAC (2306.06546), EnCodec (2210.13438), X-Codec (2408.17175)
    image    Emu3 (2409.18869), Janus (2410.13848), Chameleon (2405.09818; reads only: it was published without decoder)
    video    Emu3

The codecs differ in names, in the order of axes, and in the length of their outputs. One table adapts each of them;
the rest is common to all: audio is padded to whole frames, codes and samples are cut to them, images are scaled to
whole cells and passed as [-1, 1], and sizes go into the header. A saved tokenizer contains the codec's configuration
and weights, so it is loaded without transformers' checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from anytoken import moved
from anytoken.segments import Image, Segment, Speech, Video
from anytoken.tokenizers.base import (
    CodeGrid,
    Codes,
    CodeSequence,
    CodeShape,
    ModalityTokenizer,
    TokenizerError,
    register_modality,
)
from anytoken.tokenizers.image import to_pixels, to_unit_range

WHOLE = 1 << 30  # an image size that Emu3's encoder, which cuts the wrong axes of a video, never cuts at
UNUSED = ("num_batches_tracked", "masked_spec_embed")  # of a codec's state, what only its training reads
Item = TypeVar("Item")


@dataclass(frozen=True)
class Codec:
    """How to call one class of transformers; m is the model, c its configuration.

    encode(m, x, q): audio [B, 1, T] to codes [B, Q, N] of the first q codebooks (or more), images [B, 3, H, W] and
    clips [B, T, 3, H, W] to codes [B, *grid] or flat. decode(m, codes) is the inverse, or None. vectors(m, n): the
    vectors [K, D] of codebook n. side(c): the required side of an image in cells; None for any.
    """

    model: str
    kinds: tuple[str, ...]
    encode: Callable[[Any, Tensor, int], Any]
    decode: Callable[[Any, Tensor], Tensor] | None
    vectors: Callable[[Any, int], Tensor]
    hop: Callable[[Any], int] = lambda c: c.hop_length
    side: Callable[[Any], int | None] = lambda c: None


def _bandwidth(m: Any, books: int) -> float:
    """The smallest bandwidth that a codec was trained for and that has this number of codebooks."""
    enough = [
        one
        for one in m.config.target_bandwidths
        if m.quantizer.get_num_quantizers_for_bandwidth(one) >= books
    ]
    return enough[0]


def _mimi_vectors(m: Any, n: int) -> Tensor:
    semantic = m.config.num_semantic_quantizers
    quantizer = m.quantizer
    part = (
        quantizer.semantic_residual_vector_quantizer
        if n < semantic
        else quantizer.acoustic_residual_vector_quantizer
    )
    return part.layers[n if n < semantic else n - semantic].codebook.embed


def _patches(c: Any) -> int:
    return 2 ** (len(c.channel_multiplier) - 1)


CODECS = {  # transformers' model_type: codec
    "mimi": Codec(
        "MimiModel", ("speech",), lambda m, x, q: m.encode(x, num_quantizers=q).audio_codes,
        lambda m, codes: m.decode(codes).audio_values, _mimi_vectors, hop=lambda c: c.frame_size,
    ),
    "dac": Codec(
        "DacModel", ("speech",), lambda m, x, q: m.encode(x, n_quantizers=q).audio_codes,
        lambda m, codes: m.decode(audio_codes=codes).audio_values,
        lambda m, n: m.quantizer.quantizers[n].codebook.weight,
    ),
    "encodec": Codec(
        "EncodecModel", ("speech",), lambda m, x, q: m.encode(x, bandwidth=_bandwidth(m, q)).audio_codes[0],
        lambda m, codes: m.decode(codes[None], [None]).audio_values, lambda m, n: m.quantizer.layers[n].codebook.embed,
    ),
    "xcodec": Codec(
        "XcodecModel", ("speech",), lambda m, x, q: m.encode(x, bandwidth=_bandwidth(m, q)).audio_codes,
        lambda m, codes: m.decode(codes).audio_values, lambda m, n: m.quantizer.quantizers[n].codebook.embed,
    ),
    "emu3_vqgan": Codec(
        "Emu3VQVAE", ("image", "video"),
        lambda m, x, q: torch.stack(m.encode(x, torch.full((len(x), 2), WHOLE)).image_tokens),
        lambda m, codes: m.decode(codes), lambda m, n: m.quantize.embedding.weight, hop=_patches,
    ),
    "janus_vqgan": Codec(
        "JanusVQVAE", ("image",), lambda m, x, q: m.encode(x).image_tokens, lambda m, codes: m.decode(codes.flatten(1)),
        lambda m, n: m.quantize.embedding.weight, hop=_patches, side=lambda c: c.num_patches,
    ),
    "chameleon_vqgan": Codec(
        "ChameleonVQVAE", ("image",), lambda m, x, q: m.encode(x).image_tokens, None,
        lambda m, n: m.quantize.embedding.weight, hop=_patches, side=lambda c: c.resolution // _patches(c),
    ),
}  # fmt: skip


class PretrainedTokenizer(ModalityTokenizer):
    """The common part of the three kinds: the codec's model, built from its configuration, and its codebooks."""

    def __init__(
        self, model_config: dict[str, Any], shape: CodeShape, books: int, settings: dict[str, Any]
    ) -> None:
        model, size = _build(model_config, self.segment_type.kind)
        config = {"model_config": model_config, **settings}
        super().__init__(shape=shape, codebook_sizes=[size] * books, config=config)
        self.model = model
        self.codec = CODECS[model_config["model_type"]]
        self.requires_grad_(False)

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """The codec's own vectors [K, D]."""
        return self.codec.vectors(self.model, codebook).detach()

    def _model_codes(self, x: Tensor) -> Tensor:
        return self.codec.encode(self.model, x.to(self.device), self.shape.num_codebooks)

    def _model_output(self, codes: Tensor) -> Tensor:
        if self.codec.decode is None:
            whole = ", ".join(name for name, one in CODECS.items() if "image" in one.kinds and one.decode)
            raise TokenizerError(
                f"{self.codec.model} was published without its decoder: it reads images and cannot generate them; to "
                f"make them take {whole}."
            )
        return self.codec.decode(self.model, codes.to(self.device))

    @torch.inference_mode()
    def _decode_grids(self, codes: Sequence[Codes]) -> list[np.ndarray]:
        """Grids of codes to pixels; grids of the same size share a forward pass."""
        for one in codes:
            self.check_codes(one)

        def decode(some: list[Codes]) -> Iterable[np.ndarray]:
            values = torch.from_numpy(np.stack([one.values[:, 0] for one in some]))
            return to_pixels(self._model_output(values.unflatten(1, some[0].size)).float())

        return _alike(codes, lambda one: one.size, decode)


@register_modality
class PretrainedSpeech(PretrainedTokenizer):
    """Speech through Mimi, DAC, EnCodec or X-Codec: the first `num_codebooks` of its residual codebooks.

    codebook_pattern: "flatten" or "delay", the order of their codes in a sequence. Audio is resampled to the
    codec's rate and padded to whole frames; decoded audio has whole frames as well.
    """

    kind = "pretrained_speech"
    segment_type = Speech

    def __init__(
        self,
        model_config: dict[str, Any],
        num_codebooks: int | None = None,
        max_seconds: float = 20.0,
        codebook_pattern: str = "flatten",
    ) -> None:
        config = _config(model_config, "speech")
        most = config.n_codebooks if model_config["model_type"] == "dac" else config.num_quantizers
        books = most if num_codebooks is None else num_codebooks
        if not 1 <= books <= most:
            raise TokenizerError(f"{model_config['model_type']} has 1 to {most} codebooks; received {books}.")
        if getattr(config, "audio_channels", 1) != 1 or getattr(config, "normalize", False):
            raise TokenizerError(
                "This codec is stereo or stores a loudness besides its codes, which a code sequence cannot hold; "
                "use a mono codec such as the 24 kHz EnCodec."
            )
        self.hop = int(CODECS[model_config["model_type"]].hop(config))
        self.sample_rate_hz = int(getattr(config, "sampling_rate", 0) or config.sample_rate)
        shape = CodeSequence(
            1, math.ceil(max_seconds * self.sample_rate_hz / self.hop), books, codebook_pattern
        )
        settings = {"num_codebooks": books, "max_seconds": max_seconds, "codebook_pattern": codebook_pattern}
        super().__init__(model_config, shape, books, settings)
        self.frame_rate_hz = self.sample_rate_hz / self.hop

    def _samples(self, segment: Segment) -> np.ndarray:
        self.check_segment(segment)
        assert isinstance(segment, Speech) and isinstance(self.shape, CodeSequence)
        samples = segment.resample(self.sample_rate_hz).samples
        if len(samples) > self.shape.max_length * self.hop:
            raise TokenizerError(
                f"Speech of {segment.seconds:.1f} s is longer than {self.config['max_seconds']:g} s: cut it."
            )
        return np.pad(samples, (0, -len(samples) % self.hop))

    @torch.inference_mode()
    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """Clips to codes [N, Q]; clips of the same length share a forward pass."""

        def encode(clips: list[np.ndarray]) -> Iterable[Codes]:
            frames = len(clips[0]) // self.hop
            x = torch.from_numpy(np.stack(clips))[:, None]
            # Under that some encoders fail.
            x = torch.nn.functional.pad(x, (0, max(0, 4 - frames) * self.hop))
            codes = self._model_codes(x)[:, : self.shape.num_codebooks, :frames]
            return map(Codes, codes.transpose(1, 2).cpu().numpy())

        return _alike([self._samples(one) for one in segments], len, encode)

    @torch.inference_mode()
    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to clips of whole frames: the codec's output, cut or padded to them."""
        for one in codes:
            self.check_codes(one)

        def decode(some: list[Codes]) -> Iterable[Segment]:
            values = torch.from_numpy(np.stack([one.values for one in some])).transpose(1, 2)
            samples = self._model_output(values).flatten(1).clamp(-1, 1).float()
            length = len(some[0]) * self.hop
            samples = torch.nn.functional.pad(samples[:, :length], (0, max(0, length - samples.shape[1])))
            return [Speech(one, self.sample_rate_hz) for one in samples.cpu().numpy()]

        return _alike(codes, len, decode)


@register_modality
class PretrainedImage(PretrainedTokenizer):
    """Images through Emu3 (any size: the longer side becomes `side_px`), Janus or Chameleon (fixed squares)."""

    kind = "pretrained_image"
    segment_type = Image

    def __init__(self, model_config: dict[str, Any], side_px: int = 256) -> None:
        config, codec = _config(model_config, "image"), CODECS[model_config["model_type"]]
        self.patch, self.side = codec.hop(config), codec.side(config)
        self.side_px = self.side * self.patch if self.side else side_px
        if self.side_px < self.patch:
            raise TokenizerError(
                f"side_px is {side_px}; a code of this codec is {self.patch} px wide already."
            )
        most = self.side or self.side_px // self.patch
        shape = CodeGrid(("rows", "cols"), (self.side or 1,) * 2, (most, most))
        super().__init__(model_config, shape, 1, {"side_px": self.side_px})

    def _pixels(self, segment: Segment) -> np.ndarray:
        self.check_segment(segment)
        assert isinstance(segment, Image)
        square = (self.side_px, self.side_px)
        sides = square if self.side else _whole_cells(segment.height, segment.width, self.side_px, self.patch)
        return segment.resize(*sides).pixels

    @torch.inference_mode()
    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """Images to grids of codes; images of the same size share a forward pass."""

        def encode(images: list[np.ndarray]) -> Iterable[Codes]:
            rows, cols = (side // self.patch for side in images[0].shape[:2])
            codes = self._model_codes(to_unit_range(np.stack(images))).reshape(len(images), -1, 1)
            return [Codes(one, (rows, cols)) for one in codes.cpu().numpy()]

        return _alike([self._pixels(one) for one in segments], lambda one: one.shape, encode)

    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to images; TokenizerError for a codec without a decoder."""
        return [Image(pixels) for pixels in self._decode_grids(codes)]


@register_modality
class PretrainedVideo(PretrainedTokenizer):
    """Clips through Emu3: a block of frames and pixels per code; the last frame is repeated to fill the last step."""

    kind = "pretrained_video"
    segment_type = Video

    def __init__(
        self,
        model_config: dict[str, Any],
        side_px: int = 256,
        max_steps: int = 4,
        video_frame_rate_hz: float = 4.0,
    ) -> None:
        config = _config(model_config, "video")
        self.patch, self.step = _patches(config), int(config.temporal_downsample_factor)
        self.side_px = side_px
        most = side_px // self.patch
        shape = CodeGrid(("steps", "rows", "cols"), (1, 1, 1), (max_steps, most, most))
        settings = {"side_px": side_px, "max_steps": max_steps, "video_frame_rate_hz": video_frame_rate_hz}
        super().__init__(model_config, shape, 1, settings)

    def _frames(self, segment: Segment) -> np.ndarray:
        self.check_segment(segment)
        assert isinstance(segment, Video)
        most = self.config["max_steps"] * self.step
        if len(segment.frames) > most:
            raise TokenizerError(
                f"A clip has at most {most} frames; received {len(segment.frames)}: cut or thin it."
            )
        _, height, width, _ = segment.frames.shape
        sides = _whole_cells(height, width, self.side_px, self.patch)
        frames = np.stack([Image(frame).resize(*sides).pixels for frame in segment.frames])
        return np.pad(frames, ((0, -len(frames) % self.step), (0, 0), (0, 0), (0, 0)), mode="edge")

    @torch.inference_mode()
    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """Clips to grids of codes; clips of the same size share a forward pass."""

        def encode(clips: list[np.ndarray]) -> Iterable[Codes]:
            codes = self._model_codes(to_unit_range(np.stack(clips)))
            return [Codes(one.reshape(-1, 1), one.shape) for one in codes.cpu().numpy()]

        return _alike([self._frames(one) for one in segments], lambda one: one.shape, encode)

    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to clips of whole steps."""
        return [Video(pixels, self.config["video_frame_rate_hz"]) for pixels in self._decode_grids(codes)]


def _whole_cells(height: int, width: int, side_px: int, patch: int) -> tuple[int, int]:
    """Height and width in whole cells of `patch` pixels: the longer one `side_px`, the aspect ratio nearly kept."""
    cells = [side_px * one / max(height, width) / patch for one in (height, width)]
    rows, cols = (max(1, min(side_px // patch, round(one))) * patch for one in cells)
    return rows, cols


def _alike(
    items: Sequence[Item], key: Callable[[Item], Any], work: Callable[[list[Item]], Iterable[Any]]
) -> list[Any]:
    """The results of `work` on items, in order; items with equal keys are processed together."""
    rows: dict[Any, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(key(item), []).append(row)
    found: dict[int, Any] = {}
    for some in rows.values():
        found.update(zip(some, work([items[row] for row in some]), strict=True))
    return [found[row] for row in range(len(items))]


# ---- from transformers' checkpoints ----

KINDS = {"speech": PretrainedSpeech, "image": PretrainedImage, "video": PretrainedVideo}


def pretrained_tokenizer(source: str | Path, kind: str | None = None, **settings: Any) -> ModalityTokenizer:
    """A codec of transformers as a tokenizer, from a checkpoint's folder or hub id.

    source: a codec's own checkpoint, or that of a model that contains one (Emu3, Janus, Chameleon), of which only the
    codec's weights are read. kind: "video" for Emu3's clips; by default the codec's first kind. settings: those of
    `PretrainedSpeech`, `PretrainedImage` or `PretrainedVideo`. TokenizerError if it is missing or not such a codec.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
        inner = getattr(config, "vq_config", None)
        chosen = (config if inner is None else inner).to_dict()
        codec = CODECS.get(chosen.get("model_type", ""))
        kind = kind or (codec.kinds[0] if codec else "speech")
        if kind not in KINDS:
            raise TokenizerError(f"There are pretrained codecs for {', '.join(KINDS)}; received {kind!r}.")
        settings = moved.current_settings(settings)
        if unknown := set(settings) - set(known := _settings(KINDS[kind])):
            raise TokenizerError(
                f"{KINDS[kind].__name__} has the settings {', '.join(known)}; received {', '.join(sorted(unknown))}."
            )
        tokenizer = KINDS[kind](model_config=chosen, **settings)
        if inner is None:
            state = _own_weights(type(tokenizer.model), source)
        else:
            state = _inner_weights(Path(source))
    except (OSError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise TokenizerError(f"{source} does not load as a codec of transformers: {said}") from error
    _fill(tokenizer.model, state, source)
    return tokenizer.eval()


def _fill(model: Any, state: dict[str, Tensor], source: str | Path) -> None:
    """Load the state of a checkpoint; TokenizerError unless every weight matches this model."""
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise TokenizerError(f"{source} does not fit its codec: {' '.join(str(error).split())}") from error
    missing = [key for key in found.missing_keys if not key.endswith(UNUSED)]
    if missing:
        raise TokenizerError(
            f"{source} lacks weights of its codec, {len(missing)} in all, such as {missing[0]}: it is cut short, or a "
            "checkpoint of something else."
        )
    if found.unexpected_keys:
        raise TokenizerError(f"{source} does not fit its codec, which has no {found.unexpected_keys[0]}.")


def _settings(cls: type[PretrainedTokenizer]) -> list[str]:
    """What a user may set of a kind: its constructor's arguments except the codec's own configuration."""
    return [name for name in signature(cls).parameters if name != "model_config"]


def _own_weights(model: Any, source: str | Path) -> dict[str, Tensor]:
    """The weights of a codec's own checkpoint, float32; missing ones, which transformers initializes, are left out."""
    loaded, found = model.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    return {key: value for key, value in loaded.state_dict().items() if key not in found["missing_keys"]}


def _inner_weights(source: Path) -> dict[str, Tensor]:
    """The weights of the codec inside a larger model, float32; other weights are not read."""
    from safetensors import safe_open

    folder = source if source.is_dir() else _download(str(source))
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                if "vqmodel." in key:
                    state[key.split("vqmodel.", 1)[1]] = file.get_tensor(key).float()
    return state


def _download(source: str) -> Path:
    """The folder of a larger model from the hub, with only the files that contain the codec's weights."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, allow_patterns=["*.json"]))
    index, wanted = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {file for key, file in places.items() if "vqmodel." in key}
    return Path(snapshot_download(source, allow_patterns=sorted(wanted)))


def _config(model_config: dict[str, Any], kind: str) -> Any:
    """transformers' configuration object; TokenizerError for a model type that is not a codec of this kind."""
    import transformers

    codec = CODECS.get(model_config.get("model_type", ""))
    if codec is None or kind not in codec.kinds:
        known = ", ".join(name for name, one in CODECS.items() if kind in one.kinds)
        raise TokenizerError(f"No {kind} codec {model_config.get('model_type')!r}; there are {known}.")
    return getattr(transformers, codec.model).config_class.from_dict(json.loads(json.dumps(model_config)))


def _build(model_config: dict[str, Any], kind: str) -> tuple[Any, int]:
    """The model with random weights, in evaluation mode, and its codebook size."""
    import transformers

    config = _config(model_config, kind)
    size = getattr(config, "codebook_size", 0) or config.num_embeddings
    return getattr(transformers, CODECS[model_config["model_type"]].model)(config).eval(), int(size)
