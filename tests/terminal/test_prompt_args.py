"""Prompt parts from the command line: their order, files, words, bytes on standard input, ids, and what is refused."""

import io
import json
import os
import re

import numpy as np
import pytest

from anytoken.segments import DNA, Image, Speech, Text
from anytoken.terminal import prompt_args
from anytoken.utils.errors import RequestError


def test_prompt_parts_keep_their_order(tmp_path):
    image = tmp_path / "cat.png"
    Image(np.zeros((8, 8, 3), np.uint8)).save(image)
    words = [
        "first",
        "--image",
        str(image),
        "--text=cat.png",
        "--dna",
        "ACGT",
        str(image),
        "--output",
        "text",
    ]
    marked = prompt_args.mark_parts(words)
    assert marked[-2:] == ["--output", "text"]
    segments = [prompt_args.read_part(one) for one in marked[:-2]]
    assert [segment.kind for segment in segments] == ["text", "image", "text", "dna", "image"]
    assert segments[0] == Text("first") and segments[2] == Text("cat.png") and segments[3] == DNA("ACGT")


def test_parts_after_a_double_dash_are_words():
    assert prompt_args.mark_parts(["--", "--image", "x"]) == ["--", "--image", "x"]


def test_a_long_prompt_is_words():
    assert prompt_args.read_part("word " * 2000) == Text("word " * 2000)


@pytest.mark.parametrize("text", ["", "nonsense", '{"tokens": [1]}', "[1, 2.5]", "[true]", '["1"]'])
def test_ids_that_are_no_ids_are_refused(text, tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=re.escape(str(path))):
        prompt_args.read_ids(str(path))


def test_ids_are_read_from_a_list_and_from_generates_json(tmp_path):
    path = tmp_path / "ids.json"
    for data in ([3, 1, 2], {"ids": [3, 1, 2], "segments": []}):
        path.write_text(json.dumps(data))
        assert prompt_args.read_ids(str(path)) == [3, 1, 2]


def give_input(monkeypatch, data: bytes):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_words_come_from_standard_input(monkeypatch):
    give_input(monkeypatch, "ein schöner 🍎\n".encode())
    assert prompt_args.read_part("-") == Text("ein schöner 🍎")
    with pytest.raises(RequestError, match="one part only"):
        prompt_args.read_part("-")


def test_a_picture_and_sound_come_from_standard_input(monkeypatch, tmp_path):
    image, speech = Image(np.full((8, 9, 3), 7, np.uint8)), Speech(np.zeros(320))
    for kind, segment, name in (("image", image, "a.png"), ("speech", speech, "a.wav")):
        give_input(monkeypatch, segment.save(tmp_path / name).read_bytes())
        [marked] = prompt_args.mark_parts([f"--{kind}", "-"])
        assert prompt_args.read_part(marked) == segment


@pytest.mark.parametrize(
    ("data", "argument", "says"),
    [
        (b" \n", "-", "empty"),
        (b"\x89PNG\xff", "-", "--image -"),
        (b"nothing", "\0image\0-", "not a readable image"),
        (b"x", "\0video\0-", "video on standard input"),
    ],
)
def test_input_that_is_no_part_is_refused(monkeypatch, data, argument, says):
    give_input(monkeypatch, data)
    with pytest.raises(ValueError, match=says):
        prompt_args.read_part(argument)


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    DNA("ACGT").save(tmp_path / "gene.fasta")
    assert prompt_args.read_typed("dna", "~/gene.fasta").bases == "ACGT"


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    prompt_args.check_out(tmp_path / "not/there/yet")
    with pytest.raises(RequestError, match="file is a file"):
        prompt_args.check_out(tmp_path / "file/deeper")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(RequestError, match=f"no permission in {tmp_path}"):
        prompt_args.check_out(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
