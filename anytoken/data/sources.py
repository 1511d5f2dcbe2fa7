"""Where records come from: one door to every usual form of training data.

| SOURCE | what it is |
|---|---|
| ``set.jsonl``, ``set.jsonl.gz`` | a record or conversation a line |
| ``set.json`` | a list of records or conversations |
| ``set.csv``, ``set.tsv`` | a record a row; the first line names the keys |
| a folder with ``metadata.jsonl`` or ``.csv`` | ``file_name`` (or ``<kind>_file_name``) names the medium |
| a folder of files | files of one stem are one record: ``cat.png``, ``cat.wav`` and the caption ``cat.txt`` |
| a folder of class folders | no caption anywhere: the text is the name of the folder a file is in |
| ``set.tar``, ``"set-*.tar"``, a folder of tars | webdataset: neighbouring members of one key are one record |
| ``set.parquet``, ``"set-*.parquet"``, a folder of them or of ``save_to_disk`` | Hugging Face `datasets` |
| ``hf:owner/name``, ``hf:owner/name:configuration`` | a set on the hub, streamed |
| a `datasets` object (in Python) | a Dataset, IterableDataset or a dictionary of them by split |

In folders and tars a suffix tells the kind (``.webp`` an image, ``.gif`` a video); ``cat.video.webp`` names it. A
``.json`` file gives any keys, ``messages`` too, whose parts name files of the same stem. Top folders and dataset
splits become the key ``split``, so that ``train`` is trained on and others are not.

Conversations and captions of other libraries' forms are converted by ``forms.py``. An *entry* is what is cheap to
read and to skip: a line, a group of files, a row. ``parse`` makes a record of it, perhaps in another process. Tars are
read with the standard library: the format is tar, and grouping its members takes a dozen lines.
"""

import csv
import hashlib
import mimetypes
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from anytoken.data.forms import to_record
from anytoken.data.records import (
    UNREAD_SUFFIXES,
    Blob,
    Medium,
    Record,
    RecordError,
    Source,
    bad_record,
    unread,
    validate_record,
)
from anytoken.data.tables import digest_files, hub, rows_of, saved_folder, tables
from anytoken.media_io import is_below, read_bytes
from anytoken.segments import (
    CONTAINER_SUFFIXES,
    DNA_SUFFIXES,
    IMAGE_SUFFIXES,
    SPEECH_SUFFIXES,
    TEXT_SUFFIXES,
)
from anytoken.tokenizers.base import MODALITIES
from anytoken.utils.json_lines import DAMAGE, check_unicode, load_json, numbered_lines
from anytoken.utils.limits import current_limits

SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": TEXT_SUFFIXES,
    "image": IMAGE_SUFFIXES,
    "speech": SPEECH_SUFFIXES,
    "video": (*CONTAINER_SUFFIXES, ".gif"),
    "dna": DNA_SUFFIXES,
}
WORDS = (".txt", ".json")  # read for the record itself; other files are media
METADATA = ("metadata.jsonl", "metadata.csv")
SHEETS = (".csv", ".tsv")
LISTED = ("messages", "conversations", "images", "videos", "audios")  # cells that hold JSON lists
CELLS = 1 << 30  # letters of a cell, of which the csv module allows few
SPLIT_FOLDERS = ("train", "validation", "val", "test")
TARS, TABLES = (".tar", ".tar.gz", ".tgz"), (".parquet", ".arrow")
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
              tarfile.GNUTYPE_LONGLINK)  # fmt: skip
# webdataset's key and suffix: a key ends at the first dot of the file name
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


def read_records(source: Any) -> Iterator[Record]:
    """Yield the validated records of a source, in order; see the module's docstring for what it may be.

    Raises RecordError, naming source and place, for what is missing or damaged and for the first bad record.
    """
    opened = open_source(source)
    for place, entry in opened.entries():
        try:
            record = opened.parse(entry)
        except Exception as error:
            bad = bad_record(error)
            raise RecordError(f"{opened.name} {place}: {bad}", bad.reason) from None
        yield record


def open_source(
    source: Any, rename: Mapping[str, str] | None = None, data_root: str | Path | None = None
) -> Source:
    """Find out what a source is; RecordError if it is nothing that holds records.

    rename: keys of the records that are to have another name, such as {"audio": "speech"}. data_root: a folder that
    links in a folder of files may lead to, besides the folder itself.
    """
    found = _find(source, data_root)
    return replace(found, parse=partial(_parse, found.parse, dict(rename or {})))


def _parse(parse: Callable[[Any], Any], rename: Mapping[str, str], entry: Any) -> Record:
    record = parse(entry)
    if isinstance(record, _Bad):
        raise record["error"]
    if rename and isinstance(record, dict):
        record = {rename.get(key, key): value for key, value in record.items()}
    record = to_record(record)
    validate_record(record)
    return record


def _find(source: Any, data_root: str | Path | None = None) -> Source:
    if not isinstance(source, str | Path):
        return rows_of(source)
    if str(source).startswith("hf:"):
        return hub(str(source)[3:])
    path = Path(source)
    pattern = re.search(r"[*?\[]", path.name) and not path.exists()  # a name may hold brackets of its own
    files = sorted(path.parent.glob(path.name)) if pattern else [path]
    if path.is_dir():
        return _find_in_folder(path, data_root)
    if not files or not files[0].is_file():
        raise RecordError(
            f"{source} does not exist; give a .jsonl file, a folder, .tar or .parquet files, or hf:owner/name"
        )
    names = [file.name.lower() for file in files]
    if len(files) == 1 and names[0].endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if len(files) == 1 and names[0].endswith(".json"):
        return _json_list(path)
    if len(files) == 1 and names[0].endswith(SHEETS):
        return Source(path.name, path.parent, partial(_sheet, path), _as_is, partial(_digest_file, path))
    if all(name.endswith(TARS) for name in names):
        return _tars(path.name, files)
    if all(name.endswith(TABLES) for name in names):
        return tables(path.name, files)
    raise RecordError(
        f"{source} is of no known form; allowed: .jsonl, .jsonl.gz, .json, .csv, .tsv, .tar, .tar.gz, "
        ".parquet, .arrow, a folder"
    )


def _find_in_folder(path: Path, data_root: str | Path | None) -> Source:
    if found := saved_folder(path):
        return found
    if files := sorted(one for one in path.iterdir() if one.name.lower().endswith(TARS)):
        return _tars(path.name, files)
    if files := sorted(one for name in METADATA for one in path.rglob(name)):
        for file in files:
            _check_link(file, path, data_root)
        return _folder_with_metadata(path, files)
    return _folder(path, data_root)


# ---- JSON lines ----


def _json_lines(path: Path) -> Source:
    with path.open("rb") as file:
        length = None if path.suffix == ".gz" else sum(1 for line in file if line.strip())
    return Source(
        path.name, path.parent, partial(_lines, path), _load_json, partial(_digest_file, path), length
    )


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        for number, line in numbered_lines(path):
            yield f"line {number}", line.strip()
    except DAMAGE as error:
        raise RecordError(f"{path} cannot be read to its end: {error}", "damaged file") from error


def _load_json(line: bytes) -> Any:
    try:
        return load_json(line)
    except ValueError as error:
        raise RecordError(str(error), "not JSON") from None


def _json_list(path: Path) -> Source:
    """A .json file that holds a list of records, as LLaVA and LLaMA-Factory ship theirs."""

    def entries() -> Iterator[tuple[str, Any]]:
        found = _load_json(path.read_bytes())
        if not isinstance(found, list):
            raise RecordError(f"{path} holds no list of records but {type(found).__name__}; write JSON lines")
        for number, record in enumerate(found, start=1):
            yield f"record {number}", record

    return Source(path.name, path.parent, entries, _as_is, partial(_digest_file, path))


def _as_is(entry: Any) -> Any:
    return entry


def _sheet(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a .csv or .tsv file as {column: cell} without the empty cells; a bad row is given as its error."""
    csv.field_size_limit(CELLS)
    # Bytes that are no UTF-8 become surrogates, which make the row that holds them a bad record, and no other.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            start = rows.line_num + 1
            try:
                row = next(rows, None)
                if row is None:
                    return
                header, entry = (header, _cells(header, row)) if header else (_header(path, row), None)
            except csv.Error as error:
                entry = _Bad(RecordError(f"not CSV: {error}", "not CSV"))
            except RecordError as error:
                if header is None:
                    raise
                entry = _Bad(error)
            if entry:
                yield f"line {start}", entry


class _Bad(dict[str, Any]):
    """A row that is no record: {"error": what is wrong}."""

    def __init__(self, error: RecordError) -> None:
        super().__init__(error=error)


def _header(path: Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) < len(names) or "" in names:
        raise RecordError(f"{path} line 1: the columns need names, each another one; got {row!r:.200}")
    return names


def _cells(header: list[str], row: list[str]) -> Record:
    if row and len(row) != len(header):
        raise RecordError(f"{len(row)} cells for {len(header)} columns", "not CSV")
    record: Record = {}
    for name, cell in zip(header, row, strict=False):
        try:
            check_unicode(cell)
        except ValueError:
            raise RecordError(f"the cell of {name!r:.80} is not UTF-8", "not CSV") from None
        if name in LISTED and cell.lstrip().startswith("["):
            record[name] = _load_json(cell.encode())
        elif cell:
            record[name] = cell
    return record


# ---- folders ----


def _folder_with_metadata(root: Path, files: list[Path]) -> Source:
    def entries() -> Iterator[tuple[str, tuple[str, Any]]]:
        for file in files:
            folder = file.parent.relative_to(root).as_posix()
            for place, entry in _sheet(file) if file.suffix == ".csv" else _lines(file):
                yield f"{file.relative_to(root)} {place}", (folder, entry)

    return Source(root.name, root, entries, _from_metadata, partial(digest_files, files))


def _from_metadata(entry: tuple[str, Any]) -> Record:
    """A row of metadata.jsonl or .csv: file_name and <kind>_file_name become media, the rest stays."""
    folder, found = entry
    given = _load_json(found) if isinstance(found, bytes) else found
    if not isinstance(given, dict) or isinstance(given, _Bad):
        return given  # the check of the shape says what is wrong
    record = _split_of(PurePosixPath(folder))
    for key, value in given.items():
        if key != "file_name" and not key.endswith("_file_name"):
            record[key] = value
            continue
        if not isinstance(value, str):
            raise RecordError(f"{key}: expected a path, got {value!r:.80}")
        kind = key.removesuffix("file_name").removesuffix("_") or _kind_of(value)
        record[kind] = (PurePosixPath(folder) / value).as_posix()
    return record


def _kind_of(name: str) -> str:
    """The kind of a file by its suffix; RecordError if files of this format are not read."""
    _, suffix = _stem_and_suffix(name)
    if not suffix or _is_unread(suffix):
        raise unread("file_name", name)
    return _key_of(suffix)


def _check_link(path: Path, root: Path, data_root: str | Path | None) -> Path:
    """A file of a folder; RecordError if it is a link to what is not part of the set."""
    if not is_below(path, [root, data_root]):
        raise RecordError(
            f"{path.relative_to(root)} is a link out of the folder; set data_root (--data-root) to a folder that "
            "holds the file", "outside the data root",
        )  # fmt: skip
    return path


def _folder(root: Path, data_root: str | Path | None) -> Source:
    groups: dict[str, dict[str, str]] = {}
    unused = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        stem, suffix = _stem_and_suffix(name)
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


def _stem_and_suffix(name: str) -> tuple[str, str]:
    """ "a/cat.v2.video.webp" is ("a/cat.v2", "video.webp"); no suffix for a file that is no part of a record."""
    for one in (*WORDS, *(one for formats in SUFFIXES.values() for one in formats)):
        if name.lower().endswith(one) and one != ".md":
            stem = name[: -len(one)]
            kind = PurePosixPath(stem).suffix
            kind = kind if kind[1:] in SUFFIXES.keys() | MODALITIES.keys() else ""
            return stem.removesuffix(kind), f"{kind}{one}"[1:]
    own = PurePosixPath(name).suffix.lower()
    if own and _is_unread(own[1:]):
        return name[: -len(own)], own[1:]
    return name, ""


def _is_unread(suffix: str) -> bool:
    """Whether a suffix is of media, yet of no format that is read: its record is bad, and not just without it."""
    own = f".{suffix}"
    if any(own.endswith(one) for formats in SUFFIXES.values() for one in formats):
        return False
    form = mimetypes.guess_type(f"a.{suffix.rpartition('.')[2]}")[0] or ""
    return own.endswith(UNREAD_SUFFIXES) or form.partition("/")[0] in ("image", "audio", "video")


def _from_files(data_root: str | Path | None, entry: tuple[Path, dict[str, str], bool]) -> Record:
    root, members, captioned = entry
    path = PurePosixPath(next(iter(members.values())))

    def read(name: Medium) -> bytes:
        return read_bytes(_check_link(root / str(name), root, data_root), "text")[0]

    record = _split_of(path) | _from_members(members, read)
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
        if _is_unread(suffix):
            raise unread(key, _name(value))
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

    return Source(name, files[0].parent, entries, _from_blobs, partial(digest_files, files))


class _Member(tarfile.TarInfo):
    """A header that has to be there: `tarfile` takes a cut or damaged one, but the first, for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        """A header; what extends one is read into memory at once, so it is short."""
        found = super().frombuf(buf, encoding, errors)
        if found.type in EXTENSIONS and found.size > 1 << 20:
            raise tarfile.ReadError(f"a header of {found.size:,} bytes")
        return found

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def _members(path: Path) -> Iterator[tuple[str, str, Blob]]:
    """(key, suffix, content) of the files of a tar, as they come; MediaLimitError for one of more than max_bytes."""
    limits = current_limits()
    try:
        with tarfile.open(path, tarinfo=_Member) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # they would be kept for a second look
                match = _KEY.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
                if match:  # a sparse member is zeros that the archive does not hold
                    limits.check("max_bytes", member.size, f"{match[0]} in {path.name}")
                file = tar.extractfile(member) if match else None
                if match and file is not None:
                    yield match[1], match[2].lower(), Blob(f"{path.name}/{match[0]}", file.read())
    except (*DAMAGE, tarfile.TarError) as error:
        raise RecordError(f"{path} cannot be read to its end: {error}", "damaged file") from error


def _from_blobs(entry: list[tuple[str, Blob]]) -> Record:
    members: dict[str, Medium] = dict(entry)
    if len(members) < len(entry):
        raise RecordError(f"two members of one name: {', '.join(suffix for suffix, _ in entry)}")
    return _from_members(members, lambda blob: blob.data if isinstance(blob, Blob) else b"")
