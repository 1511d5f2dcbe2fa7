"""What is held out of training, decided by a hash of the concept's code point (or a gene's product): fixed once
and never tuned.

Each purpose hashes on its own, so the hold-outs are independent of each other and of everything else.
"""

from __future__ import annotations

import hashlib

STYLE_SHARE, VIDEO_SHARE, PAIR_SHARE, SPOKEN_SHARE, TOKENIZER_SHARE = 0.20, 0.10, 0.10, 0.20, 0.20
GENE_SHARE, LAYOUT_SHARE = 0.10, 0.10
SPOKEN_VOICES = ("kal16", "joe")


def fraction(*keys: str) -> float:
    """A number in [0, 1) that depends on the keys alone."""
    digest = hashlib.sha256("\x1f".join(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def style_held_out(hexcode: str) -> bool:
    """Whether the concept is never seen in 3-D style in training."""
    return fraction(hexcode, "style") < STYLE_SHARE


def video_held_out(hexcode: str) -> bool:
    """Whether the concept is never seen animated in training."""
    return fraction(hexcode, "video") < VIDEO_SHARE


def pair_held_out(hexcode: str, background: str) -> bool:
    """Whether the concept is never seen on this background in training, in any style, still or moving."""
    return fraction(hexcode, background, "pair") < PAIR_SHARE


def layout_held_out(hexcode: str, size: str, place: str) -> bool:
    """Whether the concept is never seen in this size at this place in training."""
    return fraction(hexcode, size, place, "layout") < LAYOUT_SHARE


def spoken_held_out(hexcode: str, voice: str) -> bool:
    """Whether this training voice never says the concept's name in the language model's training."""
    return voice in SPOKEN_VOICES and fraction(hexcode, voice, "spoken") < SPOKEN_SHARE


def tokenizer_held_out(hexcode: str) -> bool:
    """Whether image and video tokenizers never see the concept in any style."""
    return fraction(hexcode, "tokenizer") < TOKENIZER_SHARE


def image_holdout(hexcode: str, style: str, background: str) -> str | None:
    """Why a composed image is of the test split, or None if it is of the training split."""
    if style == "3d" and style_held_out(hexcode):
        return "style"
    return "pair" if pair_held_out(hexcode, background) else None


def video_holdout(hexcode: str, background: str) -> str | None:
    """Why a composed video is of the test split, or None if it is of the training split."""
    if video_held_out(hexcode):
        return "video"
    return "pair" if pair_held_out(hexcode, background) else None


def gene_split(product: str) -> str:
    """ "test" for a tenth of the product texts, else "train"."""
    return "test" if fraction(product, "product") < GENE_SHARE else "train"


def stretch_split(start: int) -> str:
    """ "test" for a tenth of the stretches between genes, by where they start, else "train"."""
    return "test" if fraction(str(start), "intergenic") < GENE_SHARE else "train"
