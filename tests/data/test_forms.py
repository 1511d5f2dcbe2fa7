"""The common forms of training data: read as ours, and judged alike by the check and by tokenizing."""

import base64
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.data.forms import to_record
from anytoken.data.records import Blob, open_media
from anytoken.data.shards import Shards, tokenize_records
from anytoken.data.sources import open_source, read_records
from anytoken.data.validate import Census, check_source
from anytoken.segments import Image
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.utils.errors import RecordError

ANSWER = {"role": "assistant", "content": "An apple."}
ASKED = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    ANSWER,
]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "An apple."}]
NAMED = [{"role": "user", "content": "<image>What?"}, ANSWER]


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image(np.full((16, 16, 3), shade, dtype=np.uint8)).to_pil().save(buffer, "PNG")
    return buffer.getvalue()


URL = "data:image/png;base64," + base64.b64encode(png(7)).decode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(
        width=16, encoder_depth=1, decoder_depth=1, refine_width=8, refine_depth=1, side_px=16
    ).eval()


def write(path: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"messages": NAMED, "images": ["a.png"]},
        {"conversations": TURNS, "image": "a.png", "id": "1"},
        {"conversations": TURNS, "images": ["a.png"]},
        {"conversations": NAMED, "images": ["a.png"]},
        {"instruction": "<image>What?", "input": "", "output": "An apple.", "images": ["a.png"]},
        {"prompt": "<image>What?", "completion": "An apple.", "image": "a.png"},
        {"prompt": NAMED[:1], "completion": [ANSWER], "images": ["a.png"]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                        {"type": "text", "text": "What?"},
                    ],
                },
                ANSWER,
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "a.png"}, ASKED[0]["content"][1]]},  # type: ignore[index]
                ANSWER,
            ]
        },
    ],
)
def test_every_form_of_a_conversation_is_ours(record: dict[str, Any], root: Path) -> None:
    (found,) = read_records(write(root / "set.jsonl", record))
    assert found["messages"] == ASKED
    (root / "set.json").write_text(json.dumps([record, record], indent=1))
    assert [one["messages"] for one in read_records(root / "set.json")] == [ASKED, ASKED]


def test_systems_histories_and_several_media_keep_their_order() -> None:
    alpaca = {
        "instruction": "Add.", "input": "1 2", "output": "3", "system": "Sums.", "history": [["Hi", "Hello"]],
    }  # fmt: skip
    turns = [(one["role"], one["content"]) for one in to_record(alpaca)["messages"]]
    assert turns == [
        ("system", "Sums."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1 2"), ("assistant", "3"),
    ]  # fmt: skip
    talk = {
        "messages": [
            {"role": "user", "content": "<image><audio>and <image>"},
            {"role": "assistant", "content": "x"},
        ],
        "images": ["a.png", "b.png"],
        "audios": ["a.wav"],
    }
    content = to_record(talk)["messages"][0]["content"]
    assert [part[part["type"]] for part in content] == ["a.png", "a.wav", "and ", "b.png"]
    document = to_record({"text": "A <image> and <image>.", "images": ["a.png", "b.png"]})
    assert [part["type"] for part in document["messages"][0]["content"]] == [
        "text", "image", "text", "image", "text",
    ]  # fmt: skip
    html = {"messages": [{"role": "user", "content": "What is <video>?"}, ANSWER]}
    assert to_record(html) == html


def test_data_urls_and_inline_audio_are_decoded(root: Path) -> None:
    record = to_record({"text": "x", "image": URL})
    assert isinstance(record["image"], Blob) and record["image"].name.endswith(".png")
    assert open_media(record["image"], Image, root) == Image(np.full((16, 16, 3), 7, dtype=np.uint8))
    sound = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"},
    }
    talk = to_record({"messages": [{"role": "user", "content": [sound]}, ANSWER]})
    (part,) = talk["messages"][0]["content"]
    assert (
        part["type"] == "speech" and part["speech"].data == b"RIFF" and part["speech"].name.endswith(".wav")
    )


BAD = [
    ({"messages": NAMED}, "placeholders"),
    ({"messages": NAMED[:1] * 2 + [ANSWER], "images": ["a.png"]}, "placeholders"),
    ({"messages": [{"role": "user", "content": "What?"}, ANSWER], "images": ["a.png"]}, "placeholders"),
    ({"conversations": TURNS[1:], "image": "a.png"}, "placeholders"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "wrong shape"),
    ({"messages": ASKED, "conversations": TURNS}, "wrong shape"),
    ({"text": "x", "images": ["a.png", "b.png"]}, "wrong shape"),
    ({"text": "x", "image": "https://example.org/a.png"}, "not downloaded"),
    ({"text": "x", "image": "data:image/png;base64,%%%"}, "damaged data URL"),
    ({"text": "x", "image": "data:image/png;base64," + "A" * 80_000}, "unreadable image"),
    ({"text": "x", "image": "A" * 80_000}, "missing file"),
    ({"text": "x", "image": "a\0.png"}, "missing file"),
    ({"text": "x", "image": "../a.png"}, "outside the data root"),
    ({"text": "x", "image": "/etc/passwd"}, "outside the data root"),
    ({"text": "x", "image": "link.png"}, "outside the data root"),
    ({"text": "x", "image": "pipe"}, "missing file"),
    ({"text": "x", "image": "."}, "outside the data root"),
    ({"text": " ", "image": "a.png"}, "empty text"),
    ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "empty text"),
    ('{"text": "bad \\ud83d end", "image": "a.png"}', "not JSON"),
    ('{"text": "x", "image": "a.png", "image": "b.png"}', "not JSON"),
    ({"text": ["x"], "image": "a.png"}, "wrong shape"),
    ({"messages": [None]}, "wrong shape"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, "cannot be read"),
]


def test_a_bad_record_is_counted_with_its_line_by_the_check_and_by_tokenizing_and_ends_nothing(
    root: Path, tokenizer: ImageTokenizer
) -> None:
    (root / "link.png").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe")
    good = {"text": "an apple", "image": "a.png"}
    path = write(root / "set.jsonl", good, *(record for record, _ in BAD), {"messages": ASKED})
    census = Census()
    found = dict(check_source(path, census))
    assert {place: error.reason for place, error in found.items()} == {
        f"line {number}": reason for number, (_, reason) in enumerate(BAD, start=2)
    }
    assert max(len(str(error)) for error in found.values()) < 500
    assert not any("\n" in str(error) for error in found.values())
    assert (census.media["image"], census.media["text"]) == (2, 3)
    out = tokenize_records(path, {"image": tokenizer}, root / "out", progress=False, max_bad=1.0)
    shards = Shards(out, {"image": tokenizer})
    assert len(shards) == 2
    assert {reason: number for reason, (number, _) in shards.manifest["skipped"].items()} == dict(census.bad)
    again = dict(check_source(path, Census(), tokenizers={"image": tokenizer}))
    assert again.keys() == found.keys()
    done = CliRunner().invoke(app, ["data", "check", str(path)])
    assert (
        done.exit_code == 2 and "set.jsonl line 2: " in done.stdout and "AAAAAAAAAA" * 40 not in done.stdout
    )


def test_a_plug_in_that_fails_loses_its_record_alone(root: Path) -> None:
    class Broken(ImageTokenizer):
        def encode_batch(self, segments: Any) -> Any:
            if any(not segment.pixels.any() for segment in segments):
                raise KeyError("dark")
            return super().encode_batch(segments)

    broken = Broken(width=16, encoder_depth=1, decoder_depth=1, refine_width=8, refine_depth=1, side_px=16)
    (root / "b.png").write_bytes(png(90))
    path = write(root / "set.jsonl", *({"text": "x", "image": f"{name}.png"} for name in "abab"))
    out = tokenize_records(path, {"image": broken}, root / "out", progress=False, max_bad=0.5)
    assert len(Shards(out, {"image": broken})) == 2
    faults = dict(check_source(path, Census(), tokenizers={"image": broken}))
    assert list(faults) == ["line 1", "line 3"] and "KeyError" in str(faults["line 1"])


def test_media_may_be_below_a_data_root(root: Path, tokenizer: ImageTokenizer) -> None:
    (root / "lists").mkdir()
    path = write(root / "lists" / "set.jsonl", {"text": "x", "image": "../a.png"})
    (fault,) = dict(check_source(path, Census())).values()
    assert "--data-root" in str(fault)
    assert not list(check_source(path, Census(), data_root=root))
    out = tokenize_records(path, {"image": tokenizer}, root / "out", progress=False, data_root=root)
    assert len(Shards(out, {"image": tokenizer})) == 1


# ---- tables and folders ----


def test_csv_and_tsv(root: Path) -> None:
    rows = [["text", "image", "split"], ['a "red"\u2028 apple', "a.png", ""], ["b", "b.png", "test"]]
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        text = "\r\n".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
        (root / f"set{suffix}").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
        assert list(read_records(root / f"set{suffix}")) == [
            {"text": 'a "red"\u2028 apple', "image": "a.png"},
            {"text": "b", "image": "b.png", "split": "test"},
        ]
    (root / "set.csv").write_bytes(b"text,image\nx,a.png,more\n\xff,a.png\n\ny,a.png\n")
    census = Census()
    assert [place for place, _ in check_source(root / "set.csv", census)] == ["line 2", "line 3"]
    assert census.records == 3 and census.bad == {"not CSV": 2}
    talk = json.dumps(NAMED).replace('"', '""')
    (root / "talk.csv").write_text(f'messages,images\n"{talk}","[""a.png""]"\n')
    assert next(read_records(root / "talk.csv"))["messages"] == ASKED


def test_an_image_folder_with_metadata_csv(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name,text\na.png,an apple\nb.m4a,a pear\n")
    opened = open_source(root)
    census = Census()
    (fault,) = check_source(root, census)
    assert opened.root == root and fault[0] == "metadata.csv line 3" and fault[1].reason == "unread format"
    assert census.media == {"image": 1, "text": 1}


def test_files_that_are_not_read_are_named(root: Path) -> None:
    (root / "a.txt").write_text("an apple")
    (root / "b.txt").write_text("a pear")
    (root / "b.m4a").write_bytes(b"sound")
    (root / "notes.json").write_text("no json")
    (root / "LICENSE").write_text("free")
    census = Census()
    faults = dict(check_source(root, census))
    assert list(faults) == ["b"] and "'b.m4a': the format .m4a is not read" in str(faults["b"])
    assert set(census.files) == {"LICENSE", "notes.json"} and census.records == 2


def test_class_labels_of_parquet_are_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = [{"image": {"bytes": png(), "path": None}, "label": label} for label in (1, 0)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set.parquet")
    found = list(read_records(tmp_path / "set.parquet"))
    assert [(record["text"], record["label"]) for record in found] == [("dog", "dog"), ("cat", "cat")]


# ---- what training would do with it ----


@pytest.mark.parametrize(
    ("records", "code", "said"),
    [
        ([{"text": "a", "image": "a.png"}], 0, "1 image, 1 text"),
        ([{"text": "a"}, {"text": "b"}], 0, "2 text"),
        ([{"text": "a", "image": "a.png"}, {"text": "b"}], 0, "1 records hold text alone"),
        ([{"caption": "a", "image": "a.png"}], 2, "--rename caption=text"),
        ([{"text": "a", "audio": "a.wav"}], 2, "--rename audio=speech"),
        ([{"image": "a.png"}], 2, "nothing to train on"),
        ([], 2, "holds no record"),
    ],
)
def test_the_check_says_what_no_automatic_view_uses(
    records: list[dict[str, Any]], code: int, said: str, root: Path
) -> None:
    done = CliRunner().invoke(app, ["data", "check", str(write(root / "set.jsonl", *records))])
    assert done.exit_code == code, done.output
    assert said in " ".join((done.stdout + done.stderr).split())


# ---- fuzz ----


def mutated(line: bytes, rng: np.random.Generator) -> bytes:
    """A line of JSON with one to three small damages."""
    data = bytearray(line)
    for _ in range(int(rng.integers(1, 4))):
        at, kind = int(rng.integers(len(data))), int(rng.integers(5))
        words = (
            b'"image"',
            b"null",
            b"[]",
            b"{}",
            b'"messages":',
            b"\\ud800",
            b"<image>",
            b"data:,",
            b"..",
            b"\xff",
        )
        if kind == 0:
            data[at] = int(rng.integers(256))
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            data[at:at] = words[int(rng.integers(len(words)))]
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        else:
            word = words[int(rng.integers(len(words)))]
            data[at : at + len(word)] = word
        data = data or bytearray(b"x")
    return bytes(data).replace(b"\n", b" ")


def fuzz(root: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seeds = [
        {"text": "a", "image": "a.png"}, {"text": "a", "image": URL}, {"text": "g", "dna": "ACGT"},
        {"messages": ASKED}, {"messages": NAMED, "images": ["a.png"]}, {"conversations": TURNS, "image": "a.png"},
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}, {"prompt": "a", "completion": "b"},
        {"text": "<image> x", "images": ["a.png"]},
    ]  # fmt: skip
    lines = [mutated(json.dumps(seeds[int(rng.integers(len(seeds)))]).encode(), rng) for _ in range(count)]
    (root / "set.jsonl").write_bytes(b"\n".join(lines))
    (root / "set.csv").write_bytes(b"text,image\n" + b"\n".join(lines))
    began = time.monotonic()
    for path in (root / "set.jsonl", root / "set.csv"):
        census = Census()
        for place, error in check_source(path, census):
            assert isinstance(error, RecordError) and place.startswith("line ") and len(str(error)) < 500
        good = sum(number for number, _ in census.held.values())
        assert census.records == good + census.bad.total() > 0
    assert time.monotonic() - began < 60


def test_mutated_lines_are_good_or_counted(root: Path) -> None:
    fuzz(root, 1500, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_thousand_mutated_lines(root: Path, seed: int) -> None:
    fuzz(root, 2000, seed)


def test_the_table_of_forms_is_linked_from_the_readme() -> None:
    top = Path(__file__).parents[2]
    assert "docs/data.md" in (top / "README.md").read_text(encoding="utf-8")
    assert (top / "docs" / "data.md").is_file()
