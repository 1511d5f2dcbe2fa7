"""Records from FASTA and a table of labels, the usual format of sequence classification sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anytoken.data.dataset_card import write_lines
from anytoken.data.sources import read_records
from anytoken.segments import DNA
from anytoken.utils.errors import RecordError


def label_fasta(fasta: str | Path, labels: str | Path, out: str | Path) -> Path:
    """Write OUT, a JSONL of {"dna", "name", "label", ...}, a line per sequence, in the order of the FASTA file.

    labels: .csv, .tsv or .jsonl with the columns name and label; other columns, such as split, are kept. A sequence's
    name is the first word of its header. RecordError for a sequence without a label, a label without a sequence, or a
    name that appears twice.
    """
    table: dict[str, dict[str, Any]] = {}
    for row in read_records(labels):
        if "name" not in row or "label" not in row:
            raise RecordError(f"{labels}: a row needs the columns name and label; it has {', '.join(row)}")
        if row["name"] in table:
            raise RecordError(f"{labels}: the name {row['name']!r:.80} appears twice")
        table[row["name"]] = row
    lines: dict[str, dict[str, Any]] = {}
    for one in DNA.iter_records(fasta):
        name = (one.name.split() or [""])[0]
        if name in lines:
            raise RecordError(f"{fasta}: the name {name!r:.80} appears twice")
        if name not in table:
            raise RecordError(f"{fasta}: the sequence {name!r:.80} has no label in {labels}")
        lines[name] = {**table[name], "dna": one.bases}
    if left := sorted(set(table) - set(lines)):
        raise RecordError(
            f"{labels}: there is no sequence for {len(left)} labels; the first: {left[0]!r:.80}"
        )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, lines.values())
    return path
