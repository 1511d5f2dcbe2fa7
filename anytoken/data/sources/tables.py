"""Sets of Hugging Face `datasets`: Parquet and Arrow files, saved folders, the hub, and objects in Python.

Media stay encoded; a ClassLabel becomes its name, and the text of a record without one.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from anytoken.data.records import Blob, Record, Source
from anytoken.media_io import read_rest
from anytoken.utils.errors import MediaLimitError, RecordError

TABLES = (".parquet", ".arrow")


def digest_files(paths: Iterable[Path]) -> str:
    """sha256 over the sha256 of each file."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def saved_folder(path: Path) -> Source | None:
    """The set in a folder written by `save_to_disk` or with Parquet files; None for another folder."""
    digest = partial(digest_files, sorted(one for one in path.rglob("*") if one.suffix in TABLES))
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        saved = _load(str(path), lambda datasets: datasets.load_from_disk(str(path)))
        return _dataset(saved, path.name, digest, path)
    if next(path.rglob("*.parquet"), None):  # a clone from the hub, perhaps: file names tell the splits
        parquet = _load(str(path), lambda datasets: datasets.load_dataset(str(path), streaming=True))
        return _dataset(parquet, path.name, digest, path)
    return None


def rows_of(found: Any) -> Source:
    """The set of a `datasets` object; RecordError for any other object."""
    return _dataset(found, type(found).__name__, partial(_digest_object, found))


def _load(name: str, load: Callable[[Any], Any]) -> Any:
    """Load with `datasets`; RecordError if it is not installed or fails."""
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
        raise RecordError(
            f"{name} cannot be opened: {' '.join(str(error).split())}", "damaged file"
        ) from error


def table_files(name: str, files: list[Path]) -> Source:
    """The rows of Parquet or Arrow files."""
    form, paths = files[0].suffix.lower()[1:], {"all": [str(file) for file in files]}
    found = _load(name, lambda datasets: datasets.load_dataset(form, data_files=paths, streaming=True))
    return _dataset(found["all"], name, partial(digest_files, files), files[0].parent)


def hub(name: str) -> Source:
    """The rows of a set on the hub, ``owner/name`` or ``owner/name:configuration``, streamed."""
    owner_and_name, _, configuration = name.partition(":")
    found = _load(
        f"hf:{name}",
        lambda datasets: datasets.load_dataset(owner_and_name, configuration or None, streaming=True),
    )
    # No local file is part of a set on the hub: nothing lies below a device.
    return _dataset(found, name, partial(_digest_object, found), Path(os.devnull))


def _digest_object(found: Any) -> str:
    """sha256 over the identity of a set: its fingerprint, or for a stream its name, version and features."""
    splits = dict(found) if isinstance(found, Mapping) else {None: found}
    parts = [f"{split} {getattr(one, '_fingerprint', one.info)}" for split, one in splits.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
                raise RecordError(f"{name} cannot be read completely: {error}", "damaged file") from error

    lengths = [len(one) if hasattr(one, "__len__") else None for one in splits.values()]
    total = None if None in lengths else sum(n for n in lengths if n is not None)
    parse = partial(_from_row, _class_names(list(splits.values())))
    return Source(name, root, entries, parse, digest, total)


def _class_names(splits: list[Any]) -> dict[str, list[str]]:
    """The class names of ClassLabel columns."""
    return {
        key: feature.names
        for rows in splits
        for key, feature in (rows.features or {}).items()
        if hasattr(feature, "int2str")
    }


def _encoded(rows: Any) -> Any:
    """Rows one by one, with their media still encoded."""
    stream = rows.to_iterable_dataset() if hasattr(rows, "to_iterable_dataset") else rows
    return stream.decode(False) if stream.features else stream


def _from_row(classes: Mapping[str, list[str]], entry: tuple[str | None, Any]) -> Record:
    split, row = entry
    record: Record = {"split": split} if split else {}
    record |= {key: _plain(value, key) for key, value in row.items() if value is not None}
    for key, names in classes.items():
        if isinstance(number := record.pop(key, None), int) and 0 <= number < len(names):  # -1: no label
            record[key] = names[number]
            record.setdefault("text", names[number])
    return record


def _plain(value: Any, name: str) -> Any:
    """A cell without Arrow's filler nulls; encoded media as Blobs or paths."""
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
    """Download a medium that a streamed set references."""
    import fsspec  # comes with datasets

    chain = [part.partition("://") for part in url.split("::")]
    if any(not middle or protocol.lower() in ("", "file", "local") for protocol, middle, _ in chain):
        raise RecordError(f"{url!r:.200} is on this machine; give a path in the set", "outside the data root")
    try:
        with fsspec.open(url, "rb") as file:
            return read_rest(file, url)
    except MediaLimitError:
        raise
    except Exception as error:  # of as many kinds as there are protocols
        raise RecordError(f"{url} cannot be fetched: {error}", "missing file") from error
