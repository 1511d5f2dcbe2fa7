"""Tokenizers on one GPU: encoding and decoding by those of the bundled model, against transformers' codecs at real
sizes.

Mimi (arXiv 2410.00037), DAC (2306.06546) and Emu3's VQ (2409.18869) have random weights, which do not change their
speed. Speeds are of whole calls, from segments in memory to codes in memory and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from anytoken.benchmarks.gpu_part import Part, Sizes, reason
from anytoken.benchmarks.harness import Figures
from anytoken.benchmarks.tokenizers import items
from anytoken.segments import Image, Segment, Speech
from anytoken.tokenizers.base import ModalityTokenizer, load_tokenizer
from anytoken.tokenizers.pretrained import PretrainedImage, PretrainedSpeech
from anytoken.training.debug_model import CODECS as SMALL
from anytoken.training.initialize import checkpoint_folder

NEEDS = 5.0  # seconds per case, an estimate
BATCHES = (1, 32)
SECONDS = 10  # of a clip of speech
SIDE = 256  # of an image for Emu3
DAC = {"model_type": "dac"}  # transformers' own sizes: 44.1 kHz, 9 codebooks
SMALL_DAC = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 4],
             "upsampling_ratios": [4, 2], "n_codebooks": 2}  # fmt: skip


def own(kind: str) -> ModalityTokenizer:
    """A tokenizer of the bundled model."""
    return load_tokenizer(checkpoint_folder("mini") / "tokenizers" / kind)


def codec(name: str, tiny: bool) -> ModalityTokenizer:
    """A codec of transformers with random weights."""
    torch.manual_seed(0)
    if name == "Mimi":
        return PretrainedSpeech({"model_type": "mimi"} | (SMALL["mimi"] if tiny else {}), num_codebooks=8)
    if name == "DAC":
        return PretrainedSpeech(DAC | (SMALL_DAC if tiny else {}))
    small = SMALL["emu3_vqgan"] if tiny else {}
    return PretrainedImage({"model_type": "emu3_vqgan"} | small, side_px=16 if tiny else SIDE)


def clips(count: int, seconds: float, rate_hz: int) -> list[Segment]:
    """Noise."""
    rng = np.random.default_rng(0)
    length = int(seconds * rate_hz)
    return [Speech(rng.uniform(-0.5, 0.5, length).astype(np.float32), rate_hz) for _ in range(count)]


def images(count: int, side: int) -> list[Segment]:
    """Noise."""
    rng = np.random.default_rng(0)
    return [Image(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def inputs(tokenizer: ModalityTokenizer, count: int, tiny: bool) -> list[Segment]:
    """Inputs of a tokenizer at its own sample rate and size, so that nothing is resampled."""
    if isinstance(tokenizer, PretrainedImage):
        return images(count, tokenizer.side_px)
    rate = getattr(tokenizer, "sample_rate_hz", None)
    if tokenizer.name == "speech" and isinstance(rate, int):
        most = getattr(tokenizer.shape, "max_length", 1) / (tokenizer.frame_rate_hz or 1)
        return clips(count, 0.2 if tiny else min(SECONDS, most), rate)
    return items(tokenizer.name, count)


def measure(part: Part, sizes: Sizes, make: Callable[[], ModalityTokenizer], batch: int) -> Figures:
    """Items per second of encoding and decoding; for speech also seconds of audio per second."""
    tokenizer = make().eval().to(part.device)
    given = inputs(tokenizer, batch, sizes.is_tiny)
    codes = tokenizer.encode_batch(given)
    found: Figures = {}
    for verb, what in (("encode", given), ("decode", codes)):
        work: Callable[[Sequence[Any]], object] = getattr(tokenizer, f"{verb}_batch")
        try:
            seconds = part.time(partial(work, what), sizes.seconds / 2, warmups=1, least=1)
        except (RuntimeError, ValueError) as error:  # encoding is still reported
            found[f"{verb} failed"] = reason(error)
            continue
        found[f"{verb} items/s"] = batch / seconds
        if isinstance(given[0], Speech):
            found[f"{verb} x real time"] = batch * given[0].seconds / seconds
    weights = sum(one.numel() for one in tokenizer.parameters())
    return found | {"M parameters": weights / 1e6}


def bench_codecs(part: Part, sizes: Sizes) -> None:
    """Every tokenizer at every batch size."""
    makers: dict[str, Callable[[], ModalityTokenizer]] = {
        **{f"ours, {kind}": partial(own, kind) for kind in ("image", "speech", "video", "dna")},
        **{name: partial(codec, name, sizes.is_tiny) for name in ("Mimi", "DAC", "Emu3 VQ")},
    }
    for batch in BATCHES[:1] if sizes.is_tiny else reversed(BATCHES):
        for name, make in makers.items():
            needs = 0.0 if sizes.is_tiny else NEEDS
            part.case(
                f"{name}, batch {batch}", needs, partial(measure, part, sizes, make, batch), batch=batch
            )
