"""Video to a space-time grid of codes and back: one code per 4 frames of 8x8 pixels.

The image tokenizer's autoencoder with a third axis: tubelets instead of patches (ViViT, arXiv 2103.15691),
3-D depthwise convolutions, finite scalar quantization (2309.15505). Eight frames of 64x64 pixels become 128 codes, so
static content is coded once per four frames. With `causal`, a step of four frames depends only on earlier frames
(as in MAGVIT-v2, 2310.05737): a still image is a clip of one step, and streams of any length are encoded and decoded
step by step (`encode_stream`, `decode_stream`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anytoken.segments import Image, Segment, Video
from anytoken.tokenizers.base import CodeGrid, Codes, ModalityTokenizer, TokenizerError, register_modality
from anytoken.tokenizers.image import (
    PATCH_PX,
    analyze_patches,
    as_bytes,
    check_candidates,
    check_side_px,
    fit_side,
    from_bytes,
    psnr_db,
    to_bytes,
)
from anytoken.tokenizers.losses.image import pixel_loss
from anytoken.tokenizers.modules.convnext import (
    ChannelLinear,
    ChannelNorm,
    ConvNeXtStack,
    group_by_shape,
    patchify,
    unpatchify,
)
from anytoken.tokenizers.modules.quantizer import Quantizer, QuantizerConfig

STEP_FRAMES = 4
MAX_STEPS = 2
TUBELET = (STEP_FRAMES, PATCH_PX, PATCH_PX)
PATCH = 3 * math.prod(TUBELET)  # values per code
KERNEL = (3, 5, 5)
Past = tuple[Any, Any]  # cached inputs of the encoder and the decoder of a stream, None at its start


def fit_clip(clip: Video, side_px: int, max_steps: int = MAX_STEPS) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] to encode: whole steps and patches, the longer side `side_px`."""
    count, height, width, _ = clip.frames.shape
    frames = STEP_FRAMES * min(max_steps, max(1, round(count / STEP_FRAMES)))
    rows, cols = fit_side(height, width, side_px)
    picked = clip.frames[[int(i * count / frames) for i in range(frames)]]
    return np.stack([Image(frame).resize(rows, cols).pixels for frame in picked])


def _whole_steps(clips: Iterable[Video], side_px: int) -> Iterator[np.ndarray]:
    """Successive frames uint8 [4, H, W, 3] of the clips, scaled like the first one."""
    waiting: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    for clip in clips:
        height, width = clip.frames.shape[1:3]
        size = size or (height, width)
        if (height, width) != size:
            raise TokenizerError(
                f"Frames of a stream have one size; received {(height, width)} after {size}."
            )
        rows, cols = fit_side(*size, side_px)
        waiting += [Image(frame).resize(rows, cols).pixels for frame in clip.frames]
        while len(waiting) >= STEP_FRAMES:
            yield np.stack(waiting[:STEP_FRAMES])
            waiting = waiting[STEP_FRAMES:]
    if waiting:
        yield np.stack(waiting + waiting[-1:] * (STEP_FRAMES - len(waiting)))


@register_modality
class VideoTokenizer(ModalityTokenizer):
    """One code per 4 frames of 8x8 pixels. `encode` scales the longer side to `side_px`, for 4 to 4 * max_steps frames.

    The number of frames becomes the nearest multiple of 4, sampled evenly from the clip (a single frame is repeated).
    Decoded video has `video_frame_rate_hz` frames per second; the clip's own rate is not coded. `num_candidates`: as in
    ImageTokenizer, tried step by step; only if causal.
    """

    kind = "video"
    segment_type = Video

    def __init__(
        self,
        width: int = 192,
        encoder_depth: int = 3,
        decoder_depth: int = 6,
        quantizer: QuantizerConfig = "fsq",
        levels: Sequence[int] = (8, 5, 5, 5),
        codebook_size: int = 1024,
        side_px: int = 64,
        video_frame_rate_hz: float = 4.0,
        max_steps: int = MAX_STEPS,
        causal: bool = False,
        num_candidates: int = 1,
    ) -> None:
        config = {
            "width": width, "encoder_depth": encoder_depth, "decoder_depth": decoder_depth, "quantizer": quantizer,
            "levels": list(levels), "codebook_size": codebook_size, "side_px": side_px,
            "video_frame_rate_hz": video_frame_rate_hz,
        }  # fmt: skip
        check_side_px(side_px)
        # Older files do not have these keys.
        config |= {"max_steps": max_steps} if max_steps != MAX_STEPS else {}
        config |= {"causal": True} if causal else {}
        config |= {"num_candidates": num_candidates} if num_candidates != 1 else {}
        quantize = Quantizer(width, quantizer, levels, codebook_size)
        check_candidates(num_candidates, quantize)
        if num_candidates != 1 and not causal:
            raise TokenizerError(
                f"num_candidates are tried step by step: 1, or causal=true; received {num_candidates} without."
            )
        cells = side_px // PATCH_PX
        shape = CodeGrid(
            ("steps", "rows", "cols"),
            (1, 1, 1),
            (max_steps, cells, cells),
            quantize.num_codebooks,
            quantize.order,
        )
        super().__init__(shape=shape, codebook_sizes=quantize.codebook_sizes, config=config)
        self.quantize, self.causal = quantize, causal
        self.encoder = nn.Sequential(
            ChannelLinear(PATCH, width),
            ConvNeXtStack(width, encoder_depth, KERNEL, causal=causal),
            ChannelNorm(width),
        )
        self.decoder = nn.Sequential(
            ConvNeXtStack(width, decoder_depth, KERNEL, causal=causal),
            ChannelNorm(width),
            ChannelLinear(width, PATCH),
        )

    def _tubelets(self, vectors: Tensor, grid: Sequence[int]) -> Tensor:
        return self.decoder(vectors.transpose(1, 2).unflatten(2, tuple(grid)))

    def _decode_vectors(self, vectors: Tensor, grid: Sequence[int]) -> Tensor:
        return unpatchify(self._tubelets(vectors, grid), TUBELET)

    def _lookup(self, codes: Tensor) -> Tensor:
        return self.quantize.lookup(codes)

    def training_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """batch: pixels [B, 3, T, H, W] in [-1, 1], T a multiple of 4, H and W of 8."""
        latent = self.encoder(patchify(batch, TUBELET))
        quantized = self.quantize(latent.flatten(2).transpose(1, 2))
        output = self._decode_vectors(quantized.vectors, latent.shape[2:])
        return pixel_loss(output, batch) + quantized.loss, {
            "psnr_db": psnr_db(output.detach(), batch).mean().item()
        }

    def _prepare(self, segment: Segment) -> np.ndarray:
        self.check_segment(segment)
        assert isinstance(segment, Video)
        return fit_clip(segment, self.config["side_px"], self.config.get("max_steps", MAX_STEPS))

    @torch.inference_mode()
    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """Clips to codes; clips of the same size share a forward pass."""
        clips = [self._prepare(segment) for segment in segments]
        result: dict[int, Codes] = {}
        shapes = [clip.shape for clip in clips]
        for rows in group_by_shape(shapes, [math.prod(shape) // PATCH for shape in shapes], self.device):
            frames = as_bytes(np.stack([clips[i] for i in rows])).transpose(1, 2)
            x = from_bytes(patchify(frames, TUBELET).to(self.device))
            latent = self.encoder(x)
            values = self._quantized(latent, x)[0].cpu().numpy()
            result.update({i: Codes(v, tuple(latent.shape[2:])) for i, v in zip(rows, values, strict=True)})
        return [result[i] for i in range(len(clips))]

    def _quantized(
        self, latent: Tensor, x: Tensor, past: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Codes [B, N, 1] of latents [B, D, steps, rows, cols] of tubelets x, and the decoder's cache after them.

        With num_candidates, those of each step with the best reconstruction, given the steps before.
        """
        flat = latent.flatten(2).transpose(1, 2)
        if (count := self.config.get("num_candidates", 1)) == 1:
            return self.quantize(flat).codes, past
        cells, found = math.prod(latent.shape[3:]), []
        for step, choices in enumerate(self.quantize.nearest(flat, count).split(cells, 1)):
            target = unpatchify(x[:, :, step : step + 1], TUBELET)
            before = past

            def decode(trial: Tensor, grid: Sequence[int], before: list[Tensor] | None = before) -> Tensor:
                return unpatchify(self._next_step(trial, (1, *grid), before)[0], TUBELET)

            found.append(analyze_patches(choices, decode, target))
            _, past = self._next_step(found[-1], (1, *latent.shape[3:]), before)
        return torch.cat(found, 1), past

    def _next_step(
        self, codes: Tensor, size: Sequence[int], past: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Tubelets of the next codes [B, N, Q] of a causal tokenizer, given the decoder's cache; and the new cache."""
        trunk, norm, out = list[Any](self.decoder)
        vectors = self._lookup(codes)
        x, past = trunk.step(vectors.transpose(1, 2).unflatten(2, tuple(size)), past)
        return out(norm(x)), past

    @torch.inference_mode()
    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to clips of steps*4 frames of rows*8 by cols*8 pixels."""
        for one in codes:
            self.check_codes(one)
        result: dict[int, Segment] = {}
        for rows in group_by_shape([one.size for one in codes], [len(one) for one in codes], self.device):
            values = torch.from_numpy(np.stack([codes[i].values for i in rows])).to(self.device)
            size = codes[rows[0]].size
            x = to_bytes(self._tubelets(self.quantize.lookup(values), size))
            clips = unpatchify(x, TUBELET).movedim(1, -1).cpu().numpy()
            rate = self.config["video_frame_rate_hz"]
            result.update({i: Video(clip, rate) for i, clip in zip(rows, clips, strict=True)})
        return [result[i] for i in range(len(codes))]

    # ---- streams ----

    def encode_stream(self, clips: Iterable[Video]) -> Iterator[Codes]:
        """Yield the codes of each step of four frames as soon as possible; they equal those of `encode` for all frames.

        clips: pieces of any number of frames, all of one size. An incomplete last step repeats its last frame. The
        length is unlimited. TokenizerError if this tokenizer is not causal, or the size changes.
        """
        self._check_causal()
        past: Past = (None, None)
        for frames in _whole_steps(clips, self.config["side_px"]):
            codes, past = self._encode_step(frames, past)
            yield codes

    def decode_stream(self, codes: Iterable[Codes]) -> Iterator[Video]:
        """Yield the frames of each piece of one or more steps; they equal those of `decode` for all codes.

        TokenizerError if this tokenizer is not causal, or codes do not fit.
        """
        self._check_causal()
        past = None
        for piece in codes:
            self.check_codes(piece)
            frames, past = self._decode_step(piece, past)
            yield Video(frames, self.config["video_frame_rate_hz"])

    def _check_causal(self) -> None:
        if not self.causal:
            raise TokenizerError(
                "Only a causal video tokenizer can stream: train it with config.causal=true."
            )

    @torch.inference_mode()
    def _encode_step(self, frames: np.ndarray, past: Past) -> tuple[Codes, Past]:
        into, trunk, norm = list[Any](self.encoder)
        clip = as_bytes(frames)[None].transpose(1, 2)
        x = from_bytes(patchify(clip, TUBELET).to(self.device))
        latent, seen = trunk.step(into(x), past[0])
        codes, decoded = self._quantized(norm(latent), x, past[1])
        return Codes(codes[0].cpu().numpy(), tuple(latent.shape[2:])), (seen, decoded)

    @torch.inference_mode()
    def _decode_step(self, codes: Codes, past: list[Tensor] | None) -> tuple[np.ndarray, list[Tensor]]:
        values = torch.from_numpy(codes.values)[None].to(self.device)
        x, past = self._next_step(values, codes.size, past)
        return unpatchify(to_bytes(x), TUBELET).movedim(1, -1)[0].cpu().numpy(), past

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """Quantized vectors [K, width] in the decoder's input space."""
        return self.quantize.codebook(codebook)
