"""Measure a trained tokenizer on held-out data: `anytoken tokenizer eval FOLDER --data data/sets`.

Every figure comes with a baseline: images and clips with other coders (`image_metrics.py`),
speech with the words recognized in the originals and in random codes (`speech_metrics.py`), DNA with every letter
(`dna_metrics.py`), text with one token per byte. By default all held-out items are measured; speeds are those of one
thread. `thresholds.py` holds the figures against what is expected; `card.py` writes a page of them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from anytoken.evaluation.tokenizers.dna_metrics import exact, other_letters, stream_genomes, untrained_genomes
from anytoken.evaluation.tokenizers.image_metrics import image_metrics
from anytoken.evaluation.tokenizers.learnability import learnability
from anytoken.evaluation.tokenizers.speech_metrics import RANDOM_ITEMS, random_codes, speech_metrics
from anytoken.evaluation.tokenizers.test_sets import (
    TestExample,
    by_group,
    file_items,
    held_out_items,
    own_held_out,
)
from anytoken.evaluation.tokenizers.thresholds import bars
from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
from anytoken.tokenizers.base import Codes, ModalityTokenizer, TokenizerError, load_tokenizer
from anytoken.tokenizers.dna.base import DNATokenizerBase
from anytoken.tokenizers.text import FILE as TEXT_FILE
from anytoken.tokenizers.text import TextTokenizer
from anytoken.utils.device import math_threads
from anytoken.utils.git import commit

BATCH = 16
A = TypeVar("A")
B = TypeVar("B")


@dataclass
class EvalResult:
    """The figures, the held-out items, their codes and their reconstructions."""

    tokenizer: ModalityTokenizer | TextTokenizer
    figures: dict[str, Any]
    items: list[TestExample]
    codes: list[list[int]]  # of the first codebook
    outputs: list[Segment]


def measure(
    tokenizer: str | Path,
    data: str | Path,
    count: int | None = None,
    seed: int = 0,
    genomes: Sequence[Path] = (),
    image: str | Path | None = None,
    files: str | None = None,
    learnable: bool = False,
) -> EvalResult:
    """Encode and decode the held-out items of the built sets in `data` (at most `count`): reconstruction, rate, and
    speed on one thread.

    genomes: FASTA files for the streaming test of DNA tokenizers, instead of those of `untrained_genomes`. image: the
    image tokenizer that a video tokenizer is compared with; by default the folder `image` next to it. files: a folder
    or glob under `data`, whose files are measured instead of the sets' items. learnable: whether two small
    language models are trained on the codes besides, which takes minutes (see `learnability`).
    Raises TokenizerError for a folder that holds no tokenizer, or a set that is not there.
    """
    folder, data = Path(tokenizer), Path(data)
    if learnable and ((folder / TEXT_FILE).is_file() or files):
        raise TokenizerError(
            "Learnability is measured on the built sets, of tokenizers with codes: not of text or files."
        )
    with math_threads(1):
        if (folder / TEXT_FILE).is_file():
            if files:
                raise TokenizerError("A text tokenizer is measured on texts of the built sets, not on files.")
            found = _measure_text(TextTokenizer.from_pretrained(folder), data, count, seed)
        else:
            loaded = load_tokenizer(folder)
            if files:
                items = file_items(loaded, data / files, count, seed)
            else:
                items = own_held_out(loaded, data, data / _trained_on(folder), count, seed)
            peer = _image_tokenizer(loaded, folder, image)
            found = measure_codes(loaded, items, seed, genomes or untrained_genomes(data), peer)
        found.figures |= {"seed": seed, "date": date.today().isoformat(), **_circumstances()}
    if learnable and isinstance(found.tokenizer, ModalityTokenizer):
        found.figures["learnability"] = learnability(found.tokenizer, data, seed)
    # What is expected is expected on the sets.
    found.figures |= {"files": files, "bars": []} if files else {"bars": bars(found.figures)}
    return found


def _image_tokenizer(
    loaded: ModalityTokenizer, folder: Path, image: str | Path | None
) -> ModalityTokenizer | None:
    """The image tokenizer that a video tokenizer is compared with; None for other kinds, or if missing."""
    path = Path(image) if image else folder.parent / "image"
    if loaded.name != "video" or not (image or path.is_dir()):
        return None
    peer = load_tokenizer(path)
    if peer.name != "image":
        raise TokenizerError(f"Clips are compared with an image tokenizer; {path} holds one of {peer.name}.")
    return peer


def _trained_on(folder: Path) -> str:
    """The `data` of the training recipe of a tokenizer; "" if unknown."""
    path = folder / "training.json"
    return json.loads(path.read_text(encoding="utf-8"))["recipe"].get("data", "") if path.is_file() else ""


def _circumstances() -> dict[str, Any]:
    """The code and the machine of the measurement."""
    return {
        "commit": commit(),
        "anytoken": version("anytoken"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
    }


def _timed(work: Callable[[list[A]], list[B]], items: Sequence[A]) -> tuple[list[B], float]:
    """Results in order, and seconds taken, in batches; the first item is done once before to warm up."""
    work(list(items[:1]))
    start = time.perf_counter()
    results = [one for i in range(0, len(items), BATCH) for one in work(list(items[i : i + BATCH]))]
    return results, time.perf_counter() - start


def _usage(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    """Share of all codes that the held-out items' frames use, and the perplexity of the distribution of codes [N, Q].

    The perplexity of several codebooks is the geometric mean of theirs.
    """
    return _usage_of([np.bincount(one, minlength=size) for one, size in zip(codes.T, sizes, strict=True)])


def _usage_of(counts: Sequence[np.ndarray]) -> dict[str, Any]:
    """As `_usage`, from the counts [K] of each codebook."""
    shares = [one[one > 0] / one.sum() for one in counts]
    entropy = [-(share * np.log(share)).sum() for share in shares]
    return {
        "codebook_size": len(counts[0]),
        "codes_measured": int(sum(one.sum() for one in counts)),
        "codebook_usage": float(np.concatenate(counts).astype(bool).mean()),
        "code_perplexity": float(np.exp(np.mean(entropy))),
    }


# ---- tokenizers with codes ----


def measure_codes(
    tokenizer: ModalityTokenizer,
    items: list[TestExample],
    seed: int,
    genomes: Sequence[Path] = (),
    image: ModalityTokenizer | None = None,
) -> EvalResult:
    """Encode and decode items that the tokenizer never saw, and measure; `genomes` and `image` as for `measure`."""
    segments = [item.segment for item in items]
    codes, encode_seconds = _timed(tokenizer.encode_batch, segments)
    outputs, decode_seconds = _timed(tokenizer.decode_batch, codes)
    frames = sum(len(one) for one in codes)
    tokens = frames * tokenizer.shape.num_codebooks + len(codes) * tokenizer.shape.num_global_codes
    global_bits = tokenizer.shape.num_global_codes * math.log2(max(tokenizer.global_codebook_size, 1))
    bits = frames * sum(map(math.log2, tokenizer.codebook_sizes)) + len(codes) * global_bits
    amount, unit = _amount(tokenizer, segments, frames)
    figures = {
        "kind": tokenizer.name, "tokenizer": tokenizer.kind, "items": len(items),
        "fingerprint": tokenizer.fingerprint(), "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "shape": tokenizer.shape.to_dict(), "codebook_sizes": list(tokenizer.codebook_sizes),
        **({"global_codebook_size": size} if (size := tokenizer.global_codebook_size) else {}),
        "quantizer": tokenizer.config.get("quantizer", "vq"), "config": tokenizer.config,
        "unit": unit, "units": amount,
        "tokens_per_item": tokens / len(items), "tokens_per_unit": tokens / amount, "bits_per_unit": bits / amount,
        "encode_units_per_second": amount / encode_seconds, "decode_units_per_second": amount / decode_seconds,
        "units_per_second": amount / (encode_seconds + decode_seconds),
        **_usage(np.concatenate([one.values for one in codes]), tokenizer.codebook_sizes),
    }  # fmt: skip
    if isinstance(tokenizer, DNATokenizerBase):
        figures |= {"exact": exact(segments, outputs)} | other_letters(tokenizer, segments)
        if genomes:
            figures |= stream_genomes(tokenizer, genomes)
            counts = figures.pop("genome_counts")
            genes = np.concatenate([one.values[:, 0] for one in codes])
            figures |= _usage_of([counts + np.bincount(genes, minlength=len(counts))])
    elif isinstance(segments[0], Speech):
        figures |= speech_metrics(tokenizer, items, codes, outputs, seed)
    elif isinstance(segments[0], Image | Video):
        figures |= image_metrics(items, outputs, bits / len(items), image, tokens / len(items))
    else:
        figures |= _own_distortion(tokenizer, items, codes, outputs, seed)
    return EvalResult(tokenizer, figures, items, [one.values.ravel().tolist() for one in codes], outputs)


def _own_distortion(
    tokenizer: ModalityTokenizer,
    items: Sequence[TestExample],
    codes: Sequence[Codes],
    outputs: Sequence[Segment],
    seed: int,
) -> dict[str, Any]:
    """Results of the class's own `distortion`, and those of random codes of the same sizes."""
    noise = random_codes(tokenizer, codes[:RANDOM_ITEMS], seed)
    scores = [tokenizer.distortion(item.segment, other) for item, other in zip(items, outputs, strict=True)]
    floor = [
        tokenizer.distortion(item.segment, other)
        for item, other in zip(items, tokenizer.decode_batch(noise), strict=False)
    ]
    columns = {name: [one[name] for one in scores] for name in scores[0]}
    grouped = {name: by_group(items, column) for name, column in columns.items()}
    return {
        "distortion": {name: float(np.mean(column)) for name, column in columns.items()},
        "random_codes_distortion": {name: float(np.mean([one[name] for one in floor])) for name in columns},
        "distortion_by_group": {name: groups for name, groups in grouped.items() if groups},
    }


def _amount(tokenizer: ModalityTokenizer, segments: Sequence[Segment], frames: int) -> tuple[float, str]:
    """The amount of data and its unit, for rates and speeds."""
    if isinstance(segments[0], Speech):
        return sum(one.seconds for one in segments if isinstance(one, Speech)), "second"
    if isinstance(segments[0], DNA):
        return sum(len(one.bases) for one in segments if isinstance(one, DNA)), "base"
    if tokenizer.frame_rate_hz:
        return frames / tokenizer.frame_rate_hz, "second"
    return len(segments), {Image: "image", Video: "clip"}.get(type(segments[0]), tokenizer.name)


# ---- text ----


def _measure_text(tokenizer: TextTokenizer, data: Path, count: int | None, seed: int) -> EvalResult:
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
    return EvalResult(tokenizer, figures, items, ids, [Text(one) for one in back])


def _any_unicode(rng: np.random.Generator) -> list[str]:
    """Strings of characters drawn uniformly from all of Unicode except surrogates."""
    points = rng.integers(0, 0x110000 - 0x800, (500, 40))
    points = np.where(points >= 0xD800, points + 0x800, points)
    return ["".join(map(chr, row)) for row in points.tolist()]
