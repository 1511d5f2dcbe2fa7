"""Records of a folder: with a `metadata.jsonl` or `.csv`, or with files of the same stem as one record."""

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from anytoken.data.records import Medium, Record, Source
from anytoken.data.sources.csv_files import BadRow, csv_rows
from anytoken.data.sources.file_groups import WORDS, kind_of, record_of_files, stem_and_suffix
from anytoken.data.sources.json_files import lines, parse_json
from anytoken.data.sources.tables import digest_files
from anytoken.media_io import is_below, read_bytes
from anytoken.utils.errors import RecordError
from anytoken.utils.json_lines import load_json

METADATA = ("metadata.jsonl", "metadata.csv")
SPLIT_FOLDERS = ("train", "validation", "val", "test")


def _with_metadata(root: Path, files: list[Path]) -> Source:
    def entries() -> Iterator[tuple[str, tuple[str, Any]]]:
        for file in files:
            folder = file.parent.relative_to(root).as_posix()
            for place, entry in csv_rows(file) if file.suffix == ".csv" else lines(file):
                yield f"{file.relative_to(root)} {place}", (folder, entry)

    return Source(root.name, root, entries, _from_metadata, partial(digest_files, files))


def _from_metadata(entry: tuple[str, Any]) -> Record:
    """A row of metadata.jsonl or .csv: file_name and <kind>_file_name become media, other keys are kept."""
    folder, found = entry
    given = parse_json(found) if isinstance(found, bytes) else found
    if not isinstance(given, dict) or isinstance(given, BadRow):
        return given  # the check of the shape says what is wrong
    record = _split_of(PurePosixPath(folder))
    for key, value in given.items():
        if key != "file_name" and not key.endswith("_file_name"):
            record[key] = value
            continue
        if not isinstance(value, str):
            raise RecordError(f"{key}: expected a path, got {value!r:.80}")
        kind = key.removesuffix("file_name").removesuffix("_") or kind_of(value)
        record[kind] = (PurePosixPath(folder) / value).as_posix()
    return record


def folder(root: Path, data_root: str | Path | None) -> Source:
    """The records of a folder; RecordError if there are none."""
    if files := sorted(one for name in METADATA for one in root.rglob(name)):
        return _with_metadata(root, [_check_link(file, root, data_root) for file in files])
    groups: dict[str, dict[str, str]] = {}
    unused = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        stem, suffix = stem_and_suffix(name)
        if not path.is_file() or re.search(r"(^|/)\.", name):
            continue
        if suffix:
            groups.setdefault(stem, {})[suffix] = name
        else:
            unused.append(name)
    for stem, members in list(groups.items()):  # settings of some program, perhaps, and no record
        if list(members) == ["json"] and not _is_object(root / members["json"]):
            unused.append(groups.pop(stem)["json"])
    if not groups:
        raise RecordError(
            f"{root} holds no record: neither {' or '.join(METADATA)}, nor .tar or .parquet files, nor media"
        )
    words = [name for members in groups.values() for name in members.values() if name.lower().endswith(WORDS)]

    def entries() -> Iterator[tuple[str, tuple[Path, dict[str, str], bool]]]:
        for stem, members in groups.items():
            yield stem, (root, members, bool(words))

    def digest() -> str:
        names = [name for members in groups.values() for name in members.values()]
        sizes = "".join(f"{name}\0{(root / name).stat().st_size}\0" for name in names)
        return hashlib.sha256((sizes + digest_files(root / name for name in words)).encode()).hexdigest()

    parse = partial(_from_files, data_root)
    return Source(root.name, root, entries, parse, digest, len(groups), tuple(unused))


def _is_object(path: Path) -> bool:
    try:
        return isinstance(load_json(path.read_bytes()), dict)
    except (ValueError, OSError):
        return False


def _from_files(data_root: str | Path | None, entry: tuple[Path, dict[str, str], bool]) -> Record:
    root, members, captioned = entry
    path = PurePosixPath(next(iter(members.values())))

    def read(name: Medium) -> bytes:
        return read_bytes(_check_link(root / str(name), root, data_root), "text")[0]

    record = _split_of(path) | record_of_files(members, read)
    if not captioned:
        record |= {} if path.parent.name in ("", *SPLIT_FOLDERS) else {"text": path.parent.name}
    return record


def _split_of(path: PurePosixPath) -> Record:
    top = path.parts[:1]
    return {"split": top[0]} if top and top[0] in SPLIT_FOLDERS else {}


def _check_link(path: Path, root: Path, data_root: str | Path | None) -> Path:
    """A file of a folder; RecordError for a link out of the set."""
    if not is_below(path, [root, data_root]):
        raise RecordError(
            f"{path.relative_to(root)} is a link out of the folder; set data_root (--data-root) to a folder that "
            "holds the file", "outside the data root",
        )  # fmt: skip
    return path
