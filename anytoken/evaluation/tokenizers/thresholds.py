"""What a tokenizer that others can build on has to reach, beside what it was measured to reach.

Each bar is a line with `what`, `ours`, `bar` and `met`; all are at least so much. Figures that were not measured, for
want of a package or a set, have no line.
"""

from __future__ import annotations

from typing import Any

USAGE = 0.95
REAL_TIME = 40.0  # seconds of speech for a second of encoding and decoding, on one thread
# Codes a second from which on a bar holds: share of the words heard in the originals, intelligibility.
SPEECH = ((37.5, {"words_share": 0.97, "stoi": 0.85}), (0.0, {"words_share": 0.92, "stoi": 0.75}))
GENOME_BASES = 10_000_000
Bar = dict[str, Any]


def bars(figures: dict[str, Any]) -> list[Bar]:
    """The bars of a kind with what `measure` found."""
    own = {"image": _pictures, "video": _clips, "speech": _speech, "dna": _dna}.get(figures["kind"])
    usage = _bar("share of all codes that are used", figures["codebook_usage"], USAGE)
    return [*(own(figures) if own else []), usage]


def _bar(what: str, ours: float, bar: float) -> Bar:
    return {"what": what, "ours": ours, "bar": bar, "met": ours >= bar}


def _pictures(figures: dict[str, Any]) -> list[Bar]:
    own, webp = figures["bytes_per_item"], figures["webp_bytes"]
    return [_bar(f"PSNR in dB at {own:.0f} bytes; the bar is WebP's at {webp:.0f}", figures["psnr_db"],
                 figures["webp_psnr_db"])]  # fmt: skip


def _clips(figures: dict[str, Any]) -> list[Bar]:
    return [
        _bar(f"PSNR in dB; the bar is the picture tokenizer's, {title}", figures["psnr_db"],
             figures[f"{name}_psnr_db"])
        for name, title in (("every_frame", "every frame made small"), ("held_frames", "a few frames held"))
        if f"{name}_psnr_db" in figures
    ]  # fmt: skip


def _speech(figures: dict[str, Any]) -> list[Bar]:
    least = next(wanted for rate, wanted in SPEECH if figures["tokens_per_unit"] >= rate)
    titles = {"words_share": "words heard, as a share of the originals'", "stoi": "STOI"}
    found = [_bar(titles[key], figures[key], bar) for key, bar in least.items() if key in figures]
    return [
        *found,
        _bar("times real time, there and back, one thread", figures["units_per_second"], REAL_TIME),
    ]


def _dna(figures: dict[str, Any]) -> list[Bar]:
    if "genome_bases" not in figures:
        return []
    exact = float(figures["genome_exact"])
    return [
        _bar("genomes not trained on that come back exactly (1: all)", exact, 1.0),
        _bar("bases of them", figures["genome_bases"], GENOME_BASES),
    ]
