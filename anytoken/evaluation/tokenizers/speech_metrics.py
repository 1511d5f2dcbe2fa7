"""Speech metrics: recognized words, intelligibility, perceived quality, spectra.

Words: closed-grammar recognition of the reconstructions, as a share of that of the originals. Short-time objective
intelligibility (STOI): Taal et al. 2011. PESQ: ITU-T P.862.2, wide band, from 1 to 4.6. Each needs an optional package
and is left out, with a line in the log, without it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from anytoken.evaluation.keyword_asr import KeywordRecognizer
from anytoken.evaluation.tokenizers.test_sets import TestExample, by_group
from anytoken.segments import Segment, Speech
from anytoken.tokenizers.base import Codes, ModalityTokenizer
from anytoken.tokenizers.speech import SAMPLE_RATE_HZ, LogMel
from anytoken.utils.errors import EvaluationError

RANDOM_ITEMS = 50  # clips decoded from random codes: enough for the mean of a chance baseline
CLIPS_PER_GRAMMAR = 200  # whose names are the choices
OPTIONAL = {"stoi": "pystoi", "pesq": "pesq"}  # measure: package
log = logging.getLogger(__name__)


def speech_metrics(
    tokenizer: ModalityTokenizer,
    items: Sequence[TestExample],
    codes: Sequence[Codes],
    outputs: Sequence[Segment],
    seed: int,
) -> dict[str, Any]:
    """Log-mel error, STOI and PESQ by voice, against what random codes of the same lengths get; and words.

    Clips too short for a measure are not scored by it.
    """
    noise = random_codes(tokenizer, codes[:RANDOM_ITEMS], seed)
    floor = tokenizer.decode_batch(noise)
    found: dict[str, Any] = {}
    measures: dict[str, Callable[[Segment, Segment], float | None]] = {
        "log_mel_l1": _log_mel_l1, "stoi": stoi, "pesq": _pesq,
    }  # fmt: skip
    for name, measure_one in measures.items():
        package = OPTIONAL.get(name)
        if package and not find_spec(package):
            log.warning("%s is not measured: the package %s is missing.", name.upper(), package)
            continue
        scores = [measure_one(item.segment, other) for item, other in zip(items, outputs, strict=True)]
        random = [measure_one(item.segment, other) for item, other in zip(items, floor, strict=False)]
        scored = [(item, score) for item, score in zip(items, scores, strict=True) if score is not None]
        random_scored = [score for score in random if score is not None]
        if scored and random_scored:
            found[f"{name}_items"] = len(scored)
            found[name] = float(np.mean([score for _, score in scored]))
            found[f"{name}_by_group"] = by_group([one for one, _ in scored], [score for _, score in scored])
            found[f"random_codes_{name}"] = float(np.mean(random_scored))
    return found | keyword_accuracy(items, outputs, floor, seed)


def random_codes(tokenizer: ModalityTokenizer, like: Sequence[Codes], seed: int) -> list[Codes]:
    """Codes drawn evenly, local and global ones, of the sizes of others."""
    rng = np.random.default_rng(seed)
    books = tokenizer.codebook_sizes
    return [
        Codes(
            np.stack([rng.integers(0, k, len(one)) for k in books], 1),
            one.size,
            rng.integers(0, max(tokenizer.global_codebook_size, 1), len(one.header)),
        )
        for one in like
    ]


def keyword_accuracy(
    items: Sequence[TestExample], outputs: Sequence[Segment], noise: Sequence[Segment], seed: int
) -> dict[str, Any]:
    """Shares of clips whose name is recognized: of originals, reconstructions and random codes.

    All clips are measured, in seeded parts of at most CLIPS_PER_GRAMMAR; each has a grammar of its own names, since a
    grammar with more names would be a harder test. words_share: accuracy on reconstructions over accuracy on
    originals, overall and by part. Names with words that the recognizer does not know are skipped.
    """
    if not all(item.says_name for item in items):
        log.warning("Words are not measured: what the clips say is not known.")
        return {}
    order = np.random.default_rng((seed, 3)).permutation(len(items))
    tallies, names = [], 0
    for part in np.array_split(order, -(-len(items) // CLIPS_PER_GRAMMAR)):
        try:
            judge = KeywordRecognizer(sorted({items[row].name for row in part}))
        except EvaluationError as error:
            log.warning("Words are not measured: %s", error)
            return {}
        rows = [row for row in part.tolist() if judge.knows(items[row].name)]
        names = max(names, len(judge.names))
        tallies.append([
            sum(_says(judge, clips[row], items[row].name) for row in rows if row < len(clips))
            for clips in ([item.segment for item in items], outputs, noise)
        ] + [len(rows), sum(row < len(noise) for row in rows)])  # fmt: skip
    originals, back, floor, asked, asked_noise = np.sum(tallies, 0).tolist()
    return {
        "words_items": asked, "words_names": names, "words_originals": originals / asked, "words": back / asked,
        "words_share": back / originals if originals else 0.0,
        "words_share_by_part": [part[1] / part[0] if part[0] else 0.0 for part in tallies],
        "random_codes_words": floor / asked_noise if asked_noise else 0.0,
    }  # fmt: skip


def _says(judge: KeywordRecognizer, clip: Segment, name: str) -> bool:
    return isinstance(clip, Speech) and judge.transcribe(clip) == name


def _log_mel_l1(clean: Segment, other: Segment) -> float:
    """Mean difference of natural log-mel energies (1,024 samples every 256 at 16 kHz)."""
    a, b = _alike(clean, other)
    mel = LogMel(1024, 256)
    with torch.inference_mode():
        return F.l1_loss(mel(torch.from_numpy(b)[None]), mel(torch.from_numpy(a)[None])).item()


def stoi(clean: Segment, other: Segment) -> float | None:
    """Short-time objective intelligibility; None for a clip with less speech than it looks at (some 0.4 s)."""
    from pystoi import stoi as intelligibility

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi warns, and returns 1e-5, where it cannot tell
        try:
            return float(intelligibility(*_alike(clean, other), SAMPLE_RATE_HZ))
        except (RuntimeWarning, ValueError):  # a clip of less than one of its frames
            return None


def _pesq(clean: Segment, other: Segment) -> float | None:
    """Perceptual evaluation of speech quality, wide band; None for a clip in which it finds no speech."""
    from pesq import PesqError, pesq

    try:
        return float(pesq(SAMPLE_RATE_HZ, *_alike(clean, other), "wb"))
    except (PesqError, ValueError):
        return None


def _alike(clean: Segment, other: Segment) -> tuple[np.ndarray, np.ndarray]:
    """Samples of both at 16 kHz, as many as the shorter has: decoding pads to whole codes."""
    assert isinstance(clean, Speech) and isinstance(other, Speech)
    a, b = (one.resample(SAMPLE_RATE_HZ).samples for one in (clean, other))
    length = min(len(a), len(b))
    return a[:length], b[:length]
