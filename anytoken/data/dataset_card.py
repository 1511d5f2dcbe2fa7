"""The files of a built data set: JSON lines, a manifest with checksums, and a card.

Each file is written completely or not at all, so an interrupted build never looks finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anytoken.utils.atomic import write_file
from anytoken.utils.json_lines import read_json_lines


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines to a file that appears only when it is whole."""
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return list(read_json_lines(path))


def write_card(folder: Path, title: str, about: str, facts: dict[str, Any]) -> None:
    """Write manifest.json (facts, lines and test lines of each file, checksums) and README.md (the card).

    about: paragraphs of the card. `facts["sources"]` holds {name, version, licence} of each source package.
    """
    lines = {path.name: read_lines(path) for path in sorted(folder.glob("*.jsonl"))}
    counts = {
        name: {"lines": len(rows), "test": sum(row.get("split") == "test" for row in rows)}
        for name, rows in lines.items()
    }
    manifest = {**facts, "files": counts, "sha256": checksums(folder)}
    write_file(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    files = "\n".join(f"| {name} | {one['lines']} | {one['test']} |" for name, one in counts.items())
    packages = "\n".join(
        f"| {one['name']} | {one['version']} | {one['licence']} |" for one in facts["sources"]
    )
    write_file(
        folder / "README.md",
        f"# {title}\n\n{about.strip()}\n\n| file | lines | of them held out |\n|---|---|---|\n{files}\n\n"
        f"| package | version | licence |\n|---|---|---|\n{packages}\n",
    )


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of each file of a set; a subfolder is one entry, the sha256 of its sorted list of checksums."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.is_file())
            listing = "".join(f"{sha256_of(one)}  {one.relative_to(folder).as_posix()}\n" for one in inside)
            sums[f"{path.name}/"] = hashlib.sha256(listing.encode()).hexdigest()
        elif path.name not in ("manifest.json", "README.md", "DONE"):
            sums[path.name] = sha256_of(path)
    return sums


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
