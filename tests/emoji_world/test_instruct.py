"""Conversations made from sets: reproducible, splits kept apart, answers true to their records."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anytoken.data.sources import read_records
from anytoken.emoji_world.instruct import (
    ABOUT,
    DECLINED,
    LONGEST,
    Maker,
    build_instruct,
    cost,
)
from anytoken.emoji_world.phrases import phrasings
from anytoken.utils.errors import DataError

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
        [
            k
            | {
                "text": f"a {k['name']}, 3d, {background} background",
                "image": f"images/{k['name']}{suffix}.png",
                "style": "3d",
                "background": background,
            }
            for k in known
            for background, suffix in (("red", ""), ("blue", "-blue"))
        ],
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
    genes = [
        {"product": f"enzyme {split} {short}", "dna": "ATGAAA", "short": short, "split": split}
        for split in NAMES
        for short in (True, False)
    ]
    write("dna/genes.jsonl", genes)
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
            names = [Path(part["image"]).stem.removesuffix("-blue") for part in question[:2]]
            assert answer == [{"type": "text", "text": f"a {names[0]} and a {names[1]}"}]
            seen += 1
    assert seen > 5


def test_missing_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images\.jsonl"):
        build_instruct(tmp_path, tmp_path / "out", progress=False)


def spoken(line: dict[str, Any]) -> str:
    return " ".join(
        part["text"]
        for message in line["messages"]
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "text"
    ).casefold()


def test_held_out_phrasings_are_never_trained_on(sets: Path, tmp_path: Path) -> None:
    found = lines(build_instruct(sets, tmp_path / "out", count=1200, progress=False))
    seen = 0
    for purpose in ("draw", "name", "say", "animate", "hear", "watch"):
        held_out = [
            re.compile(r"\b" + ".+".join(map(re.escape, re.split(r"\{\w*\}", one.strip(" .?:").casefold()))))
            for one in phrasings(purpose, held_out=True)
        ]
        for line in (one for one in found if one["purpose"] == purpose):
            used = any(one.search(spoken(line)) for one in held_out)
            assert used == (line["split"] == "test"), spoken(line)
            seen += used
    assert seen > 12


def by_purpose(sets: Path, out: Path) -> dict[str, list[list[dict[str, Any]]]]:
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for line in lines(build_instruct(sets, out, count=1600, progress=False)):
        found.setdefault(line["purpose"], []).append(line["messages"])
    return found


def shown(message: dict[str, Any], kind: str) -> list[str]:
    return [part[kind] for part in message["content"] if part["type"] == kind]


def test_second_turns_name_what_was_shown(sets: Path, tmp_path: Path) -> None:
    found = by_purpose(sets, tmp_path / "out")
    for messages in found["look_back"]:
        image = next(path for message in messages for path in shown(message, "image"))
        assert len(messages) == 4 and not shown(messages[2], "image")
        assert shown(messages[3], "text") == [f"a {Path(image).stem.removesuffix('-blue')}"]
    seconds = [messages for messages in found["again"] if len(messages) == 4]
    assert len(seconds) > 25
    for messages in seconds:
        [image], [text] = shown(messages[2], "image"), shown(messages[3], "text")
        assert text.startswith(f"a {Path(image).stem.removesuffix('-blue')}")


def test_an_image_that_is_held_out_only_as_a_video_is_named_too(sets: Path, tmp_path: Path) -> None:
    joint = {"name": "dog", "image": "images/dog.png", "video": "v/dog.webp", "split": "test"}
    (sets / "emoji" / "joint.jsonl").write_text(json.dumps(joint) + "\n")
    maker = Maker(sets, tmp_path, "test", 0)
    for _ in range(60):
        messages = maker.look_back()
        image = next(path for message in messages for path in shown(message, "image"))
        assert shown(messages[3], "text") == [f"a {Path(image).stem.removesuffix('-blue')}"]


def test_between_speech_and_images_the_name_is_written_first(sets: Path, tmp_path: Path) -> None:
    found = by_purpose(sets, tmp_path / "out")
    for purpose, kind in (("draw_spoken", "image"), ("hear_and_draw", "image"), ("say_seen", "speech")):
        assert len(found[purpose]) > 5
        for asked, answered in found[purpose]:
            assert [part["type"] for part in answered["content"]] == ["text", kind]
            stems = {
                Path(part[part["type"]]).stem.removesuffix("-blue")
                for part in [*asked["content"], *answered["content"]]
                if part["type"] != "text"
            }
            assert stems == set(shown(answered, "text"))


def test_the_same_drawing_on_another_background(sets: Path, tmp_path: Path) -> None:
    for messages in by_purpose(sets, tmp_path / "out")["recolour"]:
        (before,), (after,) = shown(messages[1], "image"), shown(messages[3], "image")
        assert before != after and before.replace("-blue", "") == after.replace("-blue", "")
        wanted = "blue" if "-blue" in after else "red"
        assert wanted in shown(messages[2], "text")[0]


def test_conversations_mix_kinds_and_stay_short(sets: Path, tmp_path: Path) -> None:
    chains = by_purpose(sets, tmp_path / "out")["chain"]
    assert max(cost(messages) for messages in chains) <= LONGEST
    assert max(len(messages) for messages in chains) >= 6
    for messages in chains:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)


def test_what_it_cannot_answer_is_declined_with_what_it_can_do(sets: Path, tmp_path: Path) -> None:
    found = by_purpose(sets, tmp_path / "out")
    for purpose, answer in (("who", ABOUT), ("decline", DECLINED)):
        assert found[purpose] and all(shown(one[1], "text") == [answer] for one in found[purpose])
    assert "Draw a fox" in ABOUT and "Draw a fox" in DECLINED


def test_genes_are_asked_for_their_products_if_they_are_short(sets: Path, tmp_path: Path) -> None:
    answers = {shown(one[1], "text")[0] for one in by_purpose(sets, tmp_path / "out")["product"]}
    assert answers == {"enzyme train True", "enzyme test True"}


def test_words_are_said_where_there_are_any(sets: Path, tmp_path: Path) -> None:
    line = {"text": "umbrella stand", "speech": "a/umbrella.flac", "split": "train", "name": "umbrella stand"}
    (sets / "words").mkdir()
    (sets / "words" / "words.jsonl").write_text(json.dumps(line) + "\n")
    said = by_purpose(sets, tmp_path / "out")["say"]
    assert any(shown(one[1], "speech") == ["../sets/words/a/umbrella.flac"] for one in said)
