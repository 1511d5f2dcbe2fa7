"""Spoken names of the emoji concepts, said by real synthesis engines at 16 kHz.

flite (voices slt, kal16; awb and rms for tests only) and espeak-ng, both Debian packages. The speech is
synthetic, and cards say so. Every usable concept is spoken for the codec; the core concepts are spoken at
several rates for the language model. Whole voices (awb, rms) and some (concept, voice) pairs are held out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anytoken.data import splits
from anytoken.data.emoji import write_lines
from anytoken.segments import Speech

RATE_HZ, PEAK, MARGIN_SECONDS = 16_000, 0.7, 0.04
TRAIN_FLITE, TEST_FLITE = ("slt", "kal16"), ("awb", "rms")
ESPEAK = ("en-us", "en-gb", "en-us+f3")
STRETCHES = (1.0, 0.9, 1.15)
TEST_EXTRA_NAMES = 200


class SpeechSetError(ValueError):
    """The speech set cannot be built: an engine or the concepts are missing, or an engine failed."""


@dataclass(frozen=True)
class Utterance:
    """One rendering to be made: `stretch` multiplies the duration."""

    text: str
    hexcode: str
    core: bool
    voice: str
    stretch: float

    @property
    def path(self) -> Path:
        """Where it goes, relative to the set's folder."""
        voice = self.voice.replace("+", "_")
        return Path("audio") / voice / f"{self.hexcode}-{round(self.stretch * 100)}.flac"

    @property
    def holdout(self) -> str | None:
        """Why it is of the test split, or None."""
        if self.voice in TEST_FLITE:
            return "voice"
        return "spoken" if splits.spoken_held_out(self.hexcode, self.voice) else None


def build_speech(
    out: Path, emoji_dir: Path, cache: Path | None = None, workers: int = 2, limit: int | None = None,
    progress: bool = True,
) -> Path:
    """Build OUT/speech from the concepts of a built emoji set; returns the folder.

    Finished clips are kept, so an interrupted build goes on. `limit` renders only so many clips. `cache` is
    unused: the engines are installed programs. SpeechSetError if flite or espeak-ng is missing.
    """  # fmt: skip
    folder = Path(out) / "speech"
    concepts = Path(emoji_dir) / "concepts.jsonl"
    if not concepts.is_file():
        raise SpeechSetError(f"{concepts} is missing: build the emoji set first (anytoken data emoji --out DIR).")
    for program in ("flite", "espeak-ng"):
        if shutil.which(program) is None:
            raise SpeechSetError(f"{program} is not installed; install the Debian package of that name.")
    jobs = list(plan(json.loads(line) for line in concepts.read_text().splitlines()))[:limit]
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        seconds = list(
            tqdm(pool.map(partial(_render, folder), jobs, chunksize=16), total=len(jobs), desc="speech", disable=not progress)
        )
    lines = [_line(job, length) for job, length in zip(jobs, seconds, strict=True)]
    write_lines(folder / "speech.jsonl", lines)
    _pack(folder, lines)
    _write_manifest(folder, lines)
    return folder


def plan(concepts: Iterator[dict[str, Any]]) -> Iterator[Utterance]:
    """Which names are said by which voice at which rate."""
    extra = 0
    for one in concepts:
        say = partial(Utterance, one["name"], one["hexcode"], one["core"])
        for voice in TRAIN_FLITE:
            yield from (say(voice, stretch) for stretch in (STRETCHES if one["core"] else STRETCHES[:1]))
        if one["core"] or splits.fraction(one["hexcode"], "espeak") < 0.3:
            yield from (say(voice, 1.0) for voice in ESPEAK)
        extra += not one["core"]
        if one["core"] or extra <= TEST_EXTRA_NAMES:
            yield from (say(voice, 1.0) for voice in TEST_FLITE)


def synthesize(text: str, voice: str, stretch: float = 1.0) -> Speech:
    """Say `text` with a flite or espeak-ng voice: 16 kHz, peak 0.7, outer silence trimmed to 40 ms."""
    with tempfile.TemporaryDirectory() as scratch:
        wav = Path(scratch) / "out.wav"
        if voice in TRAIN_FLITE + TEST_FLITE:
            command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", str(wav)]
        else:
            command = ["espeak-ng", "-v", voice, "-s", str(round(160 / stretch)), "-w", str(wav), text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not wav.is_file():
            raise SpeechSetError(f"{' '.join(command[:3])} failed on {text!r}: {done.stderr.strip()[-200:]}")
        return trim(Speech.open(wav).resample(RATE_HZ))


def trim(speech: Speech) -> Speech:
    """Peak-normalise to 0.7 and keep 40 ms around what is louder than a hundredth of the peak."""
    samples = speech.samples * (PEAK / max(float(np.abs(speech.samples).max()), 1e-6))
    loud = np.flatnonzero(np.abs(samples) > PEAK / 100)
    margin = round(MARGIN_SECONDS * speech.sample_rate_hz)
    first, last = (loud[0], loud[-1]) if len(loud) else (0, len(samples) - 1)
    return Speech(samples[max(0, first - margin) : last + margin + 1], speech.sample_rate_hz)


def _render(folder: Path, job: Utterance) -> float:
    path = folder / job.path
    if not path.is_file():
        synthesize(job.text, job.voice, job.stretch).save(path)
    return Speech.open(path).seconds


def _line(job: Utterance, seconds: float) -> dict[str, Any]:
    return {
        "text": job.text, "speech": str(job.path), "name": job.text, "hexcode": job.hexcode, "core": job.core,
        "voice": job.voice, "rate": job.stretch, "seconds": round(seconds, 3),
        "split": "test" if job.holdout else "train", "holdout": job.holdout,
    }  # fmt: skip


def _pack(folder: Path, lines: list[dict[str, Any]]) -> None:
    """All clips of the training voices, and of the test voices, end to end as int16 arrays for codec training.

    The codec hears every training voice; what is held out of it is whole voices.
    """
    for name, wanted in (("train", False), ("test", True)):
        mine = [line for line in lines if (line["voice"] in TEST_FLITE) == wanted]
        clips = [(Speech.open(folder / line["speech"]).samples * 32767).astype(np.int16) for line in mine]
        np.save(folder / f"{name}_audio.tmp.npy", np.concatenate(clips) if clips else np.zeros(0, np.int16))
        (folder / f"{name}_audio.tmp.npy").replace(folder / f"{name}_audio.npy")


def _write_manifest(folder: Path, lines: list[dict[str, Any]]) -> None:
    minutes: dict[str, float] = {}
    for line in lines:
        minutes[line["voice"]] = minutes.get(line["voice"], 0.0) + line["seconds"] / 60
    manifest = {
        "clips": len(lines),
        "test_clips": sum(line["split"] == "test" for line in lines),
        "minutes": {voice: round(value, 1) for voice, value in minutes.items()},
        "engines": {"flite": _version("flite", "--version"), "espeak-ng": _version("espeak-ng", "--version")},
        "licences": {"flite": "BSD-like", "espeak-ng": "GPL-3.0 (its audio output is not covered)"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    rows = "\n".join(f"| {voice} | {value} |" for voice, value in manifest["minutes"].items())  # type: ignore[attr-defined]
    (folder / "README.md").write_text(
        f"# Spoken names\n\n{len(lines)} synthetic clips at 16 kHz; voices {' and '.join(TEST_FLITE)} are for tests "
        f"only.\n\n| voice | minutes |\n|---|---|\n{rows}\n"
    )


def _version(program: str, flag: str) -> str:
    done = subprocess.run([program, flag], capture_output=True, text=True, check=False)
    return ((done.stdout or done.stderr).strip().splitlines() or ["unknown"])[0]
