"""Damaged files of every format: opened or refused with one clear error, without a crash, a hang or a full memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzz_media.py")


def fuzz(count: int, seed: int, folder: Path, timeout: float) -> dict[str, float]:
    """What became of the files; a failure names the one that it stopped at."""
    command = [
        sys.executable,
        str(PROGRAM),
        "--count",
        str(count),
        "--seed",
        str(seed),
        "--keep",
        str(folder),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, f"{[*folder.iterdir()]}: {run.returncode}\n{run.stderr[-3000:]}"
    return json.loads(run.stdout.splitlines()[-1])


def test_damaged_files_are_opened_or_refused(tmp_path: Path) -> None:
    found = fuzz(250, 0, tmp_path, timeout=150)
    assert found["files"] == 250 and min(found["opened"], found["refused"], found["source refused"]) > 3
    assert found["checked with faults"] > 3


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_ten_thousand_damaged_files_are_opened_or_refused(tmp_path: Path) -> None:
    assert fuzz(10_000, 1, tmp_path, timeout=3_600)["files"] == 10_000
