"""Replies at a terminal: files that are never overwritten, text as it comes, bars that go, JSON lines."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from anytoken.inference.outputs import GenerationOutput, Usage
from anytoken.inference.streaming import (
    SegmentFinished,
    SegmentPreview,
    SegmentProgress,
    SegmentStarted,
    TextDelta,
)
from anytoken.segments import DNA, Image, Text
from anytoken.terminal import render

PICTURE = Image(np.full((8, 8, 3), 200, np.uint8))
SEGMENTS = [Text("hello \x1b[31m"), PICTURE]


def events():
    yield SegmentStarted("text")
    yield TextDelta("hel")
    yield TextDelta("lo \x1b[31m")
    yield SegmentFinished(SEGMENTS[0])
    yield SegmentStarted("image")
    yield SegmentProgress("image", 1, 2)
    yield SegmentPreview("image", lambda: PICTURE)
    yield SegmentFinished(PICTURE)
    usage = Usage(1, 2, {}, 1.0)
    yield usage
    return GenerationOutput(SEGMENTS, [5, 6], usage, "stop")


def test_written_media_never_overwrite(tmp_path):
    for number in range(2):
        parts = render.write_segments([Text("hi"), DNA("ACGT"), DNA("TTTT")], tmp_path)
        assert parts[0] == {"type": "text", "text": "hi"}
        assert [Path(part["dna"]).name for part in parts[1:]] == [
            f"dna-{2 * number + i:03d}.fasta" for i in (0, 1)
        ]
    assert DNA.open(tmp_path / "dna-003.fasta").bases == "TTTT"


def test_a_piped_reply_is_plain_text_and_paths(tmp_path):
    screen = StringIO()
    reply = render.show_events(events(), tmp_path, Console(file=screen, width=20))
    assert reply.ids == [5, 6]
    assert screen.getvalue() == f"hello \ufffd[31m\n{tmp_path}/image-000.png\n"


def test_a_terminal_shows_a_bar_that_goes_and_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("os.environ", {"TERM": "xterm-256color"})
    screen = StringIO()
    console = Console(file=screen, width=40, force_terminal=True, color_system="truecolor")
    render.show_events(events(), tmp_path, console)
    shown = screen.getvalue()
    assert "━" in shown and "\x1b[2K" in shown, "a bar was drawn and erased"
    assert "38;2;200;200;200" in shown.split("\x1b[2K")[-1] and "\x1b[31m" not in shown


def test_a_stream_that_is_stopped_takes_its_bar_away(tmp_path):
    closed = []

    def interrupted():
        try:
            yield SegmentStarted("image")
            yield SegmentProgress("image", 1, 2)
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    screen = StringIO()
    with pytest.raises(KeyboardInterrupt):
        render.show_events(interrupted(), tmp_path, Console(file=screen, force_terminal=True, width=40))
    assert closed and screen.getvalue().endswith("\x1b[?25h") | ("\x1b[?25h" in screen.getvalue())


def test_events_as_json_lines_end_with_the_reply(tmp_path, capsys):
    render.print_events(events(), tmp_path)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [
        "SegmentStarted", "TextDelta", "TextDelta", "SegmentFinished",
        "SegmentStarted", "SegmentProgress", "SegmentFinished", "Reply",
    ]  # fmt: skip
    assert lines[1] == {"event": "TextDelta", "text": "hel"}
    assert lines[5] == {"event": "SegmentProgress", "kind": "image", "done": 1, "total": 2}
    assert lines[-1]["segments"] == [lines[3]["segment"], lines[6]["segment"]]
    assert Image.open(lines[6]["segment"]["image"]) == PICTURE and lines[-1]["ids"] == [5, 6]
