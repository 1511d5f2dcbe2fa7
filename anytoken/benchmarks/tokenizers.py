"""Tokenizers: many items at once against one after the other, and speech against codecs of transformers.

All on one thread, or on a GPU. The codecs have random weights, which are as fast as trained ones: EnCodec (arXiv
2210.13438) and DAC (2306.06546), made small, at the same 50 frames per second of 16 kHz audio with one codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anytoken.benchmarks.harness import Figures, interleaved_timing
from anytoken.segments import DNA, Image, Segment, Speech, Video
from anytoken.tokenizers.base import ModalityTokenizer, load_tokenizer
from anytoken.tokenizers.pretrained import PretrainedSpeech
from anytoken.utils.device import device_name, math_threads, usable_device
from anytoken.utils.errors import EvaluationError

BATCHED = 3.0  # times the speed of one item after the other
RATE_HZ = 16_000
# Both 50 frames per second: 8 * 5 * 4 * 2 = 320 samples.
CODECS: dict[str, dict[str, Any]] = {
    "EnCodec": {
        "model_type": "encodec", "sampling_rate": RATE_HZ, "upsampling_ratios": [8, 5, 4, 2], "num_filters": 8,
        "hidden_size": 32, "codebook_dim": 32, "target_bandwidths": [0.5], "num_lstm_layers": 1,
    },
    "DAC": {
        "model_type": "dac", "sampling_rate": RATE_HZ, "encoder_hidden_size": 8, "decoder_hidden_size": 64,
        "downsampling_ratios": [2, 4, 5, 8], "upsampling_ratios": [8, 5, 4, 2], "n_codebooks": 1,
    },
}  # fmt: skip


def items(kind: str, count: int, seed: int = 0) -> list[Segment]:
    """Random segments of one size: 64x64 images, 8 frames of them, a second of audio, 300 bases."""
    rng = np.random.default_rng(seed)

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, 64, 64, 3), dtype=np.uint8)

    makers = {
        "image": lambda: Image(pixels()),
        "video": lambda: Video(pixels(8)),
        "speech": lambda: Speech(rng.uniform(-0.5, 0.5, RATE_HZ).astype(np.float32), RATE_HZ),
        "dna": lambda: DNA("".join(rng.choice(list("ACGT"), 300))),
    }
    if kind not in makers:
        raise EvaluationError(
            f"There is nothing to time a {kind} tokenizer on; there is for {', '.join(makers)}."
        )
    return [makers[kind]() for _ in range(count)]


def bench_tokenizers(
    folders: Sequence[Path], batches: Sequence[int], repeats: int, device: str = "cpu"
) -> Figures:
    """Rows {tokenizer, what, items/s, peer, peer items/s, ratio, bar, met} for folders and sizes of a batch."""
    place = usable_device(device)
    rows: list[Figures] = []
    with math_threads(1):
        for folder in folders:
            tokenizer = load_tokenizer(folder).to(place)
            found = [row for batch in batches for row in _batched(tokenizer, batch, repeats)]
            if tokenizer.name == "speech":
                found += _beside_codecs(tokenizer, max(batches), repeats)
            rows += [{"tokenizer": folder.as_posix(), **row} for row in found]
    return {
        "batches": list(batches), "repeats": repeats, "codecs": CODECS,
        "threads": 1, "machine": device_name(place), "rows": rows,
    }  # fmt: skip


def _batched(tokenizer: ModalityTokenizer, batch: int, repeats: int) -> list[Figures]:
    segments = items(tokenizer.name, batch)
    codes = tokenizer.encode_batch(segments)
    rows = []
    for verb, given in (("encode", segments), ("decode", codes)):
        one, many = getattr(tokenizer, verb), getattr(tokenizer, f"{verb}_batch")
        sides = {"ours": partial(many, given), "peer": partial(_one_by_one, one, given)}
        what = f"{tokenizer.name}, {verb}, {batch} at once"
        rows.append(_row(what, "one by one", batch, interleaved_timing(sides, repeats), BATCHED))
    return rows


def _one_by_one(work: Callable[[Any], object], given: Sequence[Any]) -> None:
    for each in given:
        work(each)


def _beside_codecs(tokenizer: ModalityTokenizer, batch: int, repeats: int) -> list[Figures]:
    segments, rows = items("speech", batch), []
    for name, config in CODECS.items():
        torch.manual_seed(0)
        codec = PretrainedSpeech(config, num_codebooks=1).eval().to(tokenizer.device)
        for verb in ("encode", "decode"):
            sides = {}
            for side, one in (("ours", tokenizer), ("peer", codec)):
                given = segments if verb == "encode" else one.encode_batch(segments)
                sides[side] = partial(getattr(one, f"{verb}_batch"), given)
            rows.append(
                _row(f"speech, {verb}, {batch} at once", name, batch, interleaved_timing(sides, repeats), 1.0)
            )
    return rows


def _row(what: str, peer: str, batch: int, taken: Mapping[str, float], bar: float) -> Figures:
    ratio = taken["peer"] / taken["ours"]
    return {
        "what": what, "items/s": batch / taken["ours"], "peer": peer, "peer items/s": batch / taken["peer"],
        "ratio": ratio, "bar": bar, "met": ratio >= bar,
    }  # fmt: skip
