"""The palette of an image as tokens: up to seven colours, each with its share of the image.

Structured data as one more modality, after 4M-21 (arXiv 2406.09406), which writes palettes and metadata as sequences. A
frame is two codes: the colour from a learned codebook (VQ-VAE, 1711.00937), and its share in sixteenths, a plain scale.
The largest share comes first. The folder is a whole modality: this file, a recipe and a card.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image as Picture
from torch import nn
from torch.nn import functional as F

from anytoken.segments import Image, Segment, SegmentError
from anytoken.tokenizers.base import Codes, CodeSequence, ModalityTokenizer, TokenizerError, register_modality
from anytoken.tokenizers.modules.quantizer import Quantizer
from anytoken.utils.json_lines import read_json_lines

MAX_COLOURS, SHARES = 7, 16


@dataclass(frozen=True, eq=False)
class Palette(Segment):
    """`colours` uint8 [N, 3] RGB and `shares` float32 [N], which sum to 1."""

    colours: np.ndarray
    shares: np.ndarray
    kind: ClassVar[str] = "palette"

    def __post_init__(self):
        colours, shares = np.asarray(self.colours, np.uint8), np.asarray(self.shares, np.float32)
        if (
            colours.ndim != 2
            or colours.shape[1] != 3
            or shares.shape != colours.shape[:1]
            or not shares.sum() > 0
        ):
            raise SegmentError(
                f"Palette holds colours [N, 3] and shares [N]; received {colours.shape}, {shares.shape}."
            )
        object.__setattr__(self, "colours", colours)
        object.__setattr__(self, "shares", shares / shares.sum())

    @classmethod
    def of(cls, picture):
        """The palette of an Image, by median cut."""
        pixels = picture.to_pil().quantize(MAX_COLOURS, Picture.Quantize.MEDIANCUT)
        table = np.array(pixels.getpalette()).reshape(-1, 3)
        counts, rows = zip(*sorted(pixels.getcolors(), reverse=True), strict=True)
        return cls(table[list(rows)], np.array(counts))

    @classmethod
    def open(cls, path):
        """The palette of a picture's file, or one saved as JSON."""
        if Path(path).suffix != ".json":
            return cls.of(Image.open(path))
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def save(self, path):
        """Write JSON."""
        Path(path).write_text(json.dumps({"colours": self.colours.tolist(), "shares": self.shares.tolist()}))
        return Path(path)

    def __eq__(self, other):
        return isinstance(other, Palette) and all(
            np.array_equal(a, b) for a, b in ((self.colours, other.colours), (self.shares, other.shares))
        )

    def __hash__(self):
        return hash(self.colours.tobytes())

    def to_image(self):
        """Bars as wide as the shares."""
        edges = (64 * np.cumsum(self.shares)).round().astype(int)
        return Image(
            self.colours[np.searchsorted(edges[:-1], np.arange(64), side="right")][None].repeat(64, 0)
        )


@register_modality
class PaletteTokenizer(ModalityTokenizer):
    """One frame a colour: its code, and its share in sixteenths."""

    kind = "palette"
    segment_type = Palette

    def __init__(self, width: int = 64, codebook_size: int = 256):
        config = {"width": width, "codebook_size": codebook_size}
        shape = CodeSequence(1, MAX_COLOURS, num_codebooks=2)
        super().__init__(shape=shape, codebook_sizes=[codebook_size, SHARES], config=config)
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 8))
        self.quantize = Quantizer(8, "vq", codebook_size=codebook_size)
        self.decoder = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 3))

    def training_loss(self, batch):
        """batch: colours [B, N, 3] in [-1, 1]."""
        quantized = self.quantize(self.encoder(batch))
        loss = F.mse_loss(self.decoder(quantized.vectors), batch)
        return loss + 0.2 * quantized.loss, {"error_of_255": 127.5 * loss.item() ** 0.5}

    @torch.inference_mode()
    def encode(self, segment):
        """Codes [N, 2]; TokenizerError for more than seven colours."""
        self.check_segment(segment)
        if len(segment.colours) > MAX_COLOURS:
            raise TokenizerError(
                f"A palette has at most {MAX_COLOURS} colours; received {len(segment.colours)}."
            )
        order = np.argsort(-segment.shares, kind="stable")
        colours = torch.from_numpy(segment.colours[order].astype(np.float32) / 127.5 - 1)
        shares = np.clip(np.round(segment.shares[order] * SHARES) - 1, 0, SHARES - 1).astype(np.int64)
        return Codes(np.column_stack([self.quantize(self.encoder(colours[None])).codes[0].numpy(), shares]))

    @torch.inference_mode()
    def decode(self, codes):
        """Colours, and shares that sum to 1."""
        self.check_codes(codes)
        colours = self.decoder(self.quantize.lookup(torch.from_numpy(codes.values[None, :, :1])))[0]
        return Palette(((colours.clamp(-1, 1) + 1) * 127.5).round().numpy(), codes.values[:, 1] + 1)

    def training_batches(self, source, batch_size, seed):
        """Palettes of sprites on white, their colours in one row."""
        sprites, rows = _sprites(source, held_out=False)

        def batch(step):
            rng = np.random.default_rng((seed, step))
            chosen = [rows[i]["row"] for i in rng.integers(len(rows), size=batch_size)]
            colours = [_on_white(sprites[row]).colours for row in chosen]
            return torch.from_numpy(np.concatenate(colours)[None].astype(np.float32) / 127.5 - 1)

        return batch

    def held_out(self, source):
        """Palettes of concepts that were held out, grouped by style."""
        sprites, rows = _sprites(source, held_out=True)
        return [(line["style"], _on_white(sprites[line["row"]])) for line in rows]

    def distortion(self, original, decoded):
        """Root mean square error of colours, of 255, and mean error of shares."""
        order = np.argsort(-original.shares, kind="stable")
        colours = original.colours[order].astype(float) - decoded.colours
        shares = np.abs(original.shares[order] - decoded.shares)
        return {
            "colour error, of 255": float(np.sqrt((colours**2).mean())),
            "share error": float(shares.mean()),
        }

    def codebook_vectors(self, codebook=0):
        """Learned vectors of the colours [K, 8]; the shares [16, 1] as they are."""
        return self.quantize.codebook() if codebook == 0 else torch.linspace(-1, 1, SHARES)[:, None]


def _sprites(source, held_out):
    """Sprites uint8 [R, 64, 64, 4], and the lines of the index beside them on one side of the split."""
    index = Path(source).with_suffix(".jsonl")
    if not (Path(source).is_file() and index.is_file()):
        raise TokenizerError(
            f"{source} or {index.name} is missing: build the set with `anytoken data emoji` first."
        )
    lines = read_json_lines(index)
    return np.load(source, mmap_mode="r"), [line for line in lines if line["tokenizer_held_out"] == held_out]


def _on_white(sprite):
    alpha = sprite[..., 3:].astype(np.float32) / 255
    return Palette.of(Image((sprite[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)))
