"""Conversations made from sets: reproducible, splits kept apart, answers true to their records."""

import json
from pathlib import Path
from typing import Any

import pytest

from anytoken.data.instruct import InstructError, build_instruct
from anytoken.data.sources import read_records

NAMES = {"train": ["red apple", "dog"], "test": ["owl", "eggs"]}


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    root = tmp_path / "sets"

    def write(name: str, records: list[dict[str, Any]]) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    known = [{"name": name, "split": split} for split in NAMES for name in NAMES[split]]
    write(
        "emoji/images.jsonl",
        [k | {"text": f"a {k['name']}, 3d", "image": f"images/{k['name']}.png"} for k in known],
    )
    write(
        "emoji/videos.jsonl",
        [k | {"text": f"a {k['name']}, animated", "video": f"v/{k['name']}.webp"} for k in known],
    )
    write(
        "emoji/joint.jsonl",
        [k | {"image": f"images/{k['name']}.png", "video": f"v/{k['name']}.webp"} for k in known],
    )
    write(
        "speech/speech.jsonl",
        [k | {"text": k["name"], "speech": f"a/{k['name']}.flac", "voice": "slt"} for k in known],
    )
    write("dna/translate.jsonl", [{"text": "M K", "dna": "ATGAAA", "split": split} for split in NAMES])
    write("dna/coding.jsonl", [{"text": "coding", "dna": "ATGAAA", "split": split} for split in NAMES])
    return root


def lines(path: Path) -> list[dict[str, Any]]:
    return list(read_records(path))


def test_every_verb_is_there_and_the_file_can_be_made_again(sets: Path, tmp_path: Path) -> None:
    first = build_instruct(sets, tmp_path / "one", count=600, progress=False)
    again = build_instruct(sets, tmp_path / "two", count=600, progress=False)
    assert first.read_bytes() == again.read_bytes()
    other = build_instruct(sets, tmp_path / "three", count=600, seed=1, progress=False)
    assert other.read_bytes() != first.read_bytes()
    words = first.read_text()
    verbs = (
        "Draw ",
        "What is this?",
        "Describe",
        "What are these",
        "Say ",
        "What was said?",
        "Draw this.",
        "Animate ",
    )
    assert all(
        verb in words for verb in (*verbs, "Animate this.", "What moves here?", "Translate this gene.")
    )
    assert "Write a gene for M K" in words and "Is this coding?" in words


def test_splits_do_not_mix_and_paths_lead_to_the_sets(sets: Path, tmp_path: Path) -> None:
    path = build_instruct(sets, tmp_path / "out", count=400, progress=False)
    for line in lines(path):
        text = json.dumps(line)
        others = NAMES["train" if line["split"] == "test" else "test"]
        assert not any(name in text for name in others)
        for message in line["messages"]:
            for part in message["content"]:
                if part["type"] in ("image", "video", "speech"):
                    assert part[part["type"]].startswith("../sets/")
    assert {line["split"] for line in lines(path)} == {"train", "test"}


def test_answers_are_those_of_the_records(sets: Path, tmp_path: Path) -> None:
    path = build_instruct(sets, tmp_path / "out", count=600, progress=False)
    seen = 0
    for line in lines(path):
        question, answer = (message["content"] for message in line["messages"][:2])
        if question[-1].get("text") in ("What are these?", "What are these two?"):
            names = [Path(part["image"]).stem for part in question[:2]]
            assert answer == [{"type": "text", "text": f"a {names[0]} and a {names[1]}"}]
            seen += 1
    assert seen > 5


def test_missing_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(InstructError, match=r"images\.jsonl"):
        build_instruct(tmp_path, tmp_path / "out", progress=False)
