"""Images to a grid of codes and back: one code per 8x8 patch, any size through the size header.

A VQ autoencoder (VQ-VAE, arXiv 1711.00937) on patches: a convolutional trunk at patch resolution, finite scalar
quantization (2309.15505), a deeper trunk, and a short refinement stage at a quarter of the patch size that hides
patch borders. 64x64 pixels become 64 codes. With `num_candidates` above 1, codes are selected by their
reconstruction: about 0.8 dB better, and encoding takes as long as a few decodings per candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anytoken.segments import Image, Segment
from anytoken.tokenizers.base import (
    CodeGrid,
    Codes,
    ModalityTokenizer,
    TokenizerError,
    loss_weights,
    register_modality,
)
from anytoken.tokenizers.losses.image import TERMS, PatchDiscriminator, feature_loss, pixel_loss, psnr_loss
from anytoken.tokenizers.modules.code_search import analysis_by_synthesis, check_candidates
from anytoken.tokenizers.modules.convnext import (
    ChannelLinear,
    ChannelNorm,
    ConvNeXtStack,
    group_by_shape,
    patchify,
    unpatchify,
)
from anytoken.tokenizers.modules.quantizer import Quantizer, QuantizerConfig

PATCH_PX = 8
KEPT_PX = 128  # a side that every tokenizer's grid has room for
REFINE_PX = 4  # the refining stage works on 4x4 pixels a position
PIXELS_ALONE = {"pixel": 1.0}


def psnr_db(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per item of [B, ...] values in [-1, 1] (peak-to-peak 2)."""
    error = (output.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


def as_bytes(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] as [..., 3, H, W], without a copy."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3)


def from_bytes(x: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return (x / 127.5).sub_(1)


def to_bytes(x: Tensor) -> Tensor:
    """Float, clamped to [-1, 1], to uint8."""
    return x.clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def to_unit_range(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] to float [..., 3, H, W] in [-1, 1]."""
    return from_bytes(as_bytes(pixels))


def to_pixels(x: Tensor) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1] to uint8 [..., H, W, 3]."""
    return to_bytes(x).movedim(-3, -1).cpu().numpy()


def fit_side(height: int, width: int, side_px: int) -> tuple[int, int]:
    """Height and width in whole patches with the longer side at `side_px` and the aspect ratio nearly kept."""
    scale = side_px / max(height, width)
    return tuple(max(PATCH_PX, round(n * scale / PATCH_PX) * PATCH_PX) for n in (height, width))  # type: ignore[return-value]


def check_side_px(side_px: int, least: int = PATCH_PX) -> None:
    """TokenizerError unless a side is a whole number of patches and at least `least` pixels."""
    if not isinstance(side_px, int) or side_px < least or side_px % PATCH_PX:
        raise TokenizerError(
            f"side_px is a multiple of {PATCH_PX} pixels, {least} or more; received {side_px!r}."
        )


def analyze_patches(
    choices: Tensor, decode: Callable[[Tensor, Sequence[int]], Tensor], target: Tensor
) -> Tensor:
    """The codes [B, N, Q] among choices [B, N, C, Q] whose reconstruction is closest to target [B, ..., H, W].

    decode: codes and their grid to an output shaped like the target, with 8x8 pixels per code. The error of a code is
    the squared error of its patch and the eight around it. Every other row and column is tried at once, so that
    neighbors never change together.
    """
    grid = [side // PATCH_PX for side in target.shape[-2:]]

    def error(trials: Tensor) -> Tensor:
        decoded = decode(trials.flatten(0, 1), grid).clamp(-1, 1).unflatten(0, trials.shape[:2])
        squared = (decoded - target).square().flatten(2, -3).sum(2)
        return F.avg_pool2d(F.avg_pool2d(squared, PATCH_PX), 3, 1, 1).flatten(2)

    place = torch.arange(math.prod(grid), device=choices.device)
    return analysis_by_synthesis(choices, place // grid[1] % 2 * 2 + place % grid[1] % 2, error)


def fit_image(image: Image, side_px: int) -> np.ndarray:
    """Pixels uint8 [H, W, 3] to encode: whole patches, the longer side `side_px`; 0 keeps up to 128 px."""
    side = side_px or min(KEPT_PX, max(image.height, image.width))
    return image.resize(*fit_side(image.height, image.width, side)).pixels


def _patches(x: Tensor) -> Tensor:
    return patchify(x, (PATCH_PX, PATCH_PX))


@register_modality
class ImageTokenizer(ModalityTokenizer):
    """One code per 8x8 pixels; `encode` first scales the image so that its longer side is `side_px`.

    Any size is accepted: 1x1 and 5000x5000 both become `side_px` on the longer side, with the aspect ratio rounded
    to whole patches. With `side_px=0` images keep their size (rounded to whole patches, at most 128 px per side).
    A grid has up to 16 cells per side, or as many as `side_px` needs. `num_candidates`: when encoding, this number of
    nearest codes is decoded for each patch, and the one with the best reconstruction is kept. TokenizerError for
    invalid settings.
    """

    kind = "image"
    segment_type = Image

    def __init__(
        self,
        width: int = 192,
        encoder_depth: int = 3,
        decoder_depth: int = 6,
        refine_width: int = 64,
        refine_depth: int = 2,
        quantizer: QuantizerConfig = "fsq",
        levels: Sequence[int] = (8, 5, 5, 5),
        codebook_size: int = 1024,
        side_px: int = 64,
        kernel: int = 7,
        num_candidates: int = 1,
    ) -> None:
        config = {
            "width": width, "encoder_depth": encoder_depth, "decoder_depth": decoder_depth,
            "refine_width": refine_width, "refine_depth": refine_depth, "quantizer": quantizer,
            "levels": list(levels), "codebook_size": codebook_size, "side_px": side_px,
        }  # fmt: skip
        check_side_px(side_px, least=0)
        if kernel < 1 or kernel % 2 == 0:
            raise TokenizerError(f"kernel is odd, so that a window has a middle; received {kernel}.")
        # Older files do not have these keys.
        config |= {"kernel": kernel} if kernel != 7 else {}
        config |= {"num_candidates": num_candidates} if num_candidates != 1 else {}
        quantize = Quantizer(width, quantizer, levels, codebook_size)
        check_candidates(num_candidates, quantize)
        most = max(KEPT_PX, side_px) // PATCH_PX
        shape = CodeGrid(("rows", "cols"), (1, 1), (most, most), quantize.num_codebooks, quantize.order)
        super().__init__(shape=shape, codebook_sizes=quantize.codebook_sizes, config=config)
        self.quantize = quantize
        self._losses: tuple[dict[str, float], tuple[PatchDiscriminator | None]] = (PIXELS_ALONE, (None,))
        window = (kernel, kernel)
        self.encoder = nn.Sequential(
            ChannelLinear(3 * PATCH_PX**2, width),
            ConvNeXtStack(width, encoder_depth, window),
            ChannelNorm(width),
        )
        up = PATCH_PX // REFINE_PX
        self.decoder = nn.Sequential(
            ConvNeXtStack(width, decoder_depth, window),
            ChannelNorm(width),
            ChannelLinear(width, refine_width * up**2),
        )
        self.refine = nn.Sequential(
            ConvNeXtStack(refine_width, refine_depth, window),
            ChannelNorm(refine_width),
            ChannelLinear(refine_width, 3 * REFINE_PX**2),
        )

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes [B, rows, cols, Q] to pixels [B, 3, H, W] in about [-1, 1]."""
        return self._decode_vectors(self.quantize.lookup(codes.flatten(1, 2)), codes.shape[1:3])

    def _decode_vectors(self, vectors: Tensor, grid: Sequence[int]) -> Tensor:
        return unpatchify(self._refined(vectors, grid), (REFINE_PX, REFINE_PX))

    def _refined(self, vectors: Tensor, grid: Sequence[int]) -> Tensor:
        x = vectors.transpose(1, 2).unflatten(2, tuple(grid))
        up = PATCH_PX // REFINE_PX
        return self.refine(unpatchify(self.decoder(x), (up, up)))

    def _pixels(self, codes: Tensor, grid: Sequence[int]) -> Tensor:
        return self.reconstruct(codes.unflatten(1, tuple(grid)))

    def _encode_pixels(self, x: Tensor) -> Tensor:
        return self.encoder(_patches(x))

    def configure_losses(self, weights: Mapping[str, float]) -> nn.Module | None:
        """Train with these terms of `losses/image.py`; returns the discriminator to train as well, if any.

        The discriminator is not part of the tokenizer: it is neither saved nor in the fingerprint.
        """
        weights = loss_weights(weights, TERMS, PIXELS_ALONE)
        critic = PatchDiscriminator() if weights.get("adversarial") else None
        self._losses = weights, (critic,)  # in a tuple, so that it is not registered as a part
        return critic

    def training_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """batch: pixels [B, 3, H, W] in [-1, 1], H and W multiples of 8."""
        latent = self._encode_pixels(batch)
        quantized = self.quantize(latent.flatten(2).transpose(1, 2))
        output = self._decode_vectors(quantized.vectors, latent.shape[2:]).float()
        loss, seen = self._image_loss(output, batch)
        return loss + quantized.loss, {"psnr_db": psnr_db(output.detach(), batch).mean().item(), **seen}

    def _image_loss(self, output: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        weights, (critic,) = self._losses
        terms = {
            "pixel": lambda: pixel_loss(output, batch),
            "psnr": lambda: psnr_loss(output, batch),
            "feature": lambda: feature_loss(self.encoder, _patches, output, batch),
        }
        found = {name: term() for name, term in terms.items() if weights.get(name)}
        critic_loss = output.new_zeros(())
        if critic is not None:
            found["adversarial"], critic_loss = critic.losses(output, batch)
        loss = torch.stack([weights[name] * value for name, value in found.items()]).sum() + critic_loss
        return loss, {name: value.item() for name, value in found.items() if len(found) > 1}

    def _prepare(self, segment: Segment) -> np.ndarray:
        self.check_segment(segment)
        assert isinstance(segment, Image)
        return fit_image(segment, self.config["side_px"])

    @torch.inference_mode()
    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """Images to codes; images of the same size share a forward pass."""
        images = [self._prepare(segment) for segment in segments]
        result: list[Codes | None] = [None] * len(images)
        shapes = [one.shape for one in images]
        for rows in group_by_shape(shapes, [h * w // PATCH_PX**2 for h, w, _ in shapes], self.device):
            x = _patches(as_bytes(np.stack([images[i] for i in rows]))).to(self.device)
            latent = self.encoder(from_bytes(x))
            flat = latent.flatten(2).transpose(1, 2)
            if (count := self.config.get("num_candidates", 1)) == 1:
                codes = self.quantize(flat).codes
            else:
                target = unpatchify(from_bytes(x), (PATCH_PX, PATCH_PX))
                codes = analyze_patches(self.quantize.nearest(flat, count), self._pixels, target)
            for i, values in zip(rows, codes.cpu().numpy(), strict=True):
                result[i] = Codes(values, tuple(latent.shape[2:]))
        return [codes for codes in result if codes is not None]

    @torch.inference_mode()
    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to images of rows*8 by cols*8 pixels."""
        for one in codes:
            self.check_codes(one)
        result: list[Segment | None] = [None] * len(codes)
        for rows in group_by_shape([one.size for one in codes], [len(one) for one in codes], self.device):
            values = torch.from_numpy(np.stack([codes[i].values for i in rows])).to(self.device)
            size = codes[rows[0]].size
            x = to_bytes(self._refined(self.quantize.lookup(values), size))
            pixels = unpatchify(x, (REFINE_PX, REFINE_PX)).movedim(1, -1).cpu().numpy()
            for i, one in zip(rows, pixels, strict=True):
                result[i] = Image(one)
        return [segment for segment in result if segment is not None]

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """Quantized vectors [K, width] in the decoder's input space."""
        return self.quantize.codebook(codebook)
