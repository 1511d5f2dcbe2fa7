"""Records: what is refused and how it is said, and opening their media."""

import copy
from pathlib import Path

import numpy as np
import pytest

from anytoken.data.forms import place_media
from anytoken.data.records import (
    Blob,
    media_parts,
    open_media,
    record_line,
    validate_record,
)
from anytoken.segments import DNA, Image, Video
from anytoken.utils.errors import RecordError

CONVERSATION = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}],
        },
        {"role": "assistant", "content": "an apple"},
    ]
}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "JSON object"),
        ({}, "empty record"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user"}]}, "role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "assistant"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "content part"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "content is"),
        ({"messages": [{"role": "assistant", "content": "x", "wait": 1}]}, "unknown key 'wait'"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x", "txt": ""}]}]},
            "'txt'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": 3}]}]},
            "expected a string",
        ),
        ({"text": 3}, "text: expected a string, got 3"),
        ({"image": ["a.png"]}, "image: expected a path"),
    ],
)
def test_bad_records_are_named(record: object, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        validate_record(record)


def test_media_fill_the_parts_that_leave_theirs_out_in_order() -> None:
    empty = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image", "image": None}]
    record = {"images": ["a.png", "b.png"], "messages": [{"role": "assistant", "content": empty}]}
    placed = place_media(copy.deepcopy(record))
    assert [value for _, value, _ in media_parts(placed, {"image": None})] == ["a.png", "b.png"]
    assert "images" not in placed
    with pytest.raises(RecordError, match="1 images in the list for 2 parts"):
        place_media(copy.deepcopy(record) | {"images": ["a.png"]})


def test_a_record_is_written_with_the_names_of_its_blobs() -> None:
    line = record_line({"record": {"image": Blob("a.png", b"123"), "text": "ä"}})
    assert line == '{"record": {"image": "a.png", "text": "ä"}}\n'


def test_media_parts() -> None:
    kinds = {"image": None, "speech": None}
    assert media_parts({"text": "a", "image": "a.png", "style": "3d"}, kinds) == [("image", "a.png", None)]
    (part,) = media_parts(CONVERSATION, kinds)
    assert part[:2] == ("image", "a.png") and part[2] is CONVERSATION["messages"][0]["content"][0]
    with pytest.raises(RecordError, match="'image'"):
        media_parts(CONVERSATION, {"speech": None})


def test_open_media_reads_files_and_inline_dna(tmp_path: Path) -> None:
    picture = Image(np.zeros((8, 8, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    assert open_media("a.png", Image, tmp_path) == picture
    assert open_media("ACGT", DNA, tmp_path) == DNA("ACGT")
    assert open_media(Blob("x/a.png", (tmp_path / "a.png").read_bytes()), Image, tmp_path) == picture
    with pytest.raises(RecordError, match="expected a path"):
        open_media(3, Image, tmp_path)
    with pytest.raises(RecordError, match=r"b\.png") as missing:
        open_media("b.png", Image, tmp_path)
    with pytest.raises(RecordError, match=r"^x/a\.png is not a readable image") as damaged:
        open_media(Blob("x/a.png", b"no picture"), Image, tmp_path)
    assert (missing.value.reason, damaged.value.reason) == ("missing file", "unreadable image")


@pytest.mark.parametrize(("suffix", "name"), [(".gif", "clip"), (".webp", "clip"), (".mp4", "clip.mp4")])
def test_a_video_in_a_container_is_told_by_its_first_bytes_or_its_suffix(
    suffix: str, name: str, tmp_path: Path
) -> None:
    clip = Video(np.repeat(np.array([0, 255], dtype=np.uint8), 8 * 8 * 3).reshape(2, 8, 8, 3))
    data = clip.save(tmp_path / f"a{suffix}").read_bytes()
    assert len(open_media(Blob(name, data), Video, tmp_path).frames) == 2
