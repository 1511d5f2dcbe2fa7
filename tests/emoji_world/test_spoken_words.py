"""Spoken words: which texts, who says them, what is held out; with a stand-in for the engines."""

import csv
import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anytoken.data.dataset_card import read_lines, write_lines
from anytoken.emoji_world import speech, spoken_words
from anytoken.emoji_world.speech import (
    Utterance,
)
from anytoken.emoji_world.spoken_words import (
    CLEAR,
    TEST_FLITE,
    VOICES,
    SpokenText,
    build_words,
    choose_texts,
    plan,
    read_dictionary,
    read_labels,
    word_held_out,
)
from anytoken.utils.errors import DataError

NAMES = {"fox", "red apple", "t-rex"}
TEXTS = [
    f"{first}{last}" for first in ("ba", "ko", "ri", "su", "te") for last in ("la", "mi", "no", "du", "ver")
]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a small OpenMoji and a small dictionary; clips are empty files of half a second."""
    cache = tmp_path / "packages"
    table = cache / "openmoji" / "package" / "data" / "openmoji.csv"
    table.parent.mkdir(parents=True)
    with table.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["annotation", "tags", "openmoji_tags", "skintone"])
        writer.writeheader()
        writer.writerow(
            {"annotation": "Flag: Chad", "tags": "lake, Desert", "openmoji_tags": "", "skintone": ""}
        )
        writer.writerow({"annotation": "fist: dark", "tags": "punch", "openmoji_tags": "", "skintone": "5"})
    words = cache / "wamerican-small" / spoken_words.DICTIONARY
    words.parent.mkdir(parents=True)
    words.write_text("\n".join([*TEXTS, "Aaron", "fox's", "fox"]))
    monkeypatch.setattr(spoken_words, "unpack", lambda name, cache: cache / name)
    monkeypatch.setattr(spoken_words, "sources", lambda names, cache: [])
    monkeypatch.setattr(spoken_words, "engine_sources", lambda: [])
    monkeypatch.setattr(speech, "require_engines", lambda: None)
    monkeypatch.setattr(speech, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(speech, "render", lambda folder, model, job: 0.5)
    (tmp_path / "emoji").mkdir()
    write_lines(tmp_path / "emoji" / "concepts.jsonl", [{"name": name} for name in sorted(NAMES)])
    return cache


def test_texts_can_be_spoken_and_hold_no_name_of_a_concept() -> None:
    odd = [
        "fox",
        "a fox",
        "fox hole",
        "foxes",
        "t-rex park",
        "red",
        "red apples",
        "red apple pie",
        "x",
        "naïve",
        "ab3",
    ]
    assert choose_texts([*odd, "red", "well-known"], NAMES, 4) == ["foxes", "red", "red apples", "well-known"]
    with pytest.raises(DataError, match=r"^5 texts were asked for; the word lists hold 4 "):
        choose_texts([*odd, "well-known"], NAMES, 5)


def test_labels_come_without_skin_tones_and_words_in_an_order_of_their_own(packages: Path) -> None:
    assert sorted(read_labels(packages)) == ["", "chad", "desert", "flag", "lake"]
    found = read_dictionary(packages)
    assert set(TEXTS) <= set(found) and found != sorted(found) and found == read_dictionary(packages)


def test_every_text_has_a_clear_voice_and_all_voices_are_used() -> None:
    said = defaultdict(list)
    for job in plan(TEXTS, 3):
        if job.voice not in TEST_FLITE:
            said[job.text].append(job.voice)
    assert all(len(set(voices)) == 3 and voices[0] in CLEAR for voices in said.values())
    many = [f"{one} {other}" for one in TEXTS for other in TEXTS]
    counts = Counter(job.voice for job in plan(many, 3) if job.voice not in TEST_FLITE)
    assert set(counts) == set(VOICES) and min(counts.values()) > 40
    jobs = list(plan(many, 3))
    assert len({job.path for job in jobs}) == len(jobs)
    assert {job.stretch for job in jobs} == {0.9, 1.0, 1.15}


def test_words_are_held_out_by_whoever_and_two_voices_whole() -> None:
    many = [f"{one} {other}" for one in TEXTS for other in TEXTS]
    share = sum(map(word_held_out, many)) / len(many)
    assert 0.02 < share < 0.09
    for job in plan(many, 3):
        expected = "word" if word_held_out(job.text) else "voice" if job.voice in TEST_FLITE else None
        assert job.holdout == expected
    clash = Utterance("good luck", "slt", 1.0, "1F340", core=False).path
    assert SpokenText("good luck", "slt", 1.0).path != clash


def test_build(packages: Path, tmp_path: Path) -> None:
    folder = build_words(tmp_path, tmp_path / "emoji", packages, count=20, voices=2, progress=False)
    lines = read_lines(folder / "words.jsonl")
    assert len({line["text"] for line in lines}) == 20 and {"chad", "lake"} <= {
        line["text"] for line in lines
    }
    assert len(lines) == 20 * 2 + 20 * len(TEST_FLITE)
    assert all((line["split"] == "test") == bool(line["holdout"]) for line in lines)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["texts"] == 20 and "20 words and short phrases" in (folder / "README.md").read_text()


def test_the_emoji_set_must_be_there(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="build the emoji set first"):
        build_words(tmp_path, tmp_path / "nowhere", packages, progress=False)
