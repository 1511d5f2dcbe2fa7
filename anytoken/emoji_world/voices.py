"""More voices for a speech tokenizer than the spoken names have: people, and synthetic voices of all kinds.

A codec trained on few voices keeps those and not others. Recordings of people, telephone prompts in five languages
(Debian's asterisk-core-sounds-*-g722: 16 kHz), and emoji names said through the variants of espeak-ng's
voice at many pitches go, with the training voices of the spoken names, into one array. The held-out voices do not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from anytoken.data.dataset_card import read_lines, write_card, write_lines
from anytoken.emoji_world.speech import RATE_HZ, engine_says, trim
from anytoken.segments import Speech
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError

PROMPTS = Path("/usr/share/asterisk/sounds")  # where Debian puts them, a folder for each person and language
PEOPLE = {  # of such a folder: Debian's package, and the licence of what was recorded
    "en_US_f_Allison": ("asterisk-core-sounds-en-g722", "CC-BY-SA-3.0, Allison Smith"),
    "es_MX_f_Allison": ("asterisk-core-sounds-es-g722", "CC-BY-SA-3.0, Allison Smith"),
    "fr_CA_f_June": ("asterisk-core-sounds-fr-g722", "CC-BY-SA-3.0, June Wallack"),
    "it_IT_m_Carlo": ("asterisk-core-sounds-it-g722", "CC-BY-3.0, Carlo Flora"),
    "ru_RU_f_IvrvoiceRU": ("asterisk-core-sounds-ru-g722", "CC-BY-3.0, Maxim Topal"),
}
ABOUT = """The training voices of the spoken names, people that recorded telephone prompts, and emoji names said by the
variants of espeak-ng's voice, one after the other in `audio.npy` (int16, 16 kHz); `audio.jsonl` says where each clip
lies. It is for training speech tokenizers; the held-out voices of the spoken names are not in it."""
LEFT_OUT = ("silence", "robot", "robosoft", "halflife", "whisper", "fast_test", "demonic", "announcement")
NAMES_PER_VARIANT = 6
PITCHES, SPEEDS_WPM = (20, 35, 50, 65, 80), (130, 150, 170, 190)
ENGLISH = ("en-us", "en-gb")
SHORTEST_SECONDS, LONGEST_SECONDS = 0.3, 12.0
Job = tuple[str, str, int, int]  # text, voice, pitch, words per minute


def build_voices(
    out: str | Path,
    prompts: str | Path = PROMPTS,
    workers: int = 2,
    limit: int | None = None,
    progress: bool = True,
) -> Path:
    """Write OUT/voices: audio.npy, int16 at 16 kHz, audio.jsonl, what lies where, and a card; returns the array's path.

    The spoken names of OUT/speech come first, as in its train_audio.npy. limit: maximum number of prompts, and of
    spoken names. DataError if the spoken names, espeak-ng or the prompts are not there.
    """
    spoken, folder, prompts = Path(out) / "speech", Path(out) / "voices", Path(prompts)
    names = spoken / "train_audio.npy"
    if not names.is_file():
        raise DataError(f"{names} is missing: build the spoken names first (anytoken data speech --out DIR).")
    files = [path for path in sorted(prompts.rglob("*.g722")) if not _left_out(path.relative_to(prompts))]
    if not files:
        raise DataError(
            f"{prompts} holds no .g722 files; install Debian's asterisk-core-sounds-en-g722, or -es, -fr, -it, -ru."
        )
    if shutil.which("espeak-ng") is None:
        raise DataError("espeak-ng is not installed; install the Debian package of that name.")
    jobs = list(
        plan(espeak_variants(), sorted({line["text"] for line in read_lines(spoken / "speech.jsonl")}))
    )
    files, jobs = files[:limit], jobs[:limit]
    with ProcessPoolExecutor(workers) as pool:
        made = chain(
            pool.map(read_prompt, files, chunksize=8), pool.map(synthesize_variant, jobs, chunksize=8)
        )
        clips = [*tqdm(made, "voices", len(files) + len(jobs), disable=not progress)]
    voices = [path.relative_to(prompts).parts[0] for path in files] + [job[1] for job in jobs]
    lines, start = read_lines(names.with_suffix(".jsonl")), len(np.load(names, mmap_mode="r"))
    kept = [(voice, clip) for voice, clip in zip(voices, clips, strict=True) if len(clip)]
    for voice, clip in kept:
        lines.append({"voice": voice, "start": start, "samples": len(clip)})
        start += len(clip)
    folder.mkdir(parents=True, exist_ok=True)
    target, audio = folder / "audio.npy", np.concatenate([np.load(names), *[clip for _, clip in kept]])
    write_lines(target.with_suffix(".jsonl"), lines)
    write_file(target, lambda scratch: np.save(scratch, audio))
    people = {path.relative_to(prompts).parts[0] for path in files}
    write_card(folder, "Voices", ABOUT, {"sources": _sources(spoken, people)})
    return target


def _sources(spoken: Path, people: Collection[str]) -> list[dict[str, str]]:
    """What the spoken names are made of, and whose recordings were there."""
    manifest = spoken / "manifest.json"
    found = json.loads(manifest.read_text(encoding="utf-8"))["sources"] if manifest.is_file() else []
    for person in sorted(people):
        package, licence = PEOPLE.get(person, (person, "ask whoever recorded it"))
        found.append({"name": f"{package} ({person})", "version": _version(package), "licence": licence})
    return found


def _version(package: str) -> str:
    if shutil.which("dpkg-query") is None:
        return "not known"
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "not known"


def espeak_variants() -> list[str]:
    """espeak-ng's variants of a voice, but for robots and whispers."""
    listed = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True)
    files = [line.split()[-1] for line in listed.stdout.splitlines()[1:]]
    return sorted({Path(one).name for one in files if not _left_out(Path(one))})


def plan(variants: Sequence[str], names: Sequence[str]) -> Iterator[Job]:
    """Which names each variant says, how high and how fast: the same every time."""
    for variant in variants:
        seed = int.from_bytes(hashlib.sha256(variant.encode()).digest()[:8], "big")
        rng = np.random.default_rng(seed)
        for name in rng.permutation(len(names))[:NAMES_PER_VARIANT]:
            english, pitch, speed = (rng.choice(one) for one in (ENGLISH, PITCHES, SPEEDS_WPM))
            yield names[name], f"{english}+{variant}", int(pitch), int(speed)


def read_prompt(path: Path) -> np.ndarray:
    """A file of G.722 as int16 [T] at 16 kHz, levelled and trimmed; empty if it is too short or too long to use."""
    import av

    with av.open(str(path), format="g722") as container:
        blocks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    samples = np.concatenate([np.zeros(0, np.int16), *blocks])
    if not SHORTEST_SECONDS <= len(samples) / RATE_HZ <= LONGEST_SECONDS:
        return np.zeros(0, np.int16)
    return _packed(trim(Speech(samples.astype(np.float32) / 32768, RATE_HZ)))


def synthesize_variant(job: Job) -> np.ndarray:
    """A name by espeak-ng as int16 [T] at 16 kHz, levelled and trimmed."""
    text, voice, pitch, speed = job
    return _packed(engine_says(["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed)], text))


def _packed(clip: Speech) -> np.ndarray:
    return np.round(clip.samples * 32767).astype(np.int16)


def _left_out(path: Path) -> bool:
    return any(word in path.as_posix().lower().replace("-", "") for word in LEFT_OUT)
