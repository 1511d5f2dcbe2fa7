"""Records of a `.csv` or `.tsv` file: one per row, with the keys in the first line."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from anytoken.data.records import Record, Source
from anytoken.data.sources.json_files import as_is, digest_file, parse_json
from anytoken.utils.errors import RecordError
from anytoken.utils.json_lines import check_unicode

SHEETS = (".csv", ".tsv")
LISTED = ("messages", "conversations", "images", "videos", "audios")  # cells that hold JSON lists
CELLS = 1 << 30  # letters of a cell, of which the csv module allows few


def csv_source(path: Path) -> Source:
    """The records of a .csv or .tsv file."""
    return Source(path.name, path.parent, partial(csv_rows, path), as_is, partial(digest_file, path))


def csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a .csv or .tsv file as {column: cell} without the empty cells; a bad row gives its error."""
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
                entry = BadRow(RecordError(f"not CSV: {error}", "not CSV"))
            except RecordError as error:
                if header is None:
                    raise
                entry = BadRow(error)
            if entry:
                yield f"line {start}", entry


class BadRow(dict[str, Any]):
    """A row that is not a record: {"error": reason}."""

    def __init__(self, error: RecordError) -> None:
        super().__init__(error=error)


def _header(path: Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) < len(names) or "" in names:
        raise RecordError(f"{path} line 1: column names must be present and distinct; got {row!r:.200}")
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
            record[name] = parse_json(cell.encode())
        elif cell:
            record[name] = cell
    return record
