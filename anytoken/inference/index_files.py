"""What an index is made from: the files of a folder, their segments and vectors, resumably; and an index read back.

Vectors are computed here or by other processes, of this machine or of a Ray cluster (`data/parallel.py`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anytoken.data import parallel
from anytoken.inference.api import AnyToken
from anytoken.inference.embed import ALIKE, Embedder
from anytoken.processor import Processor
from anytoken.segments import (
    CONTAINER_SUFFIXES,
    DNA,
    DNA_SUFFIXES,
    FRAMES_SUFFIXES,
    IMAGE_SUFFIXES,
    SPEECH_SUFFIXES,
    TEXT_SUFFIXES,
    Segment,
    SegmentError,
    Text,
    open_segment,
)
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError, RequestError
from anytoken.utils.json_lines import read_json_lines

SUFFIXES = {
    "image": IMAGE_SUFFIXES, "speech": SPEECH_SUFFIXES, "video": CONTAINER_SUFFIXES + FRAMES_SUFFIXES,
    "dna": DNA_SUFFIXES, "text": TEXT_SUFFIXES,
}  # fmt: skip
META, ITEMS, VECTORS, FAISS = "index.json", "items.jsonl", "vectors.npy", "faiss.index"
PART = 256  # files whose vectors are kept at a time
Key = tuple[str, int, int]  # of a file: path in the folder, size, time
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """What a vector is of: a file's path in the indexed folder, its kind, and of a file with several its part."""

    path: str
    kind: str
    part: int = 0
    text: str = ""  # of a text its beginning, of a sequence its name
    bytes: int = 0
    time_ns: int = 0


def read_index(path: str | Path) -> tuple[dict[str, Any], list[Item]]:
    """What made an index, and its items; RequestError if it is none, or empty."""
    path = Path(path)
    if not (path / META).is_file():
        raise RequestError(
            f"{path} is not an index (no {META}); make one with `anytoken index FOLDER --out {path}`."
        )
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        items = [Item(**line) for line in read_json_lines(path / ITEMS)]
        _ = meta["root"], meta["kind"], meta["width"], meta["probe"], meta["untrained"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RequestError(f"{path} is damaged ({error!r:.120}); build it again.") from error
    if not items:
        raise RequestError(f"{path} is empty; build it again from a folder with media.")
    return meta, items


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two indexes are of one model."""
    probes = [np.array(meta["probe"]) for meta in (one, other)]
    return probes[0].shape == probes[1].shape and float(probes[0] @ probes[1]) >= ALIKE


def list_files(root: Path, kinds: Sequence[str]) -> list[Path]:
    """The files of a folder that a model of these kinds may read, sorted; hidden ones and indexes are passed over.

    RequestError if there are none.
    """
    if not root.is_dir():
        raise RequestError(f"There is no folder {root}; give one with media.")
    suffixes = tuple(suffix for kind in kinds for suffix in SUFFIXES.get(kind, ()))
    files: list[Path] = []
    for place, folders, names in os.walk(root):
        here = Path(place)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (here / name / META).is_file()
        )
        files += [
            here / name
            for name in sorted(names)
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    if not files:
        raise RequestError(
            f"{root} holds no file that can be embedded; expected files such as {' '.join(suffixes)}."
        )
    return files


def file_segments(file: Path) -> list[Segment]:
    """What a file holds: paragraphs of a text, all sequences of a FASTA file, else one segment."""
    name = file.name.lower()
    if name.endswith(DNA_SUFFIXES):
        return list(DNA.open_all(file))
    if name.endswith(TEXT_SUFFIXES):
        paragraphs = [" ".join(part.split()) for part in Text.open(file).text.split("\n\n")]
        return [Text(part) for part in paragraphs if part]
    return [open_segment(file)]


@dataclass(frozen=True)
class Reader:
    """What a process needs to make vectors of files. vectors: ids of prompts, width -> float32 [N, width]."""

    processor: Processor
    context: int
    vectors: Callable[..., np.ndarray]
    width: int
    kinds: tuple[str, ...]  # that the embedding head knows

    def ids(self, segments: list[Segment]) -> list[list[int]]:
        """Prompts of a file's segments; a text that is longer than the context is cut there."""
        if strange := next((one.kind for one in segments if one.kind not in self.kinds), None):
            raise SegmentError(f"the embedding head knows {', '.join(self.kinds)}, and this is {strange}")
        found = self.processor.encode_chats(segments)
        for place, segment in enumerate(segments):
            if len(found[place]) > self.context:
                if not isinstance(segment, Text):
                    raise SegmentError(
                        f"{len(found[place])} tokens are more than the context of {self.context}"
                    )
                found[place] = [*found[place][: self.context - 2], *found[place][-2:]]
        return found


@dataclass(frozen=True)
class Found:
    """Items and vectors [N, W] of some files, the keys of those that were read, and why others were not."""

    files: int
    items: list[Item]
    vectors: np.ndarray
    keys: list[Key]
    skipped: Counter[str]


def read_files(reader: Reader, files: list[tuple[Path, Key]]) -> Found:
    """Vectors of some files; those that cannot be read are counted."""
    items: list[Item] = []
    prompts: list[list[int]] = []
    keys: list[Key] = []
    skipped: Counter[str] = Counter()
    for file, key in files:
        try:
            segments = file_segments(file)
            ids = reader.ids(segments)
        except (ValueError, OSError, MemoryError) as error:
            gone = not file.is_file()
            skipped["has gone" if gone else f"cannot be read, such as {file.name} ({error})"[:200]] += 1
            continue
        keys.append(key)
        for part, segment in enumerate(segments):
            items.append(Item(key[0], segment.kind, part, _label(segment), key[1], key[2]))
        prompts += ids
    vectors = (
        reader.vectors(prompts, width=reader.width) if prompts else np.zeros((0, reader.width), np.float32)
    )
    return Found(len(files), items, vectors, keys, skipped)


class FolderEmbedder:
    """Embedding the files of a folder, resumable: parts that are done lie in a folder next to the target."""

    def __init__(
        self,
        root: Path,
        model: AnyToken,
        meta: dict[str, Any],
        out: Path | None,
        engine: str = "local",
        workers: int = 1,
    ) -> None:
        self.root, self.model, self.meta, self.out = root, model, meta, out
        self.engine, self.workers = engine, workers
        self.parts = None if out is None else out.with_name(f".{out.name}-parts")
        self.skipped: Counter[str] = Counter()
        self.known: dict[Key, list[tuple[Item, np.ndarray]]] = {}

    def run(self, files: list[Path], progress: bool) -> tuple[list[Item], np.ndarray]:
        """Items and vectors of all files, in order."""
        self._recall()
        keys: list[Key] = []
        fresh: list[tuple[Path, Key]] = []
        for file in files:
            try:
                found = file.stat()
            except OSError:  # it has gone since the folder was listed
                self.skipped["has gone"] += 1
                continue
            key = file.relative_to(self.root).as_posix(), found.st_size, found.st_mtime_ns
            keys.append(key)
            if key not in self.known:
                fresh.append((file, key))
        with tqdm(
            total=len(keys), initial=len(keys) - len(fresh), desc="index", unit="file", disable=not progress
        ) as bar:
            for done in self._embed_all(
                [fresh[start : start + PART] for start in range(0, len(fresh), PART)]
            ):
                bar.update(done)
        for reason, number in self.skipped.items():
            log.warning("%s: %d files left out: %s", self.root, number, reason)
        pairs = [pair for key in keys for pair in self.known.get(key, [])]
        if not pairs:
            reasons = "; ".join(self.skipped) or "they are empty"
            raise RequestError(f"None of the {len(files)} files in {self.root} could be embedded: {reasons}.")
        return [item for item, _ in pairs], np.stack([vector for _, vector in pairs])

    def _recall(self) -> None:
        """Vectors of files from the index that is there and from parts of a build that was killed."""
        if self.out is None or self.parts is None:
            return
        sources = []
        if (self.out / META).is_file():
            try:
                meta, items = read_index(self.out)
                sources.append((meta, items, self.out / VECTORS))
            except RequestError as error:
                log.warning("%s", error)
        for path in sorted(self.parts.glob("*.json")) if self.parts.is_dir() else []:
            try:
                part = json.loads(path.read_text(encoding="utf-8"))
                sources.append(
                    (part["meta"], [Item(**one) for one in part["items"]], path.with_suffix(".npy"))
                )
            except (ValueError, KeyError, TypeError, DataError):
                path.unlink()
        same = ("root", "width", "untrained")
        for meta, items, vectors in sources:
            if not alike(meta, self.meta) or any(meta[key] != self.meta[key] for key in same):
                continue
            try:
                pairs = list(zip(items, np.load(vectors), strict=True))
            except (OSError, ValueError) as error:
                log.warning("%s is damaged (%s): its files are embedded again", vectors, error)
                continue
            for item, vector in pairs:
                self.known.setdefault((item.path, item.bytes, item.time_ns), []).append((item, vector))

    def _embed_all(self, batches: list[list[tuple[Path, Key]]]) -> Iterator[int]:
        """Embed batches of files, here or by other processes; yields how many files of each are done."""
        if self.engine == "local" and self.workers == 1:
            for batch in batches:
                self._embed(batch)
                yield len(batch)
            return
        if self.model.lm.device.type != "cpu":
            raise RequestError(
                'Other processes embed on CPUs: load the model with device="cpu" (--device cpu).'
            )
        with self.model.embedder(self.meta["untrained"]) as embedder:
            shared = self._reader(embedder)
            for found in parallel.run(read_files, shared, batches, self.workers, self.engine):
                self._take(found)
                yield found.files

    def _embed(self, files: list[tuple[Path, Key]]) -> None:
        """Embed some files and keep their vectors as a part."""
        with self.model.embedder(self.meta["untrained"]) as embedder:
            self._take(read_files(self._reader(embedder), files))

    def _reader(self, embedder: Embedder) -> Reader:
        return Reader(
            embedder.processor,
            embedder.context,
            embedder.vectors,
            self.meta["width"],
            embedder.head.modalities,
        )

    def _take(self, found: Found) -> None:
        self.skipped += found.skipped
        for key in found.keys:
            self.known[key] = []
        for item, vector in zip(found.items, found.vectors, strict=True):
            self.known[(item.path, item.bytes, item.time_ns)].append((item, vector))
        if found.items:
            self._keep(found.items, found.vectors)

    def _keep(self, items: list[Item], vectors: np.ndarray) -> None:
        if self.parts is None:
            return
        name = f"{len(list(self.parts.glob('*.json'))) if self.parts.is_dir() else 0:06d}"
        write_file(self.parts / f"{name}.npy", lambda scratch: np.save(scratch, vectors))
        entry = {"meta": self.meta, "items": [asdict(item) for item in items]}
        write_file(self.parts / f"{name}.json", json.dumps(entry))  # last: a part that has it is whole

    def clear(self) -> None:
        """Remove the parts: the index is written."""
        if self.parts is not None:
            shutil.rmtree(self.parts, ignore_errors=True)


def _label(segment: Segment) -> str:
    if isinstance(segment, Text):
        return segment.text if len(segment.text) <= 120 else f"{segment.text[:119]}…"
    return segment.name if isinstance(segment, DNA) else ""
