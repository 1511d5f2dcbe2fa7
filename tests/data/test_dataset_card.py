"""What a set says of itself: files that appear whole, sums that notice every change, a card that counts right."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anytoken.data.dataset_card import checksums, read_lines, write_card, write_lines

FACTS = {"things": 3, "sources": [{"name": "openmoji", "version": "17.0.0", "licence": "CC-BY-SA-4.0"}]}


def a_set(folder: Path) -> Path:
    (folder / "images" / "deep").mkdir(parents=True)
    (folder / "images" / "one.png").write_bytes(b"one")
    (folder / "images" / "deep" / "two.png").write_bytes(b"two")
    write_lines(
        folder / "images.jsonl", [{"image": "images/one.png", "split": split} for split in ("train", "test")]
    )
    write_lines(folder / "concepts.jsonl", [{"name": "owl"}])
    return folder


def test_lines_come_back_as_they_were(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"text": "piñata, 3d"},
        {"text": 'a "quoted"\nline\r\n'},
        {"text": "separators: \u2028 \u2029 \x85 \x1c"},
        {"count": 1, "none": None},
    ]
    write_lines(tmp_path / "set.jsonl", lines)
    assert read_lines(tmp_path / "set.jsonl") == lines
    assert "piñata" in (tmp_path / "set.jsonl").read_text(encoding="utf-8")
    write_lines(tmp_path / "none.jsonl", [])
    assert read_lines(tmp_path / "none.jsonl") == []


def test_an_interrupted_writer_leaves_the_old_file(tmp_path: Path) -> None:
    def lines() -> Iterator[dict[str, Any]]:
        yield {"text": "new"}
        raise KeyboardInterrupt

    write_lines(tmp_path / "set.jsonl", [{"text": "old"}])
    with pytest.raises(KeyboardInterrupt):
        write_lines(tmp_path / "set.jsonl", lines())
    assert read_lines(tmp_path / "set.jsonl") == [{"text": "old"}]


def test_card_and_manifest_count_lines_and_held_out_lines(tmp_path: Path) -> None:
    folder = a_set(tmp_path / "set")
    write_card(folder, "A set", "\n  Three things.\n", FACTS)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["things"] == 3 and manifest["sources"] == FACTS["sources"]
    assert manifest["files"] == {
        "concepts.jsonl": {"lines": 1, "test": 0},
        "images.jsonl": {"lines": 2, "test": 1},
    }
    assert manifest["sha256"] == checksums(folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("# A set\n\nThree things.\n\n| file ")
    assert "| images.jsonl | 2 | 1 |\n" in card
    assert card.endswith("| openmoji | 17.0.0 | CC-BY-SA-4.0 |\n")
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_sums_are_those_of_the_files(tmp_path: Path) -> None:
    folder = a_set(tmp_path / "set")
    sums = checksums(folder)
    assert list(sums) == ["concepts.jsonl", "images/", "images.jsonl"]
    assert sums["concepts.jsonl"] == hashlib.sha256(b'{"name": "owl"}\n').hexdigest()
    # As `sha256sum` would list the folder from the set's own folder, sorted by name.
    listing = (
        f"{hashlib.sha256(b'two').hexdigest()}  images/deep/two.png\n"
        f"{hashlib.sha256(b'one').hexdigest()}  images/one.png\n"
    )
    assert sums["images/"] == hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize("change", ["content", "name", "more"])
def test_sums_notice_a_change_deep_inside(tmp_path: Path, change: str) -> None:
    folder = a_set(tmp_path / "set")
    before, inside = checksums(folder), folder / "images" / "deep" / "two.png"
    if change == "content":
        inside.write_bytes(b"tow")
    elif change == "name":
        inside.rename(inside.with_name("three.png"))
    else:
        inside.with_name("three.png").write_bytes(b"three")
    after = checksums(folder)
    assert {name for name in before if before[name] != after[name]} == {"images/"}


def test_a_set_can_be_checked_against_its_own_manifest(tmp_path: Path) -> None:
    """Neither the card nor the manifest is among the sums, or writing them would change the sums."""
    folder = a_set(tmp_path / "set")
    before = checksums(folder)
    write_card(folder, "A set", "About.", FACTS)
    assert checksums(folder) == before
    first = (folder / "manifest.json").read_bytes()
    write_card(folder, "A set", "About.", FACTS)
    assert (folder / "manifest.json").read_bytes() == first
