"""Image and video metrics: PSNR and SSIM, against coders with as many bits or more.

Images are compared with their mean color, a thumbnail of as many bits, and WebP at twice the bytes; clips also with
the image tokenizer at the same number of codes: applied to every frame, scaled down, and to a few frames, held.
Structural similarity: Wang et al. 2004.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from anytoken.evaluation.tokenizers.test_sets import TestExample, by_group
from anytoken.segments import Image, Segment, Video
from anytoken.tokenizers.base import Codes, ModalityTokenizer, TokenizerError

WEBP_METHOD = 6  # the slowest and best
WEBP_TIMES = 2  # its bytes, for one of ours
SIDE_STEP_PX = 8  # between the sides that a frame is scaled to, in search of a number of codes
Frames = np.ndarray  # uint8 [T, H, W, 3]


def frames_of(segment: Segment) -> Frames:
    """Pixels uint8 [T, H, W, 3] of an image (T = 1), a clip, or a segment that has `to_image`."""
    image = segment.to_image() if hasattr(segment, "to_image") else segment
    assert isinstance(image, (Image, Video))
    return image.pixels[None] if isinstance(image, Image) else image.frames


def image_metrics(
    items: Sequence[TestExample],
    outputs: Sequence[Segment],
    bits: float,
    image: ModalityTokenizer | None = None,
    codes: float = 0,
) -> dict[str, Any]:
    """PSNR and SSIM of the reconstructions and of the baseline, at the size of the originals.

    bits, codes: of one item. image: the image tokenizer that clips are compared with.
    """
    originals = [frames_of(item.segment) for item in items]
    own = [at_size(frames_of(one), a.shape) for one, a in zip(outputs, originals, strict=True)]
    psnr = [psnr_db(a, b) for a, b in zip(originals, own, strict=True)]
    flat = [np.broadcast_to(a.mean((0, 1, 2)).round().astype(np.uint8), a.shape) for a in originals]
    found = {
        **_quality("", originals, own),
        "psnr_db_by_group": by_group(items, psnr),
        **_quality("mean_colour_", originals, flat),
        **_quality("thumbnail_", originals, [_thumbnail(a, bits) for a in originals]),
    }
    if isinstance(items[0].segment, Image):
        found |= {"bytes_per_item": bits / 8} | webp(originals, WEBP_TIMES * bits / 8)
    elif image is not None:
        found["image_tokenizer"] = image.fingerprint()
        for name, apply in (("every_frame", every_frame), ("held_frames", held_frames)):
            pairs = [apply(image, one, codes) for one in originals]
            found |= _quality(f"{name}_", originals, [back for back, _ in pairs])
            found[f"{name}_codes"] = float(np.mean([count for _, count in pairs]))
    return found


def _quality(prefix: str, originals: Sequence[Frames], others: Sequence[Frames]) -> dict[str, float]:
    pairs = list(zip(originals, others, strict=True))
    measures = {"psnr_db": psnr_db, "ssim": ssim}
    return {
        f"{prefix}{name}": float(np.mean([one(*pair) for pair in pairs])) for name, one in measures.items()
    }


def at_size(frames: Frames, shape: tuple[int, ...]) -> Frames:
    """Frames as they are, or scaled to [T, H, W, 3] of another height and width where a tokenizer has its own."""
    return np.stack([Image(frame).resize(*shape[1:3]).pixels for frame in frames])


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two arrays of uint8 in dB; at most 108 dB, which stands for equal ones."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * math.log10(255**2 / max(error, 1e-6))


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity of brightness, mean over frames uint8 [T, H, W, 3] (11x11 Gaussian, deviation 1.5)."""
    x, y = (_brightness(one) for one in (a, b))
    offset = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-offset.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(z, window)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return score.mean().item()


def _brightness(frames: Frames) -> Tensor:
    weights = np.array([0.299, 0.587, 0.114]) / 255
    return torch.from_numpy(frames.astype(np.float64) @ weights)[:, None]


def _thumbnail(frames: Frames, bits: float) -> Frames:
    """The frames' mean scaled down to as many bits of 8-bit colour as the codes have, and up again."""
    side = max(1, math.isqrt(int(bits // 24)))
    mean = PILImage.fromarray(frames.mean(0).round().astype(np.uint8))
    small = mean.resize((side, side), PILImage.Resampling.BOX)
    back = np.asarray(small.resize(mean.size, PILImage.Resampling.BICUBIC))
    return np.broadcast_to(back, frames.shape)


# ---- WebP ----


def webp(originals: Sequence[Frames], target: float) -> dict[str, float]:
    """WebP's figures at `target` bytes per image in the mean, one quality for all: between the two nearest qualities.

    Where the lowest quality takes more bytes than that, or the highest fewer, its own figures and bytes are given.
    """
    low, high = -1, 101  # the mean is known to be at most the target at `low`, and more at `high`
    known: dict[int, dict[str, float]] = {}
    while high - low > 1:
        middle = (low + high) // 2
        known[middle] = {"bytes": _mean_bytes(originals, middle)}
        low, high = (middle, high) if known[middle]["bytes"] <= target else (low, middle)
    ends = [quality for quality in (low, high) if 0 <= quality <= 100]
    for quality in ends:
        back = [_webp_back(one, quality) for one in originals]
        known[quality] |= {"quality": float(quality), **_quality("", originals, back)}
    first, last = known[ends[0]], known[ends[-1]]
    room = last["bytes"] - first["bytes"]
    part = (target - first["bytes"]) / room if room > 0 else 0.0
    return {f"webp_{key}": (1 - part) * first[key] + part * last[key] for key in last}


def _webp_file(frames: Frames, quality: int) -> io.BytesIO:
    buffer = io.BytesIO()
    PILImage.fromarray(frames[0]).save(buffer, "WEBP", quality=quality, method=WEBP_METHOD)
    return buffer


def _mean_bytes(originals: Sequence[Frames], quality: int) -> float:
    return float(np.mean([_webp_file(one, quality).tell() for one in originals]))


def _webp_back(frames: Frames, quality: int) -> Frames:
    return np.asarray(PILImage.open(_webp_file(frames, quality)).convert("RGB"))[None]


# ---- clips, by the image tokenizer ----


def every_frame(image: ModalityTokenizer, frames: Frames, codes: float) -> tuple[Frames, int]:
    """Each frame through the image tokenizer, scaled so that all have nearest to `codes` codes; and their number."""
    height, width = frames.shape[1:3]
    best: tuple[float, ModalityTokenizer] | None = None
    for side in range(SIDE_STEP_PX, max(height, width) + 1, SIDE_STEP_PX):
        sized = _with_side(image, side)
        missed = abs(len(frames) * _count(sized.encode_batch([Image(frames[0])])) - codes)
        if best is None or missed < best[0]:
            best = missed, sized
    if best is None:
        raise TokenizerError(f"A frame has at least {SIDE_STEP_PX} pixels a side; received {height}x{width}.")
    found = best[1].encode_batch([Image(frame) for frame in frames])
    return at_size(_decoded(best[1], found), frames.shape), _count(found)


def held_frames(image: ModalityTokenizer, frames: Frames, codes: float) -> tuple[Frames, int]:
    """As many frames as `codes` codes allow through the image tokenizer, each held for its share of the clip."""
    one = _count(image.encode_batch([Image(frames[0])]))
    count = min(len(frames), max(1, int(codes // one)))
    shown = np.arange(len(frames)) * count // len(frames)
    middles = [int(np.flatnonzero(shown == turn).mean()) for turn in range(count)]
    found = image.encode_batch([Image(frames[middle]) for middle in middles])
    return at_size(_decoded(image, found), frames.shape)[shown], _count(found)


def _with_side(image: ModalityTokenizer, side: int) -> ModalityTokenizer:
    """The same tokenizer, which scales its images to another side; the weights are shared."""
    make: Callable[..., ModalityTokenizer] = type(image)
    sized = make(**{**image.config, "side_px": side})
    sized.load_state_dict(image.state_dict(), assign=True)
    return sized.eval()


def _decoded(image: ModalityTokenizer, codes: Sequence[Codes]) -> Frames:
    return np.concatenate([frames_of(one) for one in image.decode_batch(codes)])


def _count(codes: Sequence[Codes]) -> int:
    return sum(one.values.size for one in codes)
