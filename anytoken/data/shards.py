"""Tokenize media once: records of any source to folders of codes, resumable, with many workers or on a cluster.

A shard folder holds ``manifest.json`` and numbered parts. A part is a safetensors file with, for each
modality, ``values`` uint16 [sum of N, Q] (int32 in parts with a code over 65,535), ``offsets`` int64 [R + 1], ``sizes``
int32 [R, axes] and, where there are global codes, ``headers`` int32 [R, G], next to a JSONL file with the records; each
line names the rows of its codes. With ``first_frames`` there are image codes of the first frame of every video, too, in
the order of the videos.
Codes are stored, not ids, so shards outlive a new text vocabulary and appended modalities; the manifest's fingerprints
tie them to the tokenizers that wrote them, and its checksums to the bytes that were written.

Until the folder is complete it has no manifest but ``progress.jsonl``: a first line with the settings, then one line
per finished part. A killed run loses only the parts in progress.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from anytoken.data.parallel import run
from anytoken.data.records import Record, Source
from anytoken.data.shard_worker import FIRST_FRAME, Entry, Job, Skipped, Tokenizers, encode_part, part_names
from anytoken.data.sources import open_source
from anytoken.tokenizers.base import Codes, ModalityTokenizer, load_tokenizer
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError, RecordError
from anytoken.utils.json_lines import read_json_lines
from anytoken.utils.limits import current_limits

MANIFEST, PROGRESS = "manifest.json", "progress.jsonl"
_PART = re.compile(r"\.?part-\d{5}\.(jsonl|safetensors).*")
FEW = 1000  # while a source is being read, the share of bad records is taken over at least this many
log = logging.getLogger(__name__)


def load_tokenizers(folder: str | Path) -> dict[str, ModalityTokenizer]:
    """All modality tokenizers in the subfolders of a folder (a checkpoint's ``tokenizers``), without text."""
    found = {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/config.json"))}
    tokenizers = [load_tokenizer(path) for name, path in found.items() if name != "text"]
    if not tokenizers:
        raise DataError(
            f"{folder} holds no tokenizer; expected folders such as {folder}/image with a config.json"
        )
    return {tokenizer.name: tokenizer for tokenizer in tokenizers}


# ---- writing ----


def tokenize_records(
    records: Any,
    tokenizers: Tokenizers,
    out: str | Path,
    workers: int = 1,
    part_size: int = 512,
    batch_size: int = 32,
    progress: bool = True,
    max_bad: float = 0.01,
    engine: str = "local",
    rename: Mapping[str, str] | None = None,
    data_root: str | Path | None = None,
    overwrite: bool = False,
    first_frames: bool = False,
) -> Path:
    """Encode every medium of a source (see ``sources/``) into the shard folder ``out``; finished parts are kept.

    The bytes are the same for any number of workers and either engine (see ``parallel.py``). DataError if ``out``
    holds shards of other records or tokenizers, or anything else; with ``overwrite`` shards are replaced, and no other
    file is touched. Media are below the source's folder, or below ``data_root``. Records that cannot be read or
    encoded are left out and counted by reason in the manifest; RecordError if there is none, or as soon as the share of
    bad ones exceeds ``max_bad`` (while the total is unknown: of those read, at least a thousand).
    first_frames: encode the first frame of every video as an image, too, for a `Processor` that reads them; DataError
    without tokenizers of both.
    """
    if first_frames and not {"image", "video"} <= set(tokenizers):
        raise DataError(
            f"first_frames needs tokenizers of image and video; there are {', '.join(tokenizers)}"
        )
    source, out = open_source(records, rename, data_root), Path(out)
    tokenizers = {kind: tokenizer.eval() for kind, tokenizer in tokenizers.items()}
    plan = {
        "version": 2,
        "source": source.name,
        "source_sha256": source.digest(),
        "rename": dict(rename or {}),
        "offered": {kind: tokenizer.fingerprint() for kind, tokenizer in tokenizers.items()},
        "part_size": part_size,
        **({"first_frames": True} if first_frames else {}),
    }
    if _is_whole(out, plan):
        (out / PROGRESS).unlink(missing_ok=True)
        return out
    tally = _Tally(source, max_bad, _begin(out, plan, overwrite))
    if source.unused:
        log.warning("%s: %d files are no part of a record; the first: %s",
                    source.name, len(source.unused), source.unused[0])  # fmt: skip
    root = Path(data_root) if data_root else None
    jobs = (
        Job(index, source.parse, source.root, chunk, batch_size, root, current_limits(), first_frames)
        for index, chunk in enumerate(_chunks(source, part_size))
        if index not in tally.parts
    )
    shown = {"desc": f"tokenize {source.name}", "unit": "rec", "disable": not progress}
    with (
        tqdm(total=source.length, initial=tally.read, **shown) as bar,  # type: ignore[call-overload]
        (out / PROGRESS).open("a", encoding="utf-8") as journal,
    ):
        for files, entry in run(encode_part, tokenizers, jobs, workers, engine):
            tally.add(entry)
            for name, data in files.items():
                write_file(out / name, data)
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            bar.update(entry["read"])
    tally.close()
    for reason, (number, example) in tally.skipped.items():
        log.warning("%s: %d left out, %s; the first: %s", source.name, number, reason, example)
    _finish(out, plan, tally)
    return out


def _chunks(source: Source, size: int) -> Iterator[list[tuple[str, Any]]]:
    """The entries of each part."""
    entries = source.entries()
    while chunk := list(islice(entries, size)):
        yield chunk


class _Tally:
    """Counts of the records so far, and whether too many are bad."""

    def __init__(self, source: Source, max_bad: float, parts: dict[int, Entry]) -> None:
        self.name, self.expected, self.max_bad = source.name, source.length or FEW, max_bad
        self.parts = parts
        self.read = sum(part["read"] for part in parts.values())
        self.records = sum(part["records"] for part in parts.values())

    @property
    def skipped(self) -> Skipped:
        """All reasons, with the first example of each."""
        total: Skipped = {}
        for _, part in sorted(self.parts.items()):
            for reason, (number, example) in part["skipped"].items():
                total.setdefault(reason, [0, example])[0] += number
        return total

    def add(self, entry: Entry) -> None:
        """Count a part; RecordError once the bad records must exceed the allowed share."""
        self.parts[entry["part"]] = entry
        self.read += entry["read"]
        self.records += entry["records"]
        self._check(max(self.read, self.expected))

    def close(self) -> None:
        """RecordError if there is no record, or too many are bad."""
        if not self.read:
            raise RecordError(f"{self.name} holds no record")
        self._check(self.read)

    def _check(self, total: int) -> None:
        bad = self.read - self.records
        spared = 1 if self.max_bad and self.records else 0  # of a small set one is more than any share
        if bad > max(self.max_bad * total, spared):
            reasons = "; ".join(
                f"{number} {reason}, {example}" for reason, (number, example) in self.skipped.items()
            )
            raise RecordError(
                f"{self.name}: {bad} of the {self.read} records read are bad, more than the share {self.max_bad} that "
                f"max_bad allows ({reasons}); `anytoken data check` lists them"
            )


# ---- what is done already ----


def _is_whole(out: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the folder is complete for this plan; a set of version 1 counts unless something contradicts."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_manifest(out)
    if manifest.get("version") == 1:
        offered, parts = plan["offered"], range(manifest["parts"])
        return (
            all(manifest.get(key) == plan[key] for key in ("source_sha256", "part_size"))
            and all(offered.get(kind) == made for kind, made in manifest.get("tokenizers", {}).items())
            and all((out / name).is_file() for index in parts for name in part_names(index))
        )
    same = all(manifest.get(key) == value for key, value in plan.items())
    return same and all(_files_fit(out, part) for part in manifest["written"])


def _begin(out: Path, plan: Mapping[str, Any], overwrite: bool) -> dict[int, Entry]:
    """Start or resume a folder: returns the complete parts of exactly this plan; all other parts are removed."""
    before = _found(out, plan, overwrite)
    same = before.get("plan") == plan
    if before and not same:
        if before["written"] and not overwrite:
            raise DataError(
                f"{out} holds shards of other records, settings or tokenizers; choose another folder, or replace "
                "them with --overwrite"
            )
        log.warning("%s held shards of other records or tokenizers; they are replaced", out)
    done = {part["part"]: part for part in before["written"] if _files_fit(out, part)} if same else {}
    out.mkdir(parents=True, exist_ok=True)
    kept = {name for part in done.values() for name in part["files"]}
    for stale in out.iterdir():
        if _PART.fullmatch(stale.name) and stale.name not in kept:
            stale.unlink()
    lines = "".join(json.dumps(one) + "\n" for one in (plan, *done.values()))
    write_file(out / PROGRESS, lines)
    (out / MANIFEST).unlink(missing_ok=True)
    return done


def _found(out: Path, plan: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """Plan and parts of the shards in a folder; DataError if it holds something else that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder")
    try:
        if (out / MANIFEST).is_file():
            before = read_manifest(out)
            if "source_sha256" in before:
                return {"plan": {key: before.get(key) for key in plan}, "written": before.get("written", [])}
        elif (out / PROGRESS).is_file():
            return _read_progress(out / PROGRESS)
    except DataError:
        if overwrite:
            return {}
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise DataError(
            f"{out} holds files and no shards of this command; choose a new folder, or write the shards into it with "
            "--overwrite"
        )  # fmt: skip
    return {}


def _read_progress(path: Path) -> dict[str, Any]:
    """The plan and the parts of a journal whose last line may be incomplete; DataError for another file."""
    try:
        found = list(read_json_lines(path, torn_end=True))
    except DataError as error:
        raise DataError(f"{path} is damaged ({error}); remove it and tokenize again") from None
    if any("files" not in part for part in found[1:]) or (found and "source_sha256" not in found[0]):
        raise DataError(f"{path} is not a journal of `anytoken data tokenize`")
    return {"plan": found[0], "written": found[1:]} if found else {}


def _files_fit(out: Path, part: Entry) -> bool:
    return all(
        (out / name).is_file() and (out / name).stat().st_size == file["bytes"]
        for name, file in part["files"].items()
    )


def _finish(out: Path, plan: Mapping[str, Any], tally: _Tally) -> None:
    """Replace the journal by the manifest."""
    parts = [part for _, part in sorted(tally.parts.items())]
    used = {kind for part in parts for kind in part["kinds"]}
    manifest = {
        **plan,
        "tokenizers": {kind: made for kind, made in plan["offered"].items() if kind in used},
        "parts": len(parts),
        "records": tally.records,
        "skipped": tally.skipped,
        "written": parts,
    }
    write_file(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (out / PROGRESS).unlink()


# ---- reading ----


def is_shards(path: str | Path) -> bool:
    """Whether a path is a shard folder, finished or not."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, PROGRESS))


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a shard folder; DataError if it has none, or one that cannot be read."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        if (path / PROGRESS).is_file():
            raise DataError(f"{path} is unfinished; rerun `anytoken data tokenize` to resume it")
        raise DataError(
            f"{path} is not a shard folder (no {MANIFEST}); make it with `anytoken data tokenize`"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        _ = manifest["parts"] + manifest["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / MANIFEST} is damaged ({error!r}); remove it and tokenize again") from None
    return manifest


def verify_shards(path: str | Path, checksums: bool = True) -> dict[str, Any]:
    """The manifest, after checking the size (and the sha256, if `hashes`) of every file.

    DataError names a file that differs. A set of version 1 has no sizes: its files only have to exist.
    """
    path, manifest = Path(path), read_manifest(path)
    written = manifest.get(
        "written", [{"files": dict.fromkeys(part_names(i))} for i in range(manifest["parts"])]
    )
    for name, file in ((name, file) for part in written for name, file in part["files"].items()):
        if not (path / name).is_file():
            raise DataError(f"{path} is unfinished ({name} is missing); run `anytoken data tokenize` again")
        if file is None:
            continue
        fits = (path / name).stat().st_size == file["bytes"]
        if fits and checksums:
            with (path / name).open("rb") as data:
                fits = hashlib.file_digest(data, "sha256").hexdigest() == file["sha256"]
        if not fits:
            raise DataError(
                f"{path / name} does not match its checksum; remove it and run `anytoken data tokenize` again"
            )
    return manifest


class Shards:
    """A tokenized set: ``records[i]`` is the JSON object, ``codes(i, kind)`` its codes, read from disk as needed."""

    def __init__(self, path: str | Path, tokenizers: Tokenizers, verify: bool = False) -> None:
        """Open a shard folder; DataError if it is missing, unfinished, damaged or made by other tokenizers.

        verify: compare the checksum of every file, not its size alone.
        """
        self.path = Path(path)
        self.manifest = verify_shards(path, checksums=verify)
        self._check_tokenizers(tokenizers)
        self.records: list[Record] = []
        self._rows: list[dict[str, int]] = []
        self._part_of: list[int] = []
        self._arrays: list[dict[str, tuple[np.ndarray, ...]]] = []  # kind -> values, offsets, sizes, headers
        for index in range(self.manifest["parts"]):
            self._read_part(index)

    def _check_tokenizers(self, tokenizers: Tokenizers) -> None:
        made = self.manifest.get("tokenizers")
        if made is None:
            log.warning(
                "%s does not say which tokenizers made it, so codes of others would not be noticed; "
                "tokenize its records again with `anytoken data tokenize`", self.path,
            )  # fmt: skip
        for kind, written in (made or {}).items():
            if kind in tokenizers and tokenizers[kind].fingerprint() != written:
                raise DataError(
                    f"{self.path} was written by another {kind} tokenizer (fingerprint {written[:12]}, the "
                    f"checkpoint's is {tokenizers[kind].fingerprint()[:12]}); tokenize the records again"
                )

    def _read_part(self, index: int) -> None:
        lines, arrays = (self.path / name for name in part_names(index))
        try:
            found = load_file(arrays)
            kinds = {name.partition(".")[0] for name in found}
            for kind in kinds:
                found.setdefault(f"{kind}.headers", torch.zeros(len(found[f"{kind}.sizes"]), 0))
            names = ("values", "offsets", "sizes", "headers")
            self._arrays.append(
                {kind: tuple(found[f"{kind}.{name}"].numpy() for name in names) for kind in kinds}
            )
            entries = list(read_json_lines(lines))
            self.records += [entry["record"] for entry in entries]
            self._rows += [entry["rows"] for entry in entries]
            self._part_of += [index] * len(entries)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(
                f"{arrays} or {lines.name} is damaged ({error}); tokenize the records again"
            ) from error

    def __len__(self) -> int:
        return len(self.records)

    def has(self, index: int, kind: str) -> bool:
        """Whether record ``index`` holds codes of ``kind``."""
        return kind in self._rows[index]

    @property
    def lack_first_frames(self) -> bool:
        """Whether there are videos without the image codes of their first frames."""
        return any("video" in arrays and FIRST_FRAME not in arrays for arrays in self._arrays)

    def first_frame(self, index: int, row: int | None = None) -> Codes:
        """The image codes of the first frame of a video; ``row`` picks a content part of a conversation."""
        return self._codes(index, FIRST_FRAME, self._rows[index]["video"] if row is None else row)

    def codes(self, index: int, kind: str, row: int | None = None) -> Codes:
        """The codes of one medium of record ``index``; ``row`` picks a content part of a conversation."""
        return self._codes(index, kind, self._rows[index][kind] if row is None else row)

    def _codes(self, index: int, name: str, row: int) -> Codes:
        values, offsets, sizes, headers = self._arrays[self._part_of[index]][name]
        own = values[offsets.item(row) : offsets.item(row + 1)].astype(np.int32)
        return Codes(own, sizes[row].tolist(), headers[row])
