"""Tokenize media once: JSONL records to folders of codes, resumable and with many workers.

A shard folder holds ``manifest.json`` and numbered parts. A part is a safetensors file with, for each
modality, ``values`` int32 [sum of N, Q], ``offsets`` int64 [R + 1] and ``sizes`` int32 [R, axes], beside a
JSONL file with the records; a line says which row of which modality holds its codes. Codes are stored, not
ids, so shards outlive a new text vocabulary and appended modalities; the manifest's fingerprints tie them to
the tokenizers that wrote them.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from anytoken.data.records import RecordError, media_parts, open_media, read_records
from anytoken.tokenizers.base import Codes, ModalityTokenizer, load_tokenizer

MANIFEST = "manifest.json"
_worker_tokenizers: dict[str, ModalityTokenizer] = {}


class ShardError(ValueError):
    """A shard folder that is missing, incomplete, or written by other tokenizers."""


def tokenize_records(
    records: str | Path,
    tokenizers: Mapping[str, ModalityTokenizer],
    out: str | Path,
    workers: int = 1,
    part_size: int = 512,
    batch_size: int = 32,
    progress: bool = True,
) -> Path:
    """Encode every media file of a JSONL file into the shard folder ``out``; finished parts are not redone.

    The result is the same for any number of workers. If ``out`` was written from other records or other
    tokenizers it is begun anew. Raises RecordError for a record whose media cannot be opened or encoded.
    """
    records, out = Path(records), Path(out)
    lines = list(read_records(records))
    if not lines:
        raise RecordError(f"{records} holds no record")
    used = {kind for line in lines for kind, _, _ in media_parts(line, tokenizers)}
    tokenizers = {kind: tokenizer.eval() for kind, tokenizer in tokenizers.items() if kind in used}
    manifest = {
        "version": 1,
        "source": records.name,
        "source_sha256": hashlib.sha256(records.read_bytes()).hexdigest(),
        "tokenizers": {kind: tokenizer.fingerprint() for kind, tokenizer in tokenizers.items()},
        "part_size": part_size,
        "parts": -(-len(lines) // part_size),
        "records": len(lines),
    }
    _prepare_folder(out, manifest)
    jobs = [
        (lines[start : start + part_size], records.parent, _part_path(out, index), batch_size)
        for index, start in enumerate(range(0, len(lines), part_size))
        if not _part_path(out, index).is_file()
    ]
    with tqdm(total=len(lines), desc=f"tokenize {records.name}", unit="rec", disable=not progress) as bar:
        bar.update(len(lines) - sum(len(job[0]) for job in jobs))
        if workers > 1 and len(jobs) > 1:
            context = multiprocessing.get_context(
                "spawn"
            )  # forking after torch used its threads can deadlock
            with ProcessPoolExecutor(workers, context, _start_worker, (tokenizers,)) as pool:
                for done in pool.map(_encode_part_in_worker, jobs):
                    bar.update(done)
        else:
            for job in jobs:
                bar.update(_encode_part(tokenizers, *job))
    return out


def load_tokenizers(folder: str | Path) -> dict[str, ModalityTokenizer]:
    """All modality tokenizers in the subfolders of a folder (a checkpoint's ``tokenizers``), without text."""
    found = {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/config.json"))}
    tokenizers = [load_tokenizer(path) for name, path in found.items() if name != "text"]
    if not tokenizers:
        raise ShardError(
            f"{folder} holds no tokenizer; expected folders such as {folder}/image with a config.json"
        )
    return {tokenizer.name: tokenizer for tokenizer in tokenizers}


def _part_path(out: Path, index: int) -> Path:
    return out / f"part-{index:05d}.safetensors"


def _prepare_folder(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest first; parts of a run with another manifest are removed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / MANIFEST
    if path.is_file() and json.loads(path.read_text()) == manifest:
        return
    for stale in out.glob("part-*"):
        stale.unlink()
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(manifest, indent=1))
    partial.replace(path)


def _start_worker(tokenizers: dict[str, ModalityTokenizer]) -> None:
    torch.set_num_threads(1)
    _worker_tokenizers.update(tokenizers)


def _encode_part_in_worker(job: tuple[list[dict[str, Any]], Path, Path, int]) -> int:
    return _encode_part(_worker_tokenizers, *job)


def _encode_part(
    tokenizers: Mapping[str, ModalityTokenizer],
    lines: list[dict[str, Any]],
    root: Path,
    path: Path,
    batch_size: int,
) -> int:
    """Encode one part and write it, arrays last and by renaming: a part that exists is whole."""
    values: dict[str, dict[str, int]] = {kind: {} for kind in tokenizers}
    entries = []
    for line in lines:
        rows = {}
        for kind, value, part in media_parts(line, tokenizers):
            row = values[kind].setdefault(value, len(values[kind]))
            if part is None:
                rows[kind] = row
            else:
                part["row"] = row
        entries.append(json.dumps({"record": line, "rows": rows}, ensure_ascii=False) + "\n")
    arrays: dict[str, np.ndarray] = {}
    for kind, rows in values.items():
        if rows:
            codes = _encode_all(tokenizers[kind], list(rows), root, batch_size)
            arrays |= {f"{kind}.{name}": array for name, array in _pack_codes(codes).items()}
    path.with_suffix(".jsonl").write_text("".join(entries), encoding="utf-8")
    partial = path.with_suffix(".tmp")
    save_file(arrays, partial)
    partial.replace(path)
    return len(lines)


def _encode_all(
    tokenizer: ModalityTokenizer, values: Sequence[str], root: Path, batch_size: int
) -> list[Codes]:
    codes: list[Codes] = []
    with torch.no_grad():
        for start in range(0, len(values), batch_size):
            batch = values[start : start + batch_size]
            try:
                codes += tokenizer.encode_batch(
                    [open_media(value, tokenizer.segment_type, root) for value in batch]
                )
            except (ValueError, OSError) as error:
                raise RecordError(
                    f"{tokenizer.kind} among {batch[0]!r} ... {batch[-1]!r}: {error}"
                ) from error
    return codes


def _pack_codes(codes: Sequence[Codes]) -> dict[str, np.ndarray]:
    return {
        "values": np.concatenate([item.values for item in codes]).astype(np.int32),
        "offsets": np.cumsum([0, *(len(item.values) for item in codes)]).astype(np.int64),
        "sizes": np.array([item.size for item in codes], dtype=np.int32).reshape(len(codes), -1),
    }


class Shards:
    """A tokenized set in memory: ``records[i]`` is the JSON object, ``codes(i, kind)`` its codes."""

    def __init__(self, path: str | Path, tokenizers: Mapping[str, ModalityTokenizer]) -> None:
        """Read a shard folder; ShardError if it is missing, unfinished or made by other tokenizers."""
        self.path = Path(path)
        if not (self.path / MANIFEST).is_file():
            raise ShardError(
                f"{path} is no shard folder (no {MANIFEST}); make it with `anytoken data tokenize`"
            )
        self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
        self._check_tokenizers(tokenizers)
        self.records: list[dict[str, Any]] = []
        self._rows: list[dict[str, int]] = []
        self._part_of: list[int] = []
        self._arrays: list[dict[str, np.ndarray]] = []
        for index in range(self.manifest["parts"]):
            self._read_part(index)

    def _check_tokenizers(self, tokenizers: Mapping[str, ModalityTokenizer]) -> None:
        for kind, written in self.manifest["tokenizers"].items():
            if kind in tokenizers and tokenizers[kind].fingerprint() != written:
                raise ShardError(
                    f"{self.path} was written by another {kind} tokenizer (fingerprint {written[:12]}, the "
                    f"checkpoint's is {tokenizers[kind].fingerprint()[:12]}); tokenize the records again"
                )

    def _read_part(self, index: int) -> None:
        path = _part_path(self.path, index)
        if not path.is_file():
            raise ShardError(
                f"{self.path} is unfinished ({path.name} is missing); run `anytoken data tokenize` again"
            )
        self._arrays.append(load_file(path))
        for line in path.with_suffix(".jsonl").open(encoding="utf-8"):
            entry = json.loads(line)
            self.records.append(entry["record"])
            self._rows.append(entry["rows"])
            self._part_of.append(index)

    def __len__(self) -> int:
        return len(self.records)

    def has(self, index: int, kind: str) -> bool:
        """Whether record ``index`` holds codes of ``kind``."""
        return kind in self._rows[index]

    def codes(self, index: int, kind: str, row: int | None = None) -> Codes:
        """The codes of one medium of record ``index``; ``row`` picks a content part of a conversation."""
        arrays = self._arrays[self._part_of[index]]
        row = self._rows[index][kind] if row is None else row
        start, stop = arrays[f"{kind}.offsets"][row : row + 2]
        size = tuple(int(n) for n in arrays[f"{kind}.sizes"][row])
        return Codes(arrays[f"{kind}.values"][start:stop].astype(np.int64), size)
