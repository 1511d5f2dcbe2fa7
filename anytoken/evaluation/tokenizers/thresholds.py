"""Quality thresholds of a tokenizer, compared with its figures.

Each threshold is a dict with `what`, `ours`, `bar` and `met`; all are lower bounds. Figures that were not measured,
because a package or a set is missing, have none.
"""

from __future__ import annotations

from typing import Any

USAGE = 0.95
REAL_TIME = 40.0  # seconds of speech for a second of encoding and decoding, on one thread
# From this code rate (codes per second) on: keyword accuracy relative to the originals, STOI.
SPEECH = ((37.5, {"words_share": 0.97, "stoi": 0.85}), (0.0, {"words_share": 0.92, "stoi": 0.75}))
GENOME_BASES = 10_000_000
Bar = dict[str, Any]


def bars(figures: dict[str, Any]) -> list[Bar]:
    """The thresholds of a kind, checked against the figures of `measure`."""
    own = {"image": _images, "video": _clips, "speech": _speech, "dna": _dna}.get(figures["kind"])
    usage = _bar("codebook usage", figures["codebook_usage"], USAGE)
    return [*(own(figures) if own else []), usage]


def _bar(what: str, ours: float, bar: float) -> Bar:
    return {"what": what, "ours": ours, "bar": bar, "met": ours >= bar}


def _images(figures: dict[str, Any]) -> list[Bar]:
    own, webp = figures["bytes_per_item"], figures["webp_bytes"]
    return [_bar(f"PSNR in dB at {own:.0f} bytes; threshold: WebP at {webp:.0f} bytes", figures["psnr_db"],
                 figures["webp_psnr_db"])]  # fmt: skip


def _clips(figures: dict[str, Any]) -> list[Bar]:
    return [
        _bar(f"PSNR in dB; threshold: the image tokenizer, {title}", figures["psnr_db"],
             figures[f"{name}_psnr_db"])
        for name, title in (("every_frame", "every frame scaled down"), ("held_frames", "a few frames held"))
        if f"{name}_psnr_db" in figures
    ]  # fmt: skip


def _speech(figures: dict[str, Any]) -> list[Bar]:
    least = next(wanted for rate, wanted in SPEECH if figures["tokens_per_unit"] >= rate)
    titles = {"words_share": "keyword accuracy relative to the originals", "stoi": "STOI"}
    found = [_bar(titles[key], figures[key], bar) for key, bar in least.items() if key in figures]
    return [
        *found,
        _bar("encode and decode speed, times real time, one thread", figures["units_per_second"], REAL_TIME),
    ]


def _dna(figures: dict[str, Any]) -> list[Bar]:
    if "genome_bases" not in figures:
        return []
    exact = float(figures["genome_exact"])
    return [
        _bar("held-out genomes reconstructed exactly (1: all)", exact, 1.0),
        _bar("bases in these genomes", figures["genome_bases"], GENOME_BASES),
    ]
