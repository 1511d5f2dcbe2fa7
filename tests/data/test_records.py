"""Records: what is read, what is refused and how it is said."""

import gzip
import json
from pathlib import Path

import pytest

from anytoken.data.records import RecordError, media_parts, open_media, read_records
from anytoken.segments import DNA, Image

CONVERSATION = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}],
        },
        {"role": "assistant", "content": "an apple"},
    ]
}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_and_conversations_are_read_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a", "image": "a.png"}, CONVERSATION)
    assert list(read_records(path)) == [{"text": "a", "image": "a.png"}, CONVERSATION]


def test_gzip_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
    assert [record["text"] for record in read_records(path)] == ["a", "b"]


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
    ],
)
def test_bad_records_are_named(tmp_path: Path, record: object, said: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, record)
    with pytest.raises(RecordError, match=f"line 2.*{said}"):
        list(read_records(path))


def test_broken_json_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(RecordError, match="line 1"):
        list(read_records(tmp_path / "a.jsonl"))
    with pytest.raises(RecordError, match="does not exist"):
        list(read_records(tmp_path / "none.jsonl"))


def test_media_parts() -> None:
    kinds = {"image": None, "speech": None}
    assert media_parts({"text": "a", "image": "a.png", "style": "3d"}, kinds) == [("image", "a.png", None)]
    (part,) = media_parts(CONVERSATION, kinds)
    assert part[:2] == ("image", "a.png") and part[2] is CONVERSATION["messages"][0]["content"][0]
    with pytest.raises(RecordError, match="'image'"):
        media_parts(CONVERSATION, {"speech": None})


def test_open_media_reads_files_and_inline_dna(tmp_path: Path) -> None:
    import numpy as np

    picture = Image(np.zeros((8, 8, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    assert open_media("a.png", Image, tmp_path) == picture
    assert open_media("ACGT", DNA, tmp_path) == DNA("ACGT")
    with pytest.raises(RecordError, match="expected a path"):
        open_media(3, Image, tmp_path)
