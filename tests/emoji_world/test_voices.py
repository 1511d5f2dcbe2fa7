"""More voices for a speech tokenizer: what is read, said and left out, and what lies where in the array."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from anytoken.data.dataset_card import read_lines, write_lines
from anytoken.emoji_world import voices
from anytoken.emoji_world.voices import (
    NAMES_PER_VARIANT,
    build_voices,
    espeak_variants,
    plan,
    read_prompt,
    synthesize_variant,
)
from anytoken.utils.errors import DataError

NAMES = ["red apple", "snail", "owl"]


def tone(seconds: float, hz: float = 440) -> np.ndarray:
    return (8_000 * np.sin(np.arange(round(seconds * 16_000)) * 2 * np.pi * hz / 16_000)).astype(np.int16)


def write_g722(path: Path, samples: np.ndarray) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def a_set(folder: Path) -> Path:
    """Spoken names as `anytoken data speech` leaves them: one clip of half a second."""
    (folder / "speech").mkdir(parents=True)
    np.save(folder / "speech" / "train_audio.npy", tone(0.5))
    write_lines(folder / "speech" / "train_audio.jsonl", [{"voice": "slt", "start": 0, "samples": 8_000}])
    write_lines(folder / "speech" / "speech.jsonl", [{"text": name} for name in NAMES])
    made_of = {"sources": [{"name": "flite", "version": "2", "licence": "BSD"}]}
    (folder / "speech" / "manifest.json").write_text(json.dumps(made_of))
    return folder


def test_a_prompt_is_read_at_16_khz_and_others_are_passed_over(tmp_path: Path) -> None:
    samples = read_prompt(write_g722(tmp_path / "one.g722", tone(1.0)))
    assert samples.dtype == np.int16 and abs(len(samples) - 16_000) < 800
    spectrum = np.abs(np.fft.rfft(samples[2_000:10_000]))
    assert spectrum.argmax() * 2 == pytest.approx(440, abs=4)  # bins are 2 Hz wide
    for seconds in (0.1, 13.0):
        assert not len(read_prompt(write_g722(tmp_path / f"{seconds}.g722", tone(seconds))))


def test_what_a_throat_says_is_the_same_every_time() -> None:
    names = [f"thing {number}" for number in range(100)]
    jobs = list(plan(["f3", "m1"], names))
    assert jobs == list(plan(["f3", "m1"], names)) and len(set(jobs)) == len(jobs) == 2 * NAMES_PER_VARIANT
    assert {job[1].split("+")[1] for job in jobs} == {"f3", "m1"} and {job[0] for job in jobs} <= set(names)
    assert len({job[2:] for job in jobs}) > 5


def test_people_and_throats_follow_the_spoken_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, prompts = a_set(tmp_path / "sets"), tmp_path / "prompts"
    write_g722(prompts / "anna" / "digits" / "1.g722", tone(1.0, 200))
    write_g722(prompts / "carlo" / "2.g722", tone(0.1, 300))  # too short
    write_g722(prompts / "carlo" / "3.g722", tone(1.0, 600))
    write_g722(prompts / "anna" / "silence" / "1.g722", tone(1.0, 900))
    said = {"f3": 250.0, "m1": 350.0}
    monkeypatch.setattr(voices, "espeak_variants", lambda: list(said))
    monkeypatch.setattr(voices, "synthesize_variant", _say)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    audio = np.load(build_voices(out, prompts, progress=False))
    lines = read_lines(out / "voices" / "audio.jsonl")
    spoken = len(said) * len(NAMES)
    assert [line["voice"] for line in lines[:3]] == ["slt", "anna", "carlo"] and len(lines) == 3 + spoken
    assert lines[-1]["start"] + lines[-1]["samples"] == len(audio) and audio.dtype == np.int16
    for line, hz in zip(lines, [440, 200, 600, *[250] * 3, *[350] * 3], strict=True):
        piece = audio[line["start"] :][: line["samples"]][:4_000].astype(float)
        assert np.abs(np.fft.rfft(piece)).argmax() * 4 == pytest.approx(hz, abs=8)
    assert not list((out / "voices").glob(".*"))
    sources = json.loads((out / "voices" / "manifest.json").read_text())["sources"]
    assert [one["name"] for one in sources] == ["flite", "anna (anna)", "carlo (carlo)"]
    assert "| flite | 2 | BSD |" in (out / "voices" / "README.md").read_text()
    few = build_voices(out, prompts, limit=1, progress=False)
    assert len(read_lines(few.with_suffix(".jsonl"))) == 3


def _say(job: voices.Job) -> np.ndarray:
    return tone(0.5, {"f3": 250.0, "m1": 350.0}[job[1].split("+")[1]])


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="build the spoken names first"):
        build_voices(tmp_path / "none", tmp_path)
    out = a_set(tmp_path / "sets")
    with pytest.raises(DataError, match="asterisk-core-sounds-en-g722"):
        build_voices(out, tmp_path / "empty")
    write_g722(tmp_path / "prompts" / "anna" / "1.g722", tone(1.0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="espeak-ng is not installed"):
        build_voices(out, tmp_path / "prompts")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_real_throats_say_names() -> None:
    found = espeak_variants()
    assert "f3" in found and len(found) > 20 and not [one for one in found if "whisper" in one.lower()]
    low, high = (synthesize_variant(("apple", "en-us+m1", pitch, 150)) for pitch in (20, 80))
    assert min(len(low), len(high)) > 4_000 and not np.array_equal(low, high)
