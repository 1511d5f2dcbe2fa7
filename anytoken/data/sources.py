"""Where records come from: one door to every usual form of training data.

| SOURCE | what it is |
|---|---|
| ``set.jsonl``, ``set.jsonl.gz`` | a record or conversation a line |
| a folder with ``metadata.jsonl`` | as `datasets` has it: ``file_name`` (or ``<kind>_file_name``) names the medium |
| a folder of files | files of one stem are one record: ``cat.png``, ``cat.wav`` and the caption ``cat.txt`` |
| a folder of class folders | no caption anywhere: the text is the name of the folder a file is in |
| ``set.tar``, ``"set-*.tar"``, a folder of tars | webdataset: neighbouring members of one key are one record |
| ``set.parquet``, ``"set-*.parquet"``, a folder of them or of ``save_to_disk`` | Hugging Face `datasets` |
| ``hf:owner/name``, ``hf:owner/name:configuration`` | a set on the hub, streamed |
| a `datasets` object (in Python) | a Dataset, IterableDataset or a dictionary of them by split |

In folders and tars a suffix tells the kind (``.webp`` an image, ``.gif`` a video); ``cat.video.webp`` names it. A
``.json`` file gives any keys, ``messages`` too, whose parts name files of the same stem. Top folders and dataset
splits become the key ``split``, so that ``train`` is trained on and others are not.

An *entry* is what is cheap to read and to skip: a line, a group of files, a row. ``parse`` makes a record of it,
perhaps in another process. Tars are read with the standard library: the format is tar, and grouping its members
takes a dozen lines.
"""

import gzip
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from anytoken.data.records import Blob, Medium, Record, RecordError, place_media, validate_record
from anytoken.segments import (
    CONTAINER_SUFFIXES,
    DNA_SUFFIXES,
    IMAGE_SUFFIXES,
    SPEECH_SUFFIXES,
    TEXT_SUFFIXES,
)
from anytoken.tokenizers.base import MODALITIES

SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": TEXT_SUFFIXES,
    "image": IMAGE_SUFFIXES,
    "speech": SPEECH_SUFFIXES,
    "video": (*CONTAINER_SUFFIXES, ".gif"),
    "dna": DNA_SUFFIXES,
}
WORDS = (".txt", ".json")  # read for the record itself; other files are media
METADATA = "metadata.jsonl"
SPLIT_FOLDERS = ("train", "validation", "val", "test")
TARS, TABLES = (".tar", ".tar.gz", ".tgz"), (".parquet", ".arrow")
# webdataset's key and suffix: a key ends at the first dot of the file name
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError)


@dataclass(frozen=True)
class Source:
    """Entries in order; each is a place, for messages, and something raw that ``parse`` makes a record of."""

    name: str
    root: Path  # where relative paths of media start
    entries: Callable[[], Iterator[tuple[str, Any]]]
    parse: Callable[[Any], Record]
    digest: Callable[[], str]  # of what lists the records; media in files of their own are not read for it
    length: int | None = None


def read_records(source: Any) -> Iterator[Record]:
    """Yield the validated records of a source, in order; see the module's docstring for what it may be.

    Raises RecordError, naming source and place, for what is missing or damaged and for the first bad record.
    """
    opened = open_source(source)
    for place, entry in opened.entries():
        try:
            yield opened.parse(entry)
        except RecordError as error:
            raise RecordError(f"{opened.name} {place}: {error}", error.reason) from None


def open_source(source: Any, rename: Mapping[str, str] | None = None) -> Source:
    """Find out what a source is; RecordError if it is nothing that holds records.

    rename: keys of the records that are to have another name, such as {"audio": "speech"}.
    """
    found = _find(source)
    return Source(
        found.name, found.root, found.entries, partial(_parse, found.parse, dict(rename or {})), found.digest,
        found.length,
    )  # fmt: skip


def _parse(parse: Callable[[Any], Any], rename: Mapping[str, str], entry: Any) -> Record:
    record = parse(entry)
    if rename and isinstance(record, dict):
        record = {rename.get(key, key): value for key, value in record.items()}
    record = place_media(record)
    validate_record(record)
    return record


def _find(source: Any) -> Source:
    if not isinstance(source, str | Path):
        return _dataset(source, type(source).__name__, partial(_digest_object, source))
    if str(source).startswith("hf:"):
        return _hub(str(source)[3:])
    path = Path(source)
    files = sorted(path.parent.glob(path.name)) if re.search(r"[*?\[]", path.name) else [path]
    if path.is_dir():
        return _find_in_folder(path)
    if not files or not files[0].is_file():
        raise RecordError(
            f"{source} does not exist; give a .jsonl file, a folder, .tar or .parquet files, or hf:owner/name"
        )
    names = [file.name.lower() for file in files]
    if len(files) == 1 and names[0].endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if all(name.endswith(TARS) for name in names):
        return _tars(path.name, files)
    if all(name.endswith(TABLES) for name in names):
        return _tables(path.name, files)
    raise RecordError(
        f"{source} is of no known form; allowed: .jsonl, .jsonl.gz, .tar, .tar.gz, .parquet, a folder"
    )


def _find_in_folder(path: Path) -> Source:
    tables = partial(_digest_files, sorted(one for one in path.rglob("*") if one.suffix in TABLES))
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        saved = _load(str(path), lambda datasets: datasets.load_from_disk(str(path)))
        return _dataset(saved, path.name, tables, path)
    if next(path.rglob("*.parquet"), None):  # a clone from the hub, perhaps: file names tell the splits
        parquet = _load(str(path), lambda datasets: datasets.load_dataset(str(path), streaming=True))
        return _dataset(parquet, path.name, tables, path)
    if files := sorted(one for one in path.iterdir() if one.name.lower().endswith(TARS)):
        return _tars(path.name, files)
    if files := sorted(path.rglob(METADATA)):
        return _folder_with_metadata(path, files)
    return _folder(path)


def _digest_files(paths: Iterable[Path]) -> str:
    """sha256 over the sha256 of each file."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---- JSON lines ----


def _json_lines(path: Path) -> Source:
    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with path.open("rb") as file:
        length = None if path.suffix == ".gz" else sum(1 for line in file if line.strip())
    return Source(path.name, path.parent, partial(_lines, path), _load_json, digest, length)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", line.strip()
    except _DAMAGE as error:
        raise RecordError(f"{path} cannot be read to its end: {error}", "damaged file") from error


def _load_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # of letters, of form, or nested without end
        raise RecordError(f"not JSON: {error}", "not JSON") from None


# ---- folders ----


def _folder_with_metadata(root: Path, files: list[Path]) -> Source:
    def entries() -> Iterator[tuple[str, tuple[str, bytes]]]:
        for file in files:
            folder = file.parent.relative_to(root).as_posix()
            for place, line in _lines(file):
                yield f"{file.relative_to(root)} {place}", (folder, line)

    return Source(root.name, root, entries, _from_metadata, partial(_digest_files, files))


def _from_metadata(entry: tuple[str, bytes]) -> Record:
    """A line of metadata.jsonl: file_name and <kind>_file_name become media, the rest stays."""
    folder, line = entry
    given = _load_json(line)
    if not isinstance(given, dict):
        raise RecordError(f"expected a JSON object, got {type(given).__name__}")
    record = _split_of(PurePosixPath(folder))
    for key, value in given.items():
        if key != "file_name" and not key.endswith("_file_name"):
            record[key] = value
            continue
        if not isinstance(value, str):
            raise RecordError(f"{key}: expected a path, got {value!r:.80}")
        kind = key.removesuffix("file_name").removesuffix("_") or _key_of(_stem_and_suffix(value)[1])
        record[kind] = (PurePosixPath(folder) / value).as_posix()
    return record


def _folder(root: Path) -> Source:
    groups: dict[str, dict[str, str]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        stem, suffix = _stem_and_suffix(name)
        if suffix and path.is_file() and not re.search(r"(^|/)\.", name):
            groups.setdefault(stem, {})[suffix] = name
    if not groups:
        raise RecordError(
            f"{root} holds no record: neither {METADATA}, nor .tar or .parquet files, nor media"
        )
    words = [name for members in groups.values() for name in members.values() if name.lower().endswith(WORDS)]

    def entries() -> Iterator[tuple[str, tuple[Path, dict[str, str], bool]]]:
        for stem, members in groups.items():
            yield stem, (root, members, bool(words))

    def digest() -> str:
        names = [name for members in groups.values() for name in members.values()]
        sizes = "".join(f"{name}\0{(root / name).stat().st_size}\0" for name in names)
        return hashlib.sha256((sizes + _digest_files(root / name for name in words)).encode()).hexdigest()

    return Source(root.name, root, entries, _from_files, digest, len(groups))


def _stem_and_suffix(name: str) -> tuple[str, str]:
    """ "a/cat.v2.video.webp" is ("a/cat.v2", "video.webp"); no suffix for a file that is no part of a record."""
    for one in (*WORDS, *(one for formats in SUFFIXES.values() for one in formats)):
        if name.lower().endswith(one) and one != ".md":
            stem = name[: -len(one)]
            kind = PurePosixPath(stem).suffix
            kind = kind if kind[1:] in SUFFIXES.keys() | MODALITIES.keys() else ""
            return stem.removesuffix(kind), f"{kind}{one}"[1:]
    return name, ""


def _from_files(entry: tuple[Path, dict[str, str], bool]) -> Record:
    root, members, captioned = entry
    path = PurePosixPath(next(iter(members.values())))
    record = _split_of(path) | _from_members(members, lambda name: (root / str(name)).read_bytes())
    if not captioned:
        record |= {} if path.parent.name in ("", *SPLIT_FOLDERS) else {"text": path.parent.name}
    return record


def _split_of(path: PurePosixPath) -> Record:
    top = path.parts[:1]
    return {"split": top[0]} if top and top[0] in SPLIT_FOLDERS else {}


def _key_of(suffix: str) -> str:
    """The record key of a file: what is written before the format ("video.webp"), else the kind of its format."""
    for kind, formats in SUFFIXES.items():
        for one in formats:
            if f".{suffix}".endswith(one):
                return suffix[: -len(one)] or kind
    return suffix


def _from_members(members: Mapping[str, Any], read: Callable[[Medium], bytes]) -> Record:
    """The record of the files of one sample, {suffix: path or Blob}."""
    record: Record = {}
    for suffix, value in members.items():
        key = _key_of(suffix)
        if suffix == "json":
            found = _load_json(read(value))
            if not isinstance(found, dict):
                raise RecordError(f"expected a JSON object, got {type(found).__name__}")
            record |= found
        elif f".{suffix}".endswith((".txt", ".cls")):
            record[key] = _text(read(value))
        else:
            record[key] = value
    if "messages" in record:
        _name_members(record, members)
    return record


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RecordError(f"the text is not UTF-8: {error}") from None


def _name_members(record: Record, members: Mapping[str, Any]) -> None:
    """Replace names of files of the same sample in a conversation's parts by those files."""
    known = dict(members) | {PurePosixPath(_name(value)).name: value for value in members.values()}
    for message in record["messages"] if isinstance(record["messages"], list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and isinstance(part.get(kind), str) and kind != "text":
                part[kind] = known.get(part[kind], part[kind])


def _name(value: Medium) -> str:
    return value.name if isinstance(value, Blob) else value


# ---- webdataset tars ----


def _tars(name: str, files: list[Path]) -> Source:
    def entries() -> Iterator[tuple[str, list[tuple[str, Blob]]]]:
        for file in files:
            for key, found in groupby(_members(file), key=lambda one: one[0]):
                yield f"{key} in {file.name}", [(suffix, blob) for _, suffix, blob in found]

    return Source(name, files[0].parent, entries, _from_blobs, partial(_digest_files, files))


class _Member(tarfile.TarInfo):
    """A header that has to be there: `tarfile` takes a cut or damaged one, but the first, for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def _members(path: Path) -> Iterator[tuple[str, str, Blob]]:
    """(key, suffix, content) of the files of a tar, as they come."""
    try:
        with tarfile.open(path, tarinfo=_Member) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # they would be kept for a second look
                match = _KEY.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
                file = tar.extractfile(member) if match else None
                if match and file is not None:
                    yield match[1], match[2].lower(), Blob(f"{path.name}/{match[0]}", file.read())
    except _DAMAGE as error:
        raise RecordError(f"{path} cannot be read to its end: {error}", "damaged file") from error


def _from_blobs(entry: list[tuple[str, Blob]]) -> Record:
    members: dict[str, Medium] = dict(entry)
    if len(members) < len(entry):
        raise RecordError(f"two members of one name: {', '.join(suffix for suffix, _ in entry)}")
    return _from_members(members, lambda blob: blob.data if isinstance(blob, Blob) else b"")


# ---- Hugging Face datasets ----


def _load(name: str, load: Callable[[Any], Any]) -> Any:
    """What `datasets` loads; RecordError if it is not installed, or with its words if it cannot."""
    try:
        import datasets
    except ImportError as error:
        raise RecordError(
            f"reading {name} needs Hugging Face datasets: pip install 'anytoken[data]'"
        ) from error
    try:
        return load(datasets)
    except (
        Exception
    ) as error:  # it and Arrow raise a family of their own: damaged, offline, unknown, gated...
        raise RecordError(f"{name} does not open: {' '.join(str(error).split())}", "damaged file") from error


def _tables(name: str, files: list[Path]) -> Source:
    form, paths = files[0].suffix.lower()[1:], {"all": [str(file) for file in files]}
    found = _load(name, lambda datasets: datasets.load_dataset(form, data_files=paths, streaming=True))
    return _dataset(found["all"], name, partial(_digest_files, files), files[0].parent)


def _hub(name: str) -> Source:
    owner_and_name, _, configuration = name.partition(":")
    found = _load(
        f"hf:{name}",
        lambda datasets: datasets.load_dataset(owner_and_name, configuration or None, streaming=True),
    )
    return _dataset(found, name, partial(_digest_object, found))


def _digest_object(found: Any) -> str:
    """sha256 over what `datasets` tells of a set: its fingerprint, or for a stream its name, version and features."""
    splits = dict(found) if isinstance(found, Mapping) else {None: found}
    told = [f"{split} {getattr(one, '_fingerprint', one.info)}" for split, one in splits.items()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _dataset(found: Any, name: str, digest: Callable[[], str], root: Path = Path()) -> Source:
    """Rows of a Dataset or IterableDataset, or of a dictionary of them by split; media stay encoded."""
    splits = dict(found) if isinstance(found, Mapping) else {None: found}
    if not splits or not all(hasattr(one, "features") for one in splits.values()):
        raise RecordError(f"expected a path or a `datasets` object, got {type(found).__name__}")
    streams = {split: _encoded(one) for split, one in splits.items()}

    def entries() -> Iterator[tuple[str, tuple[str | None, Any]]]:
        for split, stream in streams.items():
            try:
                for number, row in enumerate(stream):
                    yield f"row {number}" + (f" of {split}" if split else ""), (split, row)
            except RecordError:
                raise
            except Exception as error:
                raise RecordError(f"{name} cannot be read to its end: {error}", "damaged file") from error

    lengths = [len(one) if hasattr(one, "__len__") else None for one in splits.values()]
    total = None if None in lengths else sum(n for n in lengths if n is not None)
    return Source(name, root, entries, _from_row, digest, total)


def _encoded(rows: Any) -> Any:
    """Rows one by one, with their media as they are kept."""
    stream = rows.to_iterable_dataset() if hasattr(rows, "to_iterable_dataset") else rows
    return stream.decode(False) if stream.features else stream


def _from_row(entry: tuple[str | None, Any]) -> Record:
    split, row = entry
    return ({"split": split} if split else {}) | {
        key: _plain(value, key) for key, value in row.items() if value is not None
    }


def _plain(value: Any, name: str) -> Any:
    """A cell without the nulls that Arrow fills structures up with; encoded media as Blobs or paths."""
    if isinstance(value, bytes):
        return Blob(name, value)
    if isinstance(value, list):
        return [_plain(one, name) for one in value]
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"}:
            data, path = value["bytes"], value["path"]
            if data is None and "://" in str(path):
                data = _fetch(path)
            return path if data is None else Blob(path or name, data)
        return {key: _plain(one, key) for key, one in value.items() if one is not None}
    return value


def _fetch(url: str) -> bytes:
    """A medium that a streamed set only points at."""
    import fsspec  # comes with datasets

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except Exception as error:  # of as many kinds as there are protocols
        raise RecordError(f"{url} cannot be fetched: {error}", "missing file") from error
