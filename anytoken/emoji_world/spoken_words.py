"""Thousands of spoken words and short phrases, so that a small model can learn to read aloud, not to recall names.

The texts are OpenMoji's names and tags, then the most common American words (Debian's wamerican-small, SCOWL size 35),
in an order that a hash decides; whatever holds the name of an emoji concept is left out, for who says those names is
held out with the concepts. Each text is said by a few of all voices and rates, chosen by hash. Held out are a share of
the texts, whoever says them, and two whole voices (awb, rms). The speech is synthetic.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from anytoken.data.dataset_card import write_card, write_lines
from anytoken.emoji_world import splits
from anytoken.emoji_world.packages import sources, unpack
from anytoken.emoji_world.speech import (
    ACCENTS,
    ESPEAK,
    FLITE,
    PIPER,
    PIPER_MODEL,
    PIPER_PACKAGE,
    STRETCHES,
    TEST_FLITE,
    Rendering,
    engine_sources,
    minutes_by_voice,
    read_concepts,
    render_clips,
)
from anytoken.utils.errors import DataError

WORD_LIST = "wamerican-small"
DICTIONARY = "usr/share/dict/american-english-small"
CLEAR = (
    *FLITE,
    "kal",
    PIPER,
)  # one of these says every text, so that it has a voice that is easily understood
VOICES = (*CLEAR, *ESPEAK, *ACCENTS)
WORD_SHARE, TEST_VOICE_TEXTS = 0.05, 400
SPEAKABLE = re.compile(r"[a-z]{2,14}([ -][a-z]{1,14}){0,3}")


class SpokenText(Rendering):
    """A word or short phrase."""

    @property
    def holdout(self) -> str | None:
        return "word" if word_held_out(self.text) else super().holdout


def word_held_out(text: str) -> bool:
    """Whether no training clip says this text."""
    return splits.fraction(text, "word") < WORD_SHARE


def build_words(
    out: Path,
    emoji_dir: Path,
    cache: Path | None = None,
    count: int = 6_000,
    voices: int = 3,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
) -> Path:
    """Build OUT/words: `count` texts, each said by `voices` voices; returns the folder.

    Finished clips are kept, so an interrupted build resumes. `limit` renders only that many clips. DataError if
    an engine, the emoji set or enough texts are missing, or a package cannot be fetched.
    """
    folder = Path(out) / "words"
    cache = Path(cache) if cache else Path(out) / "packages"
    names = {one["name"] for one in read_concepts(emoji_dir)}
    texts = choose_texts(chain(read_labels(cache), read_dictionary(cache)), names, count)
    jobs = list(plan(texts, voices))[:limit]
    voice_model = unpack(PIPER_PACKAGE, cache) / PIPER_MODEL
    lines = render_clips(folder, voice_model, workers, progress, "spoken words", jobs)
    write_lines(folder / "words.jsonl", lines)
    _write_card(folder, lines, cache)
    return folder


def read_labels(cache: Path) -> list[str]:
    """OpenMoji's names and tags in lower case, those of skin tones left out, in an order that a hash decides."""
    table = unpack("openmoji", cache) / "package" / "data" / "openmoji.csv"
    found = set()
    with table.open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if not row["skintone"]:
                parts = [
                    *row["annotation"].split(":"),
                    *row["tags"].split(","),
                    *row["openmoji_tags"].split(","),
                ]
                found |= {part.strip().lower().replace("’", "'") for part in parts}
    return _shuffled(found)


def read_dictionary(cache: Path) -> list[str]:
    """Debian's list of the most common American words, but for names, in an order that a hash decides."""
    return _shuffled((unpack(WORD_LIST, cache) / DICTIONARY).read_text(encoding="utf-8").split())


def choose_texts(candidates: Iterable[str], names: Collection[str], count: int) -> list[str]:
    """The first `count` texts that can be spoken and hold none of the names; DataError if there are fewer."""
    inside = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names)))})\b") if names else re.compile(r"(?!)")
    chosen: dict[str, None] = {}
    for text in candidates:
        if SPEAKABLE.fullmatch(text) and not inside.search(text):
            chosen[text] = None
        if len(chosen) == count:
            return list(chosen)
    raise DataError(f"{count} texts were asked for; the word lists hold {len(chosen)} that can be used.")


def plan(texts: Iterable[str], voices: int) -> Iterator[SpokenText]:
    """Which voices say each text at which rate: first a clear one; then some texts by the held-out voices."""
    texts = list(texts)
    for text in texts:
        order = sorted(VOICES, key=lambda voice: splits.fraction(text, voice, "spoken word"))
        clear = next(voice for voice in order if voice in CLEAR)
        for voice in [clear, *(one for one in order if one != clear)][:voices]:
            rate = STRETCHES[int(splits.fraction(text, voice, "rate") * len(STRETCHES))]
            yield SpokenText(text, voice, rate)
    for text in texts[:TEST_VOICE_TEXTS]:
        for voice in TEST_FLITE:
            yield SpokenText(text, voice, 1.0)


def _shuffled(words: Iterable[str]) -> list[str]:
    return sorted(set(words), key=lambda word: splits.fraction(word, "word order"))


def _write_card(folder: Path, lines: list[dict[str, Any]], cache: Path) -> None:
    minutes = minutes_by_voice(lines)
    texts = {line["text"] for line in lines}
    about = f"""
{len(lines):,} clips of {len(texts):,} words and short phrases, all synthetic: 16 kHz, mono, outer silence trimmed.
Minutes by voice: {", ".join(f"{voice} {value:.1f}" for voice, value in minutes.items())}.
Held out: {WORD_SHARE:.0%} of the texts, whoever says them (`word`), and the voices {" and ".join(TEST_FLITE)} whole
(`voice`). No text holds the name of an emoji concept."""
    facts = {
        "texts": len(texts),
        "minutes": {voice: round(value, 2) for voice, value in minutes.items()},
        "sources": [*engine_sources(), *sources([PIPER_PACKAGE, "openmoji", WORD_LIST], cache)],
    }
    write_card(folder, "Spoken words", about, facts)
