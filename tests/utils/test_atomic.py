"""Files and folders are written whole, and nobody else's file is ever replaced."""

import os
from pathlib import Path

import pytest

from anytoken.utils.atomic import (
    FolderKind,
    check_target,
    write_file,
    write_folder,
)
from anytoken.utils.errors import WriteError

KIND = FolderKind("album", "album.json", ("album.json", "*.page", "inner/*.page"))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(target: Path, pages: str = "1", **options: bool) -> None:
    with write_folder(target, KIND, **options) as scratch:
        (scratch / "album.json").write_text("{}")
        for page in pages:
            (scratch / f"{page}.page").write_text(page)


def test_an_interrupted_save_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("1")
    with pytest.raises(KeyboardInterrupt), write_folder(tmp_path / "target", KIND) as scratch:
        (scratch / "new").write_text("2")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["target", "target/old"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"Cannot write .*file/deeper: .*"):
        write(tmp_path / "file/deeper")


def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "1")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == "a" and not self.name.endswith("-old"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(WriteError, match="No space left"):
        write(tmp_path / "a", "2", overwrite=True)
    assert names(tmp_path) == ["a", "a/1.page", "a/album.json"]


def test_files_of_others_are_kept_and_stale_ones_of_ours_are_not(tmp_path: Path) -> None:
    write(tmp_path / "a", "12")
    (tmp_path / "a/.git/objects").mkdir(parents=True)
    (tmp_path / "a/.git/HEAD").write_text("main")
    (tmp_path / "a/inner").mkdir()
    (tmp_path / "a/inner/x.page").write_text("ours, and stale")
    (tmp_path / "a/inner/notes.txt").write_text("mine")
    (tmp_path / "a/link").symlink_to("nowhere")
    write(tmp_path / "a", "3", overwrite=True)
    assert names(tmp_path / "a") == [
        ".git", ".git/HEAD", ".git/objects", "3.page", "album.json", "inner", "inner/notes.txt", "link"
    ]  # fmt: skip
    assert os.readlink(tmp_path / "a/link") == "nowhere" and names(tmp_path)[0] == "a"


def test_other_contents_are_refused_and_equal_ones_are_not(tmp_path: Path) -> None:
    write(tmp_path / "a", "12")
    write(tmp_path / "a", "12")
    for pages in ("1", "123"):
        try:
            write(tmp_path / "a", pages)
        except WriteError as error:
            assert "2.page would change" in str(error) and "--overwrite" in str(error) and pages == "1"
    assert names(tmp_path / "a") == ["1.page", "2.page", "3.page", "album.json"]
    write(tmp_path / "a", "1", own=True)
    assert names(tmp_path / "a") == ["1.page", "album.json"]


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(WriteError, match=r"something else \(thesis\.tex\).*--overwrite"):
        write(tmp_path)
    with pytest.raises(WriteError, match="is a file"):
        check_target(tmp_path / "thesis.tex", KIND, overwrite=True)
    write(tmp_path, overwrite=True)
    assert names(tmp_path) == ["1.page", "album.json", "thesis.tex"]


def test_a_fresh_repository_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a/.git").mkdir(parents=True)
    write(tmp_path / "a")
    assert names(tmp_path / "a") == [".git", "1.page", "album.json"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["1.page", "album.json"]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = write_file(tmp_path / "deep/a.txt", "one")
    with pytest.raises(KeyboardInterrupt):
        write_file(path, lambda scratch: (scratch.write_text("half"), exec("raise KeyboardInterrupt")))
    assert path.read_text() == "one" and names(path.parent) == ["a.txt"]
    (tmp_path / "link.txt").symlink_to(path)
    write_file(tmp_path / "link.txt", b"two")
    assert path.read_text() == "two" and (tmp_path / "link.txt").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o644
