"""How good a trained tokenizer is on what it never saw: `anytoken tokenizer eval FOLDER --data data/sets`.

Every figure comes with what it is to be read against: pictures and clips with their mean colour and with a thumbnail
of as many bits, speech with what random codes give, text with one token a byte. Structural similarity:
Wang et al. 2004; short-time objective intelligibility (STOI): Taal et al. 2011. `cards.py` writes a page of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor
from torch.nn import functional as F

from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
from anytoken.tokenizers.base import Codes, ModalityTokenizer, load_tokenizer
from anytoken.tokenizers.dna import DNATokenizer
from anytoken.tokenizers.dna_letters import DNALetters, read_fasta, to_bases, to_symbols
from anytoken.tokenizers.held_out import HeldOut, held_out_items, own_held_out
from anytoken.tokenizers.speech import SAMPLE_RATE_HZ, LogMel
from anytoken.tokenizers.text import FILE as TEXT_FILE
from anytoken.tokenizers.text import TextTokenizer

BATCH = 16
RANDOM_ITEMS = 50  # speech decoded from random codes: enough for a mean that means "nothing"
log = logging.getLogger(__name__)
A = TypeVar("A")
B = TypeVar("B")


@dataclass
class Measured:
    """The figures, and what they were measured with: the held-out items, the codes of each, and what came back."""

    tokenizer: ModalityTokenizer | TextTokenizer
    figures: dict[str, Any]
    items: list[HeldOut]
    codes: list[list[int]]  # of the first codebook
    outputs: list[Segment]


def measure(
    tokenizer: str | Path, data: str | Path, count: int = 400, seed: int = 0, genomes: Sequence[Path] = ()
) -> Measured:
    """Encode and decode at most `count` held-out items from the built sets in `data`: what the codes keep, how many
    there are, how fast. genomes: FASTA files that a DNA tokenizer streams besides.

    Raises TokenizerError for a folder that holds no tokenizer, or a set that is not there.
    """
    folder, data = Path(tokenizer), Path(data)
    if (folder / TEXT_FILE).is_file():
        found = _measure_text(TextTokenizer.from_pretrained(folder), data, count, seed)
    else:
        loaded = load_tokenizer(folder)
        items = own_held_out(loaded, data, data / _trained_on(folder), count, seed)
        found = measure_codes(loaded, items, data, seed, genomes)
    found.figures |= {"seed": seed, "date": date.today().isoformat(), **_circumstances()}
    return found


def _trained_on(folder: Path) -> str:
    """The `data` of the recipe that a tokenizer was trained by; "" if it does not say."""
    path = folder / "training.json"
    return json.loads(path.read_text(encoding="utf-8"))["recipe"].get("data", "") if path.is_file() else ""


def _circumstances() -> dict[str, Any]:
    """The code and the machine the figures were measured with."""
    return {
        "commit": commit(),
        "anytoken": version("anytoken"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
    }


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" if the library differs from it; None outside one or without git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "anytoken")
    return head and (f"{head}-dirty" if changed else head)


def _git(*words: str) -> str | None:
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _timed(work: Callable[[list[A]], list[B]], items: Sequence[A]) -> tuple[list[B], float]:
    """Results in order, and seconds taken, in batches; the first item is done once before to warm up."""
    work(list(items[:1]))
    start = time.perf_counter()
    results = [one for i in range(0, len(items), BATCH) for one in work(list(items[i : i + BATCH]))]
    return results, time.perf_counter() - start


def _usage(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    """Share of all codes that the held-out items use, and the perplexity of the distribution of codes [N, Q].

    The perplexity of several codebooks is the geometric mean of theirs.
    """
    counts = [np.bincount(one, minlength=size) for one, size in zip(codes.T, sizes, strict=True)]
    shares = [one[one > 0] / one.sum() for one in counts]
    entropy = [-(share * np.log(share)).sum() for share in shares]
    return {
        "codebook_size": sizes[0],
        "codes_measured": codes.size,
        "codebook_usage": float(np.concatenate(counts).astype(bool).mean()),
        "code_perplexity": float(np.exp(np.mean(entropy))),
    }


def _by_group(items: Sequence[HeldOut], scores: Sequence[float]) -> dict[str, float]:
    """Mean score of each group, in alphabetical order; empty if there are no groups."""
    groups = sorted({item.group for item in items if item.group})
    return {
        group: float(np.mean([s for item, s in zip(items, scores, strict=True) if item.group == group]))
        for group in groups
    }


# ---- tokenizers with codes ----


def measure_codes(
    tokenizer: ModalityTokenizer, items: list[HeldOut], data: Path, seed: int, genomes: Sequence[Path] = ()
) -> Measured:
    """Encode and decode items that the tokenizer never saw, and measure; of DNA also genomes, or that of `data`."""
    segments = [item.segment for item in items]
    codes, encode_seconds = _timed(tokenizer.encode_batch, segments)
    outputs, decode_seconds = _timed(tokenizer.decode_batch, codes)
    frames = sum(len(one) for one in codes)
    tokens = frames * tokenizer.shape.num_codebooks
    bits = frames * sum(map(math.log2, tokenizer.codebook_sizes))
    amount, unit = _amount(tokenizer, segments, frames)
    figures = {
        "kind": tokenizer.name, "tokenizer": tokenizer.kind, "items": len(items),
        "fingerprint": tokenizer.fingerprint(), "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "shape": tokenizer.shape.to_dict(), "codebook_sizes": list(tokenizer.codebook_sizes),
        "quantizer": tokenizer.config.get("quantizer", "vq"), "config": tokenizer.config,
        "unit": unit, "units": amount,
        "tokens_per_item": tokens / len(items), "tokens_per_unit": tokens / amount, "bits_per_unit": bits / amount,
        "encode_units_per_second": amount / encode_seconds, "decode_units_per_second": amount / decode_seconds,
        **_usage(np.concatenate([one.values for one in codes]), tokenizer.codebook_sizes),
    }  # fmt: skip
    if isinstance(tokenizer, DNALetters):
        figures |= {"exact": _exact(segments, outputs)} | _other_letters(tokenizer, segments)
        paths = genomes or [path for path in [data / "dna" / "genome_test.fa.gz"] if path.is_file()]
        figures |= stream_genomes(tokenizer, paths) if paths else {}
    elif isinstance(segments[0], Speech):
        figures |= _speech_kept(tokenizer, items, codes, outputs, seed)
    elif isinstance(segments[0], Image | Video):
        figures |= _pictures_kept(items, outputs, bits / len(items))
    else:
        figures |= _own_distortion(tokenizer, items, codes, outputs, seed)
    return Measured(tokenizer, figures, items, [one.values.ravel().tolist() for one in codes], outputs)


def _own_distortion(
    tokenizer: ModalityTokenizer,
    items: Sequence[HeldOut],
    codes: Sequence[Codes],
    outputs: Sequence[Segment],
    seed: int,
) -> dict[str, Any]:
    """The measures of the class's own `distortion`, beside what random codes of the same sizes get."""
    rng = np.random.default_rng(seed)
    noise = [
        Codes(np.stack([rng.integers(0, k, len(one)) for k in tokenizer.codebook_sizes], 1), one.size)
        for one in codes[:RANDOM_ITEMS]
    ]
    scores = [tokenizer.distortion(item.segment, other) for item, other in zip(items, outputs, strict=True)]
    floor = [
        tokenizer.distortion(item.segment, other)
        for item, other in zip(items, tokenizer.decode_batch(noise), strict=False)
    ]
    columns = {name: [one[name] for one in scores] for name in scores[0]}
    grouped = {name: _by_group(items, column) for name, column in columns.items()}
    return {
        "distortion": {name: float(np.mean(column)) for name, column in columns.items()},
        "random_codes_distortion": {name: float(np.mean([one[name] for one in floor])) for name in columns},
        "distortion_by_group": {name: groups for name, groups in grouped.items() if groups},
    }


def _amount(tokenizer: ModalityTokenizer, segments: Sequence[Segment], frames: int) -> tuple[float, str]:
    """How much there is, in the unit tokens and speed are given in."""
    if isinstance(segments[0], Speech):
        return sum(one.seconds for one in segments if isinstance(one, Speech)), "second"
    if isinstance(segments[0], DNA):
        return sum(len(one.bases) for one in segments if isinstance(one, DNA)), "base"
    if tokenizer.frame_rate_hz:
        return frames / tokenizer.frame_rate_hz, "second"
    return len(segments), {Image: "picture", Video: "clip"}.get(type(segments[0]), tokenizer.name)


# ---- pictures and clips ----


def frames_of(segment: Segment) -> np.ndarray:
    """Pixels uint8 [T, H, W, 3] of a picture (T = 1), a clip, or a segment that has `to_image`."""
    picture = segment.to_image() if hasattr(segment, "to_image") else segment
    assert isinstance(picture, (Image, Video))
    return picture.pixels[None] if isinstance(picture, Image) else picture.frames


def _pictures_kept(items: Sequence[HeldOut], segments: Sequence[Segment], bits: float) -> dict[str, Any]:
    """PSNR and SSIM at the size of the originals, beside their mean colour and a thumbnail of `bits` bits."""
    originals = [frames_of(item.segment) for item in items]
    outputs = [_at_size(frames_of(one), a.shape) for one, a in zip(segments, originals, strict=True)]
    psnr = [psnr_db(a, b) for a, b in zip(originals, outputs, strict=True)]
    flat = [np.broadcast_to(a.mean((0, 1, 2)).round().astype(np.uint8), a.shape) for a in originals]
    thumbnails = [_thumbnail(a, bits) for a in originals]
    found = {
        "psnr_db": float(np.mean(psnr)),
        "ssim": float(np.mean([ssim(a, b) for a, b in zip(originals, outputs, strict=True)])),
        "psnr_db_by_group": _by_group(items, psnr),
    }
    for name, others in (("mean_colour", flat), ("thumbnail", thumbnails)):
        pairs = list(zip(originals, others, strict=True))
        found[f"{name}_psnr_db"] = float(np.mean([psnr_db(a, b) for a, b in pairs]))
        found[f"{name}_ssim"] = float(np.mean([ssim(a, b) for a, b in pairs]))
    return found


def _at_size(frames: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Frames as they are, or scaled to [T, H, W, 3] of another height and width where a tokenizer has its own."""
    return np.stack([Image(frame).resize(*shape[1:3]).pixels for frame in frames])


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two arrays of uint8 in dB; at most 108 dB, which stands for equal ones."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * math.log10(255**2 / max(error, 1e-6))


def _thumbnail(frames: np.ndarray, bits: float) -> np.ndarray:
    """The frames' mean scaled down to as many bits of 8-bit colour as the codes have, and up again."""
    side = max(1, math.isqrt(int(bits // 24)))
    mean = Picture.fromarray(frames.mean(0).round().astype(np.uint8))
    small = mean.resize((side, side), Picture.Resampling.BOX)
    back = np.asarray(small.resize(mean.size, Picture.Resampling.BICUBIC))
    return np.broadcast_to(back, frames.shape)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
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


def _brightness(frames: np.ndarray) -> Tensor:
    weights = np.array([0.299, 0.587, 0.114]) / 255
    return torch.from_numpy(frames.astype(np.float64) @ weights)[:, None]


# ---- speech ----


def _speech_kept(
    tokenizer: ModalityTokenizer,
    items: Sequence[HeldOut],
    codes: Sequence[Codes],
    outputs: Sequence[Segment],
    seed: int,
) -> dict[str, Any]:
    """Log-mel error and STOI by voice, beside what random codes of the same lengths get.

    STOI needs pystoi (the `eval` extra) and is left out without it; clips too short for it are not scored.
    """
    rng = np.random.default_rng(seed)
    size = tokenizer.codebook_sizes[0]
    noise = [tokenizer.decode(Codes(rng.integers(0, size, one.values.shape))) for one in codes[:RANDOM_ITEMS]]
    found: dict[str, Any] = {}
    measures: dict[str, Callable[[Segment, Segment], float | None]] = {"log_mel_l1": _log_mel_l1}
    if find_spec("pystoi"):
        measures["stoi"] = _stoi
    else:
        log.warning("STOI is not measured: pystoi is missing (pip install 'anytoken[eval]').")
    for name, measure_one in measures.items():
        scores = [measure_one(item.segment, other) for item, other in zip(items, outputs, strict=True)]
        floor = [measure_one(item.segment, other) for item, other in zip(items, noise, strict=False)]
        scored = [(item, score) for item, score in zip(items, scores, strict=True) if score is not None]
        floor_scored = [score for score in floor if score is not None]
        if scored and floor_scored:
            found[f"{name}_items"] = len(scored)
            found[name] = float(np.mean([score for _, score in scored]))
            found[f"{name}_by_group"] = _by_group([one for one, _ in scored], [score for _, score in scored])
            found[f"random_codes_{name}"] = float(np.mean(floor_scored))
    return found


def _log_mel_l1(clean: Segment, other: Segment) -> float:
    """Mean difference of natural log-mel energies (1,024 samples every 256 at 16 kHz)."""
    a, b = _alike(clean, other)
    mel = LogMel(1024, 256)
    with torch.inference_mode():
        return F.l1_loss(mel(torch.from_numpy(b)[None]), mel(torch.from_numpy(a)[None])).item()


def _stoi(clean: Segment, other: Segment) -> float | None:
    """Short-time objective intelligibility; None for a clip with less speech than it looks at (some 0.4 s)."""
    from pystoi import stoi

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi warns, and returns 1e-5, where it cannot tell
        try:
            return float(stoi(*_alike(clean, other), SAMPLE_RATE_HZ))
        except RuntimeWarning:
            return None


def _alike(clean: Segment, other: Segment) -> tuple[np.ndarray, np.ndarray]:
    """Samples of both at 16 kHz, as many as the shorter has: decoding pads to whole codes."""
    assert isinstance(clean, Speech) and isinstance(other, Speech)
    a, b = (one.resample(SAMPLE_RATE_HZ).samples for one in (clean, other))
    length = min(len(a), len(b))
    return a[:length], b[:length]


# ---- DNA ----


def _exact(segments: Sequence[Segment], outputs: Sequence[Segment]) -> float:
    """Share of items that came back letter for letter."""
    pairs = zip(segments, outputs, strict=True)
    return float(
        np.mean([isinstance(a, DNA) and isinstance(b, DNA) and a.bases == b.bases for a, b in pairs])
    )


def _other_letters(tokenizer: DNALetters, segments: Sequence[Segment]) -> dict[str, float]:
    """Shares of items that come back as documented once some of their letters are changed.

    with_n_exact: a tenth of the letters made N; they stay N. lower_case_as_upper: the lower-case sequence comes
    back in upper case. other_iupac_as_n: A written as R comes back as N.
    """
    bases = [one.bases for one in segments if isinstance(one, DNA)]

    def share(change: Callable[[str], str], expected: Callable[[str], str]) -> float:
        # Streamed, since N may take more codes than a segment holds.
        back = ["".join(tokenizer.decode_stream(tokenizer.encode_stream([change(one)]))) for one in bases]
        return float(np.mean([expected(one) == other for one, other in zip(bases, back, strict=True)]))

    def with_n(one: str) -> str:
        return "".join("N" if i % 10 == 9 else base for i, base in enumerate(one))

    windows = {"windows_lost": len(tokenizer.verify().wrong)} if isinstance(tokenizer, DNATokenizer) else {}
    return windows | {
        "with_n_exact": share(with_n, with_n),
        "lower_case_exact": share(str.lower, str.lower),
        "lower_case_as_upper": share(str.lower, str),
        "other_iupac_as_n": share(lambda one: one.replace("A", "R"), lambda one: one.replace("A", "N")),
    }


def stream_genomes(tokenizer: DNALetters, paths: Sequence[Path]) -> dict[str, Any]:
    """Genomes through the streaming interface, in constant memory: exact or not, how many codes, how fast.

    Exact: the letters, upper case, U as T and what is none of A C G T as N, have one sha256 before and after.
    """
    bases = tokens = 0
    exact, encoding, decoding = True, 0.0, 0.0
    for path in paths:
        wanted, found = hashlib.sha256(), hashlib.sha256()
        for _, _, piece in read_fasta(path):
            wanted.update(to_bases(to_symbols(piece)).encode())
            bases += len(piece)
        clock = time.perf_counter()
        for _, stream in tokenizer.encode_fasta(path):
            for codes in stream:
                middle = time.perf_counter()
                (letters,) = tokenizer.decode_stream([codes])
                found.update(letters.encode())
                tokens += len(codes)
                encoding, decoding = encoding + middle - clock, decoding + time.perf_counter() - middle
                clock = time.perf_counter()
        exact = exact and wanted.digest() == found.digest()
    return {
        "genome_bases": bases,
        "genome_exact": exact,
        "genome_tokens_per_base": tokens / bases,
        "stream_encode_bases_per_second": bases / encoding,
        "stream_decode_bases_per_second": bases / decoding,
    }


# ---- text ----


def _measure_text(tokenizer: TextTokenizer, data: Path, count: int, seed: int) -> Measured:
    items = held_out_items("text", data, count, seed)
    texts = [item.name for item in items]
    ids, encode_seconds = _timed(lambda some: [tokenizer.encode(one) for one in some], texts)
    back, decode_seconds = _timed(lambda some: [tokenizer.decode(one) for one in some], ids)
    size = [len(one.encode()) for one in texts]
    tokens = [len(one) for one in ids]
    groups = sorted({item.group for item in items})
    inside = {g: [i for i, item in enumerate(items) if item.group == g] for g in groups}
    stress = _any_unicode(np.random.default_rng((seed, 2)))
    stress_ids = [tokenizer.encode(one) for one in stress]
    figures = {
        "kind": "text", "tokenizer": "text", "items": len(items),
        "fingerprint": tokenizer.fingerprint(), "parameters": 0,
        "shape": {"type": "ids"}, "codebook_sizes": [tokenizer.vocab_size], "unit": "byte", "units": sum(size),
        "tokens_per_item": sum(tokens) / len(items), "tokens_per_unit": sum(tokens) / sum(size),
        "bits_per_unit": sum(tokens) / sum(size) * math.log2(tokenizer.vocab_size),
        "encode_units_per_second": sum(size) / encode_seconds, "decode_units_per_second": sum(size) / decode_seconds,
        **_usage(np.concatenate([np.array(one) for one in ids])[:, None], [tokenizer.vocab_size]),
        "exact": float(np.mean([a == b for a, b in zip(texts, back, strict=True)])),
        "bytes_per_token": sum(size) / sum(tokens),
        "bytes_per_token_by_group": {
            g: sum(size[i] for i in rows) / sum(tokens[i] for i in rows) for g, rows in inside.items()
        },
        "any_unicode_strings": len(stress),
        "any_unicode_exact": float(
            np.mean([tokenizer.decode(one) == text for one, text in zip(stress_ids, stress, strict=True)])
        ),
        "any_unicode_bytes_per_token": sum(len(one.encode()) for one in stress) / sum(map(len, stress_ids)),
    }  # fmt: skip
    return Measured(tokenizer, figures, items, ids, [Text(one) for one in back])


def _any_unicode(rng: np.random.Generator, count: int = 500, length: int = 40) -> list[str]:
    """Strings of characters drawn evenly from all of Unicode but the surrogates, which are no characters."""
    points = rng.integers(0, 0x110000 - 0x800, (count, length))
    points = np.where(points >= 0xD800, points + 0x800, points)
    return ["".join(map(chr, row)) for row in points.tolist()]
