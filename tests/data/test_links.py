"""Links in a set of files lead nowhere else, unless that folder is allowed; devices and pipes end nothing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from anytoken.data.sources import open_source, read_records
from anytoken.data.sources.tables import hub
from anytoken.data.validate import Census, check_source
from anytoken.segments import Image
from anytoken.utils.errors import RecordError

PICTURE = Image(np.full((4, 4, 3), 9, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set with three captions and images, and a file beside it that is not part of it."""
    (tmp_path / "secret.txt").write_text("secret words")
    (tmp_path / "secret.json").write_text('{"text": "secret words"}')
    PICTURE.save(tmp_path / "secret.png")
    root = tmp_path / "set"
    root.mkdir()
    for name in "abc":
        PICTURE.save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"words of {name}")
    return root


def test_a_caption_that_is_a_link_out_of_the_folder_is_a_bad_record(folder: Path) -> None:
    for name, target in [("b.txt", "../secret.txt"), ("c.png", "../secret.png")]:
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    (folder / "d.json").symlink_to(folder.parent / "secret.json")
    PICTURE.save(folder / "d.png")
    census = Census()
    faults = dict(check_source(folder, census))
    assert list(faults) == ["b", "c", "d"] and census.bad == {"outside the data root": 3}
    assert not any("secret words" in str(fault) for fault in faults.values())
    assert not dict(check_source(folder, Census(), decode=True, data_root=folder.parent))
    opened = open_source(folder, data_root=folder.parent)
    assert [opened.parse(entry).get("text") for _, entry in opened.entries()][1] == "secret words"


def test_links_within_the_folder_are_files_of_it(folder: Path) -> None:
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("a.txt")
    assert [record["text"] for record in read_records(folder)] == ["words of a", "words of a", "words of c"]


def test_metadata_that_is_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "other.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}) + "\n")
    (folder / "metadata.jsonl").symlink_to(folder.parent / "other.jsonl")
    with pytest.raises(RecordError, match=r"metadata\.jsonl is a link out of the folder"):
        open_source(folder)
    assert open_source(folder, data_root=folder.parent)


@pytest.mark.parametrize("name", ["pipe.png", "/dev/zero", "/dev/stdin"])
def test_devices_and_pipes_are_bad_records(name: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "set.jsonl").write_text(json.dumps({"text": "x", "image": name}) + "\n")
    for root in (None, "/dev"):
        ((_, fault),) = check_source(folder / "set.jsonl", Census(), decode=True, data_root=root)
        assert "not a regular file" in str(fault) or "outside of" in str(fault)


def test_rows_of_the_hub_name_no_file_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"text": "x", "image": "a.png"}, {"text": "x", "image": str(folder / "a.png")}]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: rows.to_iterable_dataset())
    monkeypatch.chdir(folder)
    opened = hub("some/set")
    census = Census()
    monkeypatch.setattr("anytoken.data.validate.open_source", lambda *given: opened)
    faults = [fault.reason for _, fault in check_source("hf:some/set", census)]
    assert faults == ["missing file", "outside the data root"]
