"""Images and clips as a layer over a plain base color, coded once: local codes do not depend on the background.

Codes of composed pixels repeat the background in every patch and change with it, so a language model has to learn every
drawing once per background. Here the base color goes into global codes, and local codes describe the layer over it:
premultiplied color and alpha (coverage; Porter and Duff, 1984), which are the same on any background. A small network
estimates the coverage of each pixel given the base color (matting with a known background, arXiv 2004.00626). A patch
without coverage has a code of its own. An image without a plain border is one opaque layer, coded like any image.
A clip has one base color, that of its first step of frames, so that it can be encoded as a stream.

Values are in [-1, 1], where premultiplied color is the layer over mid-gray: image = color + (1 - coverage) * base.
Shapes: B items, H and W pixels, N patches, D width; `space` is H, W for images and T, H, W for clips of T frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anytoken.segments import Image, Segment, Video
from anytoken.tokenizers.base import (
    CodeGrid,
    Codes,
    ModalityTokenizer,
    TokenizerError,
    loss_weights,
    register_modality,
)
from anytoken.tokenizers.image import PATCH_PX, ImageTokenizer, from_bytes, psnr_db, to_bytes
from anytoken.tokenizers.losses.image import pixel_loss, psnr_loss
from anytoken.tokenizers.modules.convnext import (
    ChannelLinear,
    ChannelNorm,
    ConvNeXtStack,
    group_by_shape,
    patchify,
    unpatchify,
)
from anytoken.tokenizers.modules.quantizer import Quantizer
from anytoken.tokenizers.video import STEP_FRAMES, TUBELET, Past, VideoTokenizer

BASE_LEVELS, BASE_CODES = 32, 3  # levels of red, green and blue each
BORDER_PX = 2
PLAIN_SHARE, PLAIN_STEP = 0.5, 16 / 127.5  # this share of the border's pixels is this close to the base
MATTE_PX = 4  # pixels per side that the matte network sees as one position
EMPTY = 0.03  # coverage below this counts as zero
TERMS = ("pixel", "psnr", "recolored", "matte", "consistency", "commitment")
# Consistency and commitment are squared distances in the codebook's own space, where codes lie about 0.04 apart.
WEIGHTS = {
    "pixel": 1.0,
    "psnr": 0.1,
    "recolored": 0.5,
    "matte": 0.5,
    "consistency": 200.0,
    "commitment": 12.0,
}


@dataclass
class Layers:
    """Separated items: `layer` [B, 4, *space], premultiplied color and coverage, over the color of `codes` [B, 3].

    plain: bool [B], whether the border is plain. logits of the coverage: [B, 1, *space].
    """

    layer: Tensor
    codes: Tensor
    plain: Tensor
    logits: Tensor


def base_color(codes: Tensor) -> Tensor:
    """The colors [B, 3] of global codes int64 [B, 3]."""
    return codes / (BASE_LEVELS - 1) * 2 - 1


def find_base(x: Tensor) -> tuple[Tensor, Tensor]:
    """Global codes int64 [B, 3] of the median border color of x [B, 3, *space]; is the border plain, bool [B]."""
    w = BORDER_PX
    sides = [x[..., :w, :], x[..., -w:, :], x[..., :w], x[..., -w:]]
    border = torch.cat([side.flatten(2) for side in sides], 2)
    codes = ((border.median(2).values + 1) / 2 * (BASE_LEVELS - 1)).round().long().clamp(0, BASE_LEVELS - 1)
    near = (border - base_color(codes)[:, :, None]).abs().amax(1) <= PLAIN_STEP
    return codes, near.float().mean(1) >= PLAIN_SHARE


def _everywhere(one: Tensor, x: Tensor) -> Tensor:
    """Values [B, ...] per item, reshaped to broadcast with x [B, C, *space]."""
    return one.reshape(*one.shape, *[1] * (x.ndim - one.ndim))


def composed(layer: Tensor, base: Tensor) -> Tensor:
    """Compose layers [B, 4, *space] over colors [B, 3]: pixels [B, 3, *space]."""
    return layer[:, :3] + (1 - layer[:, 3:]) * _everywhere(base, layer)


def hardened(coverage: Tensor) -> Tensor:
    """Coverage in [0, 1], with values near 0 and 1 snapped to 0 and 1."""
    return ((coverage - EMPTY) / (1 - 2 * EMPTY)).clamp(0, 1)


def empty_patches(layer: Tensor, patch: Sequence[int] = (PATCH_PX, PATCH_PX)) -> Tensor:
    """Which patches of layers [B, 4, *space] are empty, bool [B, N]."""
    return patchify(layer[:, 3:], patch).amax(1).flatten(1) < EMPTY


class Matte(nn.Module):
    """Separates images, or the frames of clips, into a base color and the layer over it."""

    def __init__(self, width: int, depth: int, kernel: int = 5) -> None:
        super().__init__()
        self.net = nn.Sequential(
            ChannelLinear(7 * MATTE_PX**2, width),
            ConvNeXtStack(width, depth, (kernel, kernel)),
            ChannelNorm(width),
            ChannelLinear(width, MATTE_PX**2),
        )

    def forward(self, x: Tensor, known: tuple[Tensor, Tensor] | None = None) -> Layers:
        """x [B, 3, *space] in [-1, 1], sides multiples of 4.

        known: the result of `find_base` if x continues a clip; otherwise it is computed here, from a clip's first step.
        """
        codes, plain = known or find_base(x if x.ndim == 4 else x[:, :, :STEP_FRAMES])
        base = _everywhere(base_color(codes), x)
        off = x - base
        far = off.square().sum(1, keepdim=True).add(4e-6).sqrt()
        logits = self._logits(torch.cat([x, off, far], 1)).float()
        coverage = hardened(logits.sigmoid())
        coverage = torch.where(_everywhere(plain, x), coverage, torch.ones_like(coverage))
        color = x - (1 - coverage) * base
        color = torch.maximum(torch.minimum(color, coverage), -coverage)
        return Layers(torch.cat([color, coverage], 1), codes, plain, logits)

    def _logits(self, planes: Tensor) -> Tensor:
        if planes.ndim == 5:
            frames = self._logits(planes.transpose(1, 2).flatten(0, 1))
            return frames.unflatten(0, (len(planes), -1)).transpose(1, 2)
        patch = (MATTE_PX, MATTE_PX)
        return unpatchify(self.net(patchify(planes, patch)), patch)

    @staticmethod
    def loss(found: Layers, true: Tensor) -> Tensor:
        """Error of the coverage compared with true layers [B, 4, *space], over items with a plain border."""
        target = true[:, 3:]
        each = F.binary_cross_entropy_with_logits(found.logits, target, reduction="none")
        each = each + 2 * (found.logits.sigmoid() - target).abs()
        return (each.flatten(1).mean(1) * found.plain).mean()


class LayeredCodes(ModalityTokenizer):
    """The common part of layered images and layered clips; the other base class provides encoder and decoder.

    patch: the sizes that one code stands for. last: name of the layer that outputs pixels. A recolored item keeps its
    local codes: `swap_global` exchanges the base. There is one codebook, with an additional code for empty patches,
    and `num_candidates` are not supported.
    """

    patch: ClassVar[tuple[int, ...]]
    last: ClassVar[str]
    quantize: Quantizer
    encoder: nn.Sequential
    _prepare: Callable[[Segment], np.ndarray]
    _decode_vectors: Callable[[Tensor, Sequence[int]], Tensor]

    def _add_layers(self, matte_width: int, matte_depth: int) -> None:
        """Add global codes, the code for empty patches, the matte, and coverage as a fourth channel."""
        if self.quantize.num_codebooks != 1:
            raise TokenizerError(
                f"A {self.kind} tokenizer has one codebook; received {self.config['quantizer']!r}."
            )
        if "num_candidates" in self.config:
            raise TokenizerError(f"A {self.kind} tokenizer takes no num_candidates.")
        self.config |= {"matte_width": matte_width, "matte_depth": matte_depth}
        assert isinstance(self.shape, CodeGrid)
        limits = self.shape.axes, self.shape.min_size, self.shape.max_size
        self.shape = CodeGrid(*limits, num_global_codes=BASE_CODES)
        self.empty_code = self.codebook_sizes[0]
        self.codebook_sizes = (self.empty_code + 1,)
        self.global_codebook_size = BASE_LEVELS
        width = self.config["width"]
        self.matte = Matte(matte_width, matte_depth)
        self.empty = nn.Parameter(torch.zeros(width))  # decoder input for an empty patch
        self.encoder[0] = ChannelLinear(4 * math.prod(self.patch), width)
        last = self.get_submodule(self.last)
        assert isinstance(last, ChannelLinear)
        self.set_submodule(self.last, ChannelLinear(last.in_features, last.out_features // 3 * 4))
        self._term_weights = WEIGHTS

    def _segment(self, pixels: np.ndarray) -> Segment:
        """The segment of pixels uint8 [*space, 3]."""
        raise NotImplementedError

    # ---- layers and codes ----

    def _pixels_of(self, pixels: np.ndarray) -> Tensor:
        """uint8 [B, *space, 3] as x [B, 3, *space] in [-1, 1]."""
        return from_bytes(torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 1).to(self.device))

    def _latents(self, layer: Tensor) -> Tensor:
        """Layers [B, 4, *space] to latents [B, N, D]."""
        return self.encoder(patchify(layer, self.patch)).flatten(2).transpose(1, 2)

    def _matched(self, latents: Tensor, empty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [B, N, D], codes [B, N] and the codebook's loss; empty patches bypass the codebook."""
        full = ~empty
        vectors = self.empty.to(latents.dtype).expand_as(latents).clone()
        codes = torch.full(empty.shape, self.empty_code, device=empty.device)
        if not full.any():
            return vectors, codes, latents.new_zeros(())
        found = self.quantize(latents[full][None])
        vectors[full], codes[full] = found.vectors[0].to(vectors.dtype), found.codes[0, :, 0]
        return vectors, codes, found.loss

    def _with_coverage(self, y: Tensor) -> Tensor:
        """Decoder output [B, 4, *space] as a layer."""
        y = y.float()
        return torch.cat([y[:, :3], y[:, 3:].sigmoid()], 1)

    def _layer(self, vectors: Tensor, grid: Sequence[int]) -> Tensor:
        """Vectors [B, N, D] to layers [B, 4, *space]."""
        return self._with_coverage(self._decode_vectors(vectors, grid))

    def _lookup(self, codes: Tensor) -> Tensor:
        """Vectors [B, N, D] of codes [B, N, 1]."""
        vectors = self.quantize.lookup(codes.clamp(max=self.empty_code - 1))
        return torch.where(codes == self.empty_code, self.empty.to(vectors.dtype), vectors)

    @torch.inference_mode()
    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """Segments to codes; segments of the same size share a forward pass."""
        items = [self._prepare(segment) for segment in segments]
        result: dict[int, Codes] = {}
        shapes = [one.shape for one in items]
        cells = [math.prod(shape[:-1]) // math.prod(self.patch) for shape in shapes]
        for rows in group_by_shape(shapes, cells, self.device):
            x = self._pixels_of(np.stack([items[i] for i in rows]))
            found = self.matte(x)
            _, codes, _ = self._matched(self._latents(found.layer), empty_patches(found.layer, self.patch))
            size = self._grid(x)
            for i, local, header in zip(rows, codes.cpu().numpy(), found.codes.cpu().numpy(), strict=True):
                result[i] = Codes(local[:, None], size, header)
        return [result[i] for i in range(len(items))]

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        return tuple(side // p for side, p in zip(x.shape[2:], self.patch, strict=True))

    @torch.inference_mode()
    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to segments of whole patches."""
        for one in codes:
            self.check_codes(one)
        result: dict[int, Segment] = {}
        for rows in group_by_shape([one.size for one in codes], [len(one) for one in codes], self.device):
            local = torch.from_numpy(np.stack([codes[i].values for i in rows])).to(self.device)
            header = torch.from_numpy(np.stack([codes[i].header for i in rows])).to(self.device)
            layer = self._layer(self._lookup(local), codes[rows[0]].size)
            pixels = to_bytes(composed(layer, base_color(header))).movedim(1, -1).cpu().numpy()
            result.update({i: self._segment(one) for i, one in zip(rows, pixels, strict=True)})
        return [result[i] for i in range(len(codes))]

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """Vectors [K, width] in the decoder's input space; the last one is for empty patches."""
        return torch.cat([self.quantize.codebook(codebook), self.empty.detach()[None]])

    # ---- training ----

    def adapted_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a plain tokenizer, extended by those of coverage, matte and empty patches.

        An image over mid-gray equals its premultiplied layer, so these weights are a good initialization.
        """
        if "empty" in state:
            return state
        own = self.state_dict()
        grown = {key: own[key].clone() for key in own if key.startswith(("matte.", "empty"))}
        for key in ("encoder.0.weight", f"{self.last}.weight", f"{self.last}.bias"):
            grown[key] = torch.zeros_like(own[key])
            grown[key][tuple(slice(size) for size in state[key].shape)] = state[key]
        return {**state, **grown}

    def configure_losses(self, weights: Mapping[str, float]) -> None:
        """Train with these terms.

        pixel, psnr: error of the composed pixels. recolored: pixel error of the decoded layer over another color.
        matte: error of the coverage. consistency: distance of the latents of the layers found on two bases from those
        of the true layer. commitment: distance of latents from their codes.
        """
        self._term_weights = loss_weights(weights, TERMS, WEIGHTS)

    def training_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """batch: true layers and two base colors as planes, [B, 4 + 3 + 3, *space], in whole patches."""
        true, bases = batch[:, :4], batch[:, 4:].flatten(2)[..., 0].unflatten(1, (2, 3))
        x = torch.cat([composed(true, bases[:, 0]), composed(true, bases[:, 1])])
        found, both = self.matte(x), torch.cat([true, true])
        layer = found.layer.detach()
        latents = self._latents(torch.cat([true, layer])).float()
        empty = torch.cat([empty_patches(one, self.patch) for one in (true, layer)])
        vectors, codes, loss = self._matched(latents, empty)
        count = len(true)
        decoded = self._layer(vectors[count : 2 * count], self._grid(x))
        image, target = composed(decoded, base_color(found.codes[:count])), x[:count]
        other = torch.rand(count, 3, device=x.device) * 2 - 1
        near = self._nearness(latents, codes, empty, count)
        terms = {
            "pixel": lambda: pixel_loss(image, target),
            "psnr": lambda: psnr_loss(image, target),
            "recolored": lambda: pixel_loss(composed(decoded, other), composed(true, other)),
            "matte": lambda: Matte.loss(found, both),
            **near,
        }
        losses = {name: terms[name]() for name, weight in self._term_weights.items() if weight}
        total = torch.stack([self._term_weights[name] * one for name, one in losses.items()]).sum() + loss
        seen = {"psnr_db": psnr_db(image.detach(), target).mean().item()}
        return total, seen | {name: one.item() for name, one in losses.items()}

    def _nearness(
        self, latents: Tensor, codes: Tensor, empty: Tensor, count: int
    ) -> dict[str, Callable[[], Tensor]]:
        """Consistency and commitment, as squared distances in the codebook's space."""
        inner: Any = self.quantize.inner
        project = getattr(inner, "project_in", nn.Identity())
        points = project(latents)
        true, views = points[:count], points[count:].unflatten(0, (2, count))

        def consistency() -> Tensor:
            full = ~empty[:count] & ~empty[count:].unflatten(0, (2, count))
            return ((views - true.detach()).square().mean(-1) * full).sum() / full.sum().clamp_min(1)

        def commitment() -> Tensor:
            if not hasattr(inner, "codebook") or self.quantize.kind == "fsq":
                return latents.new_zeros(())
            nearest = inner.codebook[codes[:count].clamp(max=self.empty_code - 1)].detach()
            full = ~empty[:count]
            return ((true - nearest).square().mean(-1) * full).sum() / full.sum().clamp_min(1)

        return {"consistency": consistency, "commitment": commitment}


@register_modality
class LayeredImageTokenizer(LayeredCodes, ImageTokenizer):
    """Diff with ImageTokenizer: encodes the layer over a base color; the color is three global codes.

    settings: as in ImageTokenizer. matte_width, matte_depth: size of the network that estimates coverage.
    """

    kind = "layered_image"
    patch = (PATCH_PX, PATCH_PX)
    last = "refine.2"

    def __init__(
        self, width: int = 128, matte_width: int = 64, matte_depth: int = 3, **settings: Any
    ) -> None:
        super().__init__(width, **settings)
        self._add_layers(matte_width, matte_depth)

    def _segment(self, pixels: np.ndarray) -> Image:
        return Image(pixels)


@register_modality
class LayeredVideoTokenizer(LayeredCodes, VideoTokenizer):
    """Diff with a causal VideoTokenizer: encodes the layer over a base color; the color is three global codes.

    settings: as in VideoTokenizer. matte_width, matte_depth: size of the network that estimates coverage per frame.
    """

    kind = "layered_video"
    patch = TUBELET
    last = "decoder.2"

    def __init__(
        self, width: int = 128, matte_width: int = 64, matte_depth: int = 3, **settings: Any
    ) -> None:
        super().__init__(width, causal=True, **settings)
        del self.config["causal"]  # always true
        self._add_layers(matte_width, matte_depth)

    def _segment(self, pixels: np.ndarray) -> Video:
        return Video(pixels, self.config["video_frame_rate_hz"])

    @torch.inference_mode()
    def _encode_step(self, frames: np.ndarray, past: Past) -> tuple[Codes, Past]:
        """As in VideoTokenizer; the second part of the cache is the base color of the first step."""
        into, trunk, norm = list[Any](self.encoder)
        found = self.matte(self._pixels_of(frames[None]), past[1])
        latent, seen = trunk.step(into(patchify(found.layer, TUBELET)), past[0])
        empty = empty_patches(found.layer, TUBELET)
        _, codes, _ = self._matched(norm(latent).flatten(2).transpose(1, 2), empty)
        values, header = codes[0, :, None].cpu().numpy(), found.codes[0].cpu().numpy()
        return Codes(values, tuple(latent.shape[2:]), header), (seen, (found.codes, found.plain))

    @torch.inference_mode()
    def _decode_step(self, codes: Codes, past: list[Tensor] | None) -> tuple[np.ndarray, list[Tensor]]:
        values, header = (torch.from_numpy(one)[None].to(self.device) for one in (codes.values, codes.header))
        x, past = self._next_step(values, codes.size, past)
        layer = self._with_coverage(unpatchify(x, TUBELET))
        return to_bytes(composed(layer, base_color(header))).movedim(1, -1)[0].cpu().numpy(), past
