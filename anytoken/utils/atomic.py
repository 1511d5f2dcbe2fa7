"""Write files and folders atomically; they only replace older versions of themselves.

Everything is written under a temporary name in the directory of the target, flushed to the disk, and renamed: a kill
at any moment leaves the old version or the new one, never half of either. A folder that may be replaced is described
by a `FolderKind`: the file that marks it and the files it consists of. Files of anybody else in it (a `.git`, the
report of a run) are kept. A folder that holds something else, or the same kind of thing with other contents, is
refused before anything is changed.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from anytoken.utils.errors import WriteError

SHOWN = 3  # names of what is in the way


@dataclass(frozen=True)
class FolderKind:
    """The files of one kind of folder.

    name: its name in errors. marker: the file that identifies the kind. files: patterns of its files, relative to the
    folder (`*` does not match `/`); those of an older version are removed. error: the error class.
    """

    name: str
    marker: str
    files: tuple[str, ...]
    error: type[ValueError] = WriteError

    def owns(self, path: Path) -> bool:
        """Whether a relative path is a file of this kind."""
        return any(
            len(path.parts) == len(parts) and all(map(fnmatchcase, path.parts, parts))
            for parts in (pattern.split("/") for pattern in self.files)
        )

    def own_files(self, folder: Path) -> list[Path]:
        """The files of this kind in a folder, as sorted relative paths."""
        found = (path for pattern in self.files for path in folder.glob(pattern) if path.is_file())
        return sorted({path.relative_to(folder) for path in found})


def check_target(target: Path, kind: FolderKind, overwrite: bool = False) -> None:
    """Raise `kind.error` if `target` is a file, or a folder with something other than this kind.

    A new or empty folder is fine, and so is one with hidden files only (a fresh repository). overwrite: something else
    is fine too, since it is kept.
    """
    if target.exists() and not target.is_dir():
        raise kind.error(f"{target} exists and holds something else: it is a file; choose another name.")
    if overwrite or not target.is_dir() or (target / kind.marker).is_file():
        return
    names = sorted(path.name for path in target.iterdir() if not path.name.startswith("."))
    if names:
        more = ", ..." if len(names) > SHOWN else ""
        raise kind.error(
            f"{target} exists and holds something else ({', '.join(names[:SHOWN])}{more}); choose another folder, or "
            f"overwrite=True (--overwrite) to put the {kind.name} there too: files that are not its own are kept."
        )


@contextmanager
def write_folder(
    target: Path, kind: FolderKind, overwrite: bool = False, own: bool = False
) -> Iterator[Path]:
    """A temporary folder that replaces the target if the block succeeds, and is removed otherwise.

    Other files in the target are kept. `kind.error` if it cannot be created, if the
    target holds something else, or another folder of this kind whose files differ; overwrite allows both. own: the
    caller knows that what is there is an older version of the same thing.
    """
    place = Path(os.path.realpath(target))  # a link stays a link
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        raise kind.error(f"Cannot write {target}: {error.strerror} ({place.parent}).") from error
    try:
        yield scratch
        check_target(place, kind, overwrite)
        if not (overwrite or own):
            _refuse_changes(place, scratch, kind)
        try:
            _take_place(scratch, place, kind)
        except OSError as error:
            raise kind.error(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_file(path: str | Path, write: str | bytes | Callable[[Path], object], sync: bool = True) -> Path:
    """Write a file atomically: text (UTF-8), bytes, or a function that writes to the path it is given.

    That path has the same suffix. sync: wait until the disk holds it, so that it outlasts a loss of power; one of many
    small files, or a page that is soon written again, need not. OSError if it cannot be written; then the old file is
    as it was.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=place.suffix, prefix=f".{place.stem}-", dir=place.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        if isinstance(write, str | bytes):
            scratch.write_bytes(write.encode() if isinstance(write, str) else write)
        else:
            write(scratch)
        scratch.chmod(0o644)
        if sync:
            flush(scratch)
        scratch.replace(place)
        if sync:
            flush(place.parent)
    finally:
        scratch.unlink(missing_ok=True)
    return Path(path)


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk: a rename may reach it before the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_changes(place: Path, scratch: Path, kind: FolderKind) -> None:
    """Raise if an existing file would be removed or changed."""
    written = {path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file()}
    there = sorted({*kind.own_files(place), *(name for name in written if (place / name).exists())})
    same, *_ = filecmp.cmpfiles(place, scratch, map(str, there), shallow=False)
    changed = [str(name) for name in there if str(name) not in same]
    if changed:
        raise kind.error(
            f"{place} holds another {kind.name}: {', '.join(changed[:SHOWN])} would change ({len(changed)} files in "
            "all). Choose another folder, or replace it with overwrite=True (--overwrite)."
        )


def _take_place(scratch: Path, place: Path, kind: FolderKind) -> None:
    """Rename the finished folder to its place, keeping files of others."""
    scratch.chmod(0o755)
    for path in scratch.rglob("*"):  # safetensors writes files that only their owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)
        flush(path)
    if place.exists():
        _carry_over(place, scratch, kind)
    flush(scratch)
    old = scratch.with_name(scratch.name + "-old")
    if place.exists():
        place.rename(old)
    try:
        scratch.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    flush(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _carry_over(place: Path, scratch: Path, kind: FolderKind) -> None:
    """Link the files of others into the new folder: until the old one is removed both have them."""
    for folder, names, files in os.walk(place):
        inside = Path(folder).relative_to(place)
        links = [name for name in names if (Path(folder) / name).is_symlink()]
        for name in [*files, *links]:
            if kind.owns(inside / name) or (scratch / inside / name).exists():
                continue
            (scratch / inside).mkdir(parents=True, exist_ok=True)
            source, copy = Path(folder) / name, scratch / inside / name
            try:
                os.link(source, copy, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(source, copy, follow_symlinks=False)
        if not names and not files:
            (scratch / inside).mkdir(parents=True, exist_ok=True)
