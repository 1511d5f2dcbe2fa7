"""Records of JSON files: one per line (`.jsonl`, also gzipped), or a list in a `.json`."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from anytoken.data.records import Source
from anytoken.utils.errors import RecordError
from anytoken.utils.json_lines import DAMAGE, load_json, numbered_lines


def json_lines(path: Path) -> Source:
    """A .jsonl file, gzipped or not."""
    with path.open("rb") as file:
        length = None if path.suffix == ".gz" else sum(1 for line in file if line.strip())
    return Source(
        path.name, path.parent, partial(lines, path), parse_json, partial(digest_file, path), length
    )


def json_list(path: Path) -> Source:
    """A .json file with a list of records, as used by LLaVA and LLaMA-Factory."""

    def entries() -> Iterator[tuple[str, Any]]:
        found = parse_json(path.read_bytes())
        if not isinstance(found, list):
            raise RecordError(f"{path} holds no list of records but {type(found).__name__}; write JSON lines")
        for number, record in enumerate(found, start=1):
            yield f"record {number}", record

    return Source(path.name, path.parent, entries, as_is, partial(digest_file, path))


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file with their numbers; RecordError if it is damaged."""
    try:
        for number, line in numbered_lines(path):
            yield f"line {number}", line.strip()
    except DAMAGE as error:
        raise RecordError(f"{path} cannot be read completely: {error}", "damaged file") from error


def parse_json(line: bytes) -> Any:
    """The value of a line; RecordError if it is not JSON."""
    try:
        return load_json(line)
    except ValueError as error:
        raise RecordError(str(error), "not JSON") from None


def as_is(entry: Any) -> Any:
    """The entry itself, for entries that are records already."""
    return entry


def digest_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
