"""`anytoken data check`: every bad line by number and reason, exit code 2, and fast."""

import json
import time
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.data.validate import Census, check_source
from anytoken.segments import Image


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_every_bad_line_is_listed_with_its_number_and_reason(tmp_path: Path) -> None:
    Image(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    part = {"type": "image", "image": "none.png"}
    path = write(
        tmp_path / "set.jsonl",
        {"text": "a", "image": "a.png"},
        "{",
        {"text": "b", "image": "none.png"},
        {"text": "c", "image": "broken.png"},
        {"style": "3d"},
        {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]},
        {"audio": "a.wav", "dna": "ACGT"},
    )
    census = Census()
    found = {place: error.reason for place, error in check_source(path, census)}
    wrong = {
        "line 2": "not JSON",
        "line 3": "missing file",
        "line 5": "wrong shape",
        "line 6": "missing file",
    }
    assert found == wrong
    assert (census.records, census.bad["missing file"], census.media["image"]) == (7, 2, 2)
    assert "audio=speech" in census.hints()[0]
    opened = {place: error.reason for place, error in check_source(path, Census(), decode=True)}
    assert opened == wrong | {"line 4": "unreadable image"}

    done = CliRunner().invoke(app, ["data", "check", str(path)])
    assert done.exit_code == 2 and "line 3: image 'none.png' does not exist" in done.stdout
    assert "4 of 7 records are bad: 2 missing file" in " ".join(done.stderr.split())


def test_a_good_source_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", {"text": "a", "dna": "ACGT"}, {"text": "b"})
    done = CliRunner().invoke(app, ["data", "check", str(path)])
    assert done.exit_code == 0, done.stderr
    assert "2 records, 0 of them conversations; 1 dna" in done.stdout


def test_thousands_of_lines_a_second(tmp_path: Path) -> None:
    Image(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": "x"},
    ]
    path = write(tmp_path / "set.jsonl", *[{"text": "a", "image": "a.png"}, {"messages": turns}] * 2000)
    began = time.process_time()
    assert not list(check_source(path, Census()))
    assert 4000 / (time.process_time() - began) > 2000
