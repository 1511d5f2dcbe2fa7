"""Read training records from all common file formats.

| SOURCE | content |
|---|---|
| ``set.jsonl``, ``set.jsonl.gz`` | a record or conversation per line |
| ``set.json`` | a list of records or conversations |
| ``set.csv``, ``set.tsv`` | a record per row; the first line names the keys |
| a folder with ``metadata.jsonl`` or ``.csv`` | ``file_name`` (or ``<kind>_file_name``) names the medium |
| a folder of files | files of one stem are one record: ``cat.png``, ``cat.wav`` and the caption ``cat.txt`` |
| a folder of class folders | no caption anywhere: the text is the name of the folder a file is in |
| ``set.tar``, ``"set-*.tar"``, a folder of tars | webdataset: neighbouring members of one key are one record |
| ``set.parquet``, ``"set-*.parquet"``, a folder of them or of ``save_to_disk`` | Hugging Face `datasets` |
| ``hf:owner/name``, ``hf:owner/name:configuration`` | a set on the hub, streamed |
| a `datasets` object (in Python) | a Dataset, IterableDataset or a dictionary of them by split |

In folders and tars the suffix determines the kind (``.webp`` an image, ``.gif`` a video) unless it is named, as in
``cat.video.webp``. A ``.json`` file may contain any keys, also ``messages``, whose parts name files of the same stem.
Top folders and dataset splits become the key ``split``, so that only ``train`` is used for training.

``forms.py`` converts conversations and captions of other libraries. An *entry* is cheap to read and to skip: a line, a
group of files, a row. ``parse`` turns it into a record, possibly in another process.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from anytoken.data.forms import to_record
from anytoken.data.records import Record, Source, bad_record, validate_record
from anytoken.data.sources.csv_files import SHEETS, BadRow, csv_source
from anytoken.data.sources.folders import folder
from anytoken.data.sources.json_files import json_lines, json_list
from anytoken.data.sources.tables import TABLES, hub, rows_of, saved_folder, table_files
from anytoken.data.sources.tars import TARS, tar_files
from anytoken.utils.errors import RecordError


def read_records(source: Any) -> Iterator[Record]:
    """Yield the validated records of a source, in order; the module's docstring lists the forms.

    RecordError names source and location of a missing or damaged file or the first bad record.
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
    """Detect the form of a source; RecordError if it has no records.

    rename: keys of the records to rename, such as {"audio": "speech"}. data_root: an additional folder that links in a
    folder of files may point to.
    """
    found = _find(source, data_root)
    return replace(found, parse=partial(_parse, found.parse, dict(rename or {})))


def _parse(parse: Callable[[Any], Any], rename: Mapping[str, str], entry: Any) -> Record:
    record = parse(entry)
    if isinstance(record, BadRow):
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
        return json_lines(path)
    if len(files) == 1 and names[0].endswith(".json"):
        return json_list(path)
    if len(files) == 1 and names[0].endswith(SHEETS):
        return csv_source(path)
    if all(name.endswith(TARS) for name in names):
        return tar_files(path.name, files)
    if all(name.endswith(TABLES) for name in names):
        return table_files(path.name, files)
    raise RecordError(
        f"{source} has an unknown format; allowed: .jsonl, .jsonl.gz, .json, .csv, .tsv, .tar, .tar.gz, "
        ".parquet, .arrow, a folder"
    )


def _find_in_folder(path: Path, data_root: str | Path | None) -> Source:
    if found := saved_folder(path):
        return found
    if files := sorted(one for one in path.iterdir() if one.name.lower().endswith(TARS)):
        return tar_files(path.name, files)
    return folder(path, data_root)
