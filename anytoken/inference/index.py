"""An index of a folder: every image, clip, recording, text and sequence as a vector, searched in any modality.

    index = anytoken.Index.build("photos", model, "my.index")
    index.search("a fox on blue", k=5); index.search(anytoken.Speech.open("said.wav"))

A text file has one vector per paragraph, a FASTA file one per sequence. Building again embeds only new and changed
files. Finished parts are kept next to the target until the index is complete, so an interrupted build resumes; the
target is then replaced in one step. Vectors are in one memory-mapped file, and exact search is a matrix product with
it. HNSW (arXiv 1603.09320) and IVF-PQ (Jégou et al., TPAMI 2011) are FAISS's (2401.08281). The codes of IVF-PQ only
select candidates, which are ranked by their mapped vectors (Jégou et al., ICASSP 2011).

    index.json      provenance: the model's fingerprint, width, kind, the folder
    items.jsonl     one line per vector: path, kind, part, size and time of the file
    vectors.npy     float32 [N, W], unit norm
    faiss.index     hnsw and ivfpq only
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anytoken import moved
from anytoken.inference.api import AnyToken
from anytoken.inference.embed import ALIKE
from anytoken.inference.index_files import (
    FAISS,
    ITEMS,
    META,
    VECTORS,
    FolderEmbedder,
    Item,
    alike,
    file_segments,
    list_files,
    read_index,
)
from anytoken.segments import Segment
from anytoken.utils.atomic import FolderKind, check_target, write_file, write_folder
from anytoken.utils.errors import RequestError

KINDS = ("flat", "hnsw", "ivfpq")
BLOCK = 64  # queries whose similarities to all vectors exist at a time
FEWEST_IVFPQ = 1000
RERANK = 8  # of IVF-PQ: candidates per result
INDEX = FolderKind("index", META, (META, ITEMS, VECTORS, FAISS), RequestError)


@dataclass(frozen=True)
class Hit:
    """One result: cosine similarity and location."""

    score: float
    item: Item
    file: Path

    @property
    def exists(self) -> bool:
        """Whether the file still exists."""
        return self.file.is_file()

    def open(self) -> Segment:
        """The segment; RequestError if its file is missing or has changed since."""
        if not self.exists:
            raise RequestError(f"{self.file} has gone since it was indexed: run `anytoken index` again.")
        parts = file_segments(self.file)
        if self.item.part >= len(parts):
            raise RequestError(f"{self.file} has changed since it was indexed: run `anytoken index` again.")
        return parts[self.item.part]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        found = {"score": round(self.score, 6), "path": str(self.file), "kind": self.item.kind}
        found |= {"part": self.item.part} if self.item.part else {}
        return found | ({"text": self.item.text} if self.item.text else {}) | {"exists": self.exists}


class Index:
    """Vectors of items, and the model that computed them."""

    def __init__(
        self, model: AnyToken, meta: dict[str, Any], items: list[Item], vectors: np.ndarray, ann: Any = None
    ) -> None:
        self.model, self.meta, self.items, self.vectors, self._ann = model, meta, items, vectors, ann
        self._projected = False  # queries go through the head's `to_old`

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        counts = Counter(item.kind for item in self.items)
        held = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        return f"Index({held}; {self.meta['kind']}, {self.meta['width']} dimensions)"

    # ---- building ----

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: AnyToken,
        out: str | Path | None = None,
        kind: str = "flat",
        width: int | None = None,
        untrained: bool = False,
        overwrite: bool = False,
        progress: bool = False,
        engine: str = "local",
        workers: int = 1,
    ) -> Index:
        """Embed every file of a folder that the model can read, and write the index to `out` unless that is None.

        An existing index of the same model, folder and width is updated: only new and changed files are embedded.
        kind: "flat" is exact; "hnsw" is for millions of vectors; "ivfpq" saves memory. engine, workers: embed with
        other processes of this machine ("local") or of a Ray cluster ("ray"), on the CPU. Unreadable files are
        skipped, and the log says how many and why. RequestError for a folder without readable files, and if `out`
        contains something else, or an index of another folder, model or width unless `overwrite`.
        """
        root = Path(folder)
        if kind not in KINDS:
            raise RequestError(f"kind is one of {', '.join(KINDS)}; received {kind!r}.")
        if kind != "flat":
            import_faiss()
        if out is not None:
            check_target(Path(out), INDEX)
        files = list_files(root, model.kinds)
        meta = {"root": str(root.resolve()), "kind": kind, **embedding_space(model, width, untrained)}
        if out is not None:
            meta |= _made_before(Path(out), meta, overwrite)
        work = FolderEmbedder(root, model, meta, None if out is None else Path(out), engine, workers)
        items, vectors = work.run(files, progress)
        index = cls(model, meta, items, vectors, _make_ann(kind, vectors))
        if out is not None:
            index._write(Path(out))
            work.clear()
            return cls.open(out, model)
        return index

    @classmethod
    def of_vectors(
        cls, model: AnyToken, items: Sequence[Item], vectors: np.ndarray, kind: str = "flat", root: str = "."
    ) -> Index:
        """An index in memory from existing vectors, float32 [N, W] of unit norm."""
        meta = {"root": root, "kind": kind, "width": vectors.shape[1], "untrained": False, "probe": []}
        return cls(model, meta, list(items), vectors, _make_ann(kind, vectors))

    def _write(self, out: Path) -> None:
        with write_folder(out, INDEX, own=True) as scratch:
            np.save(scratch / VECTORS, self.vectors)
            lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in self.items)
            (scratch / ITEMS).write_text(lines, encoding="utf-8")
            if self._ann is not None:
                import_faiss().write_index(self._ann, str(scratch / FAISS))
            (scratch / META).write_text(json.dumps(self.meta | {"items": len(self.items)}) + "\n")

    def remember_model(self, path: str | Path, opened_by: dict[str, str | None]) -> None:
        """Record in an index how to open its model (see `how_to_open`), for `anytoken search`."""
        self.meta |= opened_by
        write_file(Path(path) / META, json.dumps(self.meta) + "\n")

    # ---- opening ----

    @classmethod
    def open(cls, path: str | Path, model: AnyToken) -> Index:
        """Open an index; RequestError if it is damaged, empty, or of another model.

        A model whose head was trained to be compatible with that of the index can also open it.
        """
        path = Path(path)
        meta, items = read_index(path)
        try:
            vectors = np.load(path / VECTORS, mmap_mode="r")
            ann = None if meta["kind"] == "flat" else _read_ann(path / FAISS)
        except (OSError, ValueError, RuntimeError) as error:
            raise RequestError(f"{path} is damaged ({error}); build it again.") from error
        if vectors.shape != (len(items), meta["width"]) or (ann is not None and ann.ntotal != len(items)):
            raise RequestError(f"{path} is damaged: its files are of different indexes; build it again.")
        index = cls(model, meta, items, vectors, ann)
        index._projected = is_older(path, meta, model)
        return index

    # ---- searching ----

    def search(self, query: Any, k: int = 10, kinds: Sequence[str] | None = None) -> list[Hit]:
        """The k items nearest to a query, best first.

        query: a string, a segment, a list of both, or a vector [W]. kinds: only items of these. RequestError for a
        k below 1, a vector of another width or without direction, and kinds that are not in the index.
        """
        check_k(k)
        vector = query_vector(self.model, self.meta, query, self._projected)
        scores, rows = self._nearest(vector, k, kinds)
        root = Path(self.meta["root"])
        return [
            Hit(float(score), self.items[row], root / self.items[row].path)
            for score, row in zip(scores, rows, strict=True)
            if row >= 0
        ]

    def search_many(
        self, vectors: np.ndarray, k: int = 10, rerank: int = RERANK
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 [Q, k] and rows int64 [Q, k] of the items nearest to vectors [Q, W]; -1 for none.

        rerank: for ivfpq, the number of candidates per result that are ranked by exact cosines; 1 for none.
        RequestError for vectors of another width.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.meta["width"]:
            raise RequestError(f"vectors are [Q, {self.meta['width']}]; received {list(vectors.shape)}.")
        k = min(k, len(self))
        if not len(vectors):
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        if self._ann is not None:
            vectors, exact = np.ascontiguousarray(vectors, np.float32), self.meta["kind"] == "ivfpq"
            found = self._ann.search(vectors, min(k * rerank, len(self)) if exact else k)
            return _ranked(vectors, self.vectors, found[1], k) if exact else found
        blocks = [
            _exact(vectors[start : start + BLOCK], self.vectors, k) for start in range(0, len(vectors), BLOCK)
        ]
        return np.concatenate([one for one, _ in blocks]), np.concatenate([rows for _, rows in blocks])

    def _nearest(
        self, vector: np.ndarray, k: int, kinds: Sequence[str] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if kinds is None:
            scores, rows = self.search_many(vector[None], k)
            return scores[0], rows[0]
        check_kinds(kinds, dict.fromkeys(item.kind for item in self.items))
        chosen = np.array([row for row, item in enumerate(self.items) if item.kind in kinds])
        similar = self.vectors[chosen] @ vector  # exact: a filter leaves few
        order = np.argsort(-similar)[:k]
        return similar[order], chosen[order]


def check_k(k: Any) -> None:
    """RequestError unless it is a number of results."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise RequestError(f"k is a whole number from 1 up; received {k!r}.")


def check_kinds(kinds: Any, held: Iterable[str]) -> None:
    """RequestError unless these are kinds of items that are held."""
    if isinstance(kinds, str) or not kinds:
        raise RequestError(f'kinds is a list such as ["image"], or None for all; received {kinds!r}.')
    if missing := [kind for kind in kinds if kind not in held]:
        raise RequestError(f"This index holds {', '.join(held)}; received {missing[0]!r}.")


def query_vector(model: AnyToken, meta: dict[str, Any], query: Any, projected: bool) -> np.ndarray:
    """The unit vector [W] to search an index by. projected: the index was made by an older, compatible head."""
    width = meta["width"]
    if isinstance(query, np.ndarray) and query.ndim == 1:
        if query.shape != (width,):
            raise RequestError(f"This index holds vectors of {width} dimensions; received {len(query)}.")
        vector = query.astype(np.float32)
        if not np.isfinite(vector).all() or not vector.any():
            raise RequestError("A query vector has finite values that are not all 0.")
        return vector / np.linalg.norm(vector)
    if not projected:
        return model.embed([query], width=width, untrained=meta["untrained"])[0]
    import torch

    return model.embedding_head.to_old(torch.from_numpy(model.embed([query]))).detach().numpy()[0]


def embedding_space(model: AnyToken, width: int | None, untrained: bool) -> dict[str, Any]:
    """What an index records of its vectors' space; RequestError for a width that was not trained."""
    with model.embedder(untrained) as embedder:
        width, probe = embedder.head.pick_width(width), embedder.probe()
    return {
        "version": 1, "width": width, "untrained": untrained, "probe": [round(float(one), 6) for one in probe],
    }  # fmt: skip


def how_to_open(model: str, adapter: str | None) -> dict[str, str | None]:
    """Names of a model and an adapter that are valid in any working folder."""

    def absolute(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    return {"model": absolute(model), "adapter": adapter and absolute(adapter)}


def _exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [Q, k] and rows [Q, k] of the nearest of all vectors [N, W], best first."""
    similar = queries @ vectors.T
    rows = np.argpartition(-similar, k - 1, axis=1)[:, :k]
    found = np.take_along_axis(similar, rows, 1)
    order = np.argsort(-found, axis=1, kind="stable")
    return np.take_along_axis(found, order, 1), np.take_along_axis(rows, order, 1)


def _ranked(
    queries: np.ndarray, vectors: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k of candidates [Q, C] (-1 for none) with the highest exact cosines, and these; each [Q, k]."""
    similar = np.stack([vectors[rows] @ query for query, rows in zip(queries, candidates, strict=True)])
    similar[candidates < 0] = -np.inf
    order = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similar, order, 1), np.take_along_axis(candidates, order, 1)


def _made_before(out: Path, meta: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """How to open the model, if the index that is there says so; RequestError if it is of another build."""
    try:
        before, _ = read_index(out)
    except RequestError:
        return {}  # none, or a damaged one: it is rebuilt
    if not overwrite:
        refuse_other(out, before, meta, ("root", "width", "untrained"))
    return {key: before[key] for key in ("model", "adapter") if key in before and alike(before, meta)}


def refuse_other(out: Any, before: dict[str, Any], meta: dict[str, Any], keys: Sequence[str]) -> None:
    """RequestError if an index that is there was made by another build: in one of `keys`, or of another model."""
    changed = [key for key in keys if before[key] != meta[key]]
    if not changed and not alike(before, meta):
        changed = ["model"]
    if changed:
        there = "" if changed[0] == "model" else f" ({before[changed[0]]}, now {meta[changed[0]]})"
        raise RequestError(
            f"{out} is an index of another {'folder' if changed[0] == 'root' else changed[0]}{there}: choose another "
            "place, or replace it with overwrite=True (--overwrite)."
        )


def is_older(path: Any, meta: dict[str, Any], model: AnyToken) -> bool:
    """Whether queries have to be projected to the older head that made the index; RequestError if neither fits."""
    made = np.array(meta["probe"], dtype=np.float32)
    now = model.embedding_probe(meta["untrained"])
    if now.shape == made.shape and float(now @ made) >= ALIKE:
        return False
    if not meta["untrained"]:
        old = model.embedding_head.old_probe.numpy()
        if old.shape == made.shape and float(old @ made) >= ALIKE:
            if meta["width"] != len(old):
                raise RequestError(
                    f"{path} is of an older head's first {meta['width']} dimensions; build it again."
                )
            return True
    raise RequestError(
        f"{path} was made by another model or embedding head: open it with that one, or build it again."
    )


def import_faiss() -> Any:
    """FAISS, with the quick operators of numpy arrays; RequestError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise RequestError(f"search needs faiss ({error}); pip install 'anytoken[search]'.") from error
    return faiss


def _make_ann(kind: str, vectors: np.ndarray) -> Any:
    """FAISS' structure over vectors [N, W]; None for a flat index."""
    if kind == "flat":
        return None
    faiss, (count, width) = import_faiss(), vectors.shape
    vectors = np.ascontiguousarray(vectors)
    if kind == "hnsw":
        ann = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        ann.hnsw.efConstruction, ann.hnsw.efSearch = 80, 64
    else:
        if count < FEWEST_IVFPQ or width % 4:
            raise RequestError(
                f"ivfpq needs {FEWEST_IVFPQ} vectors to learn its codes, of a width that 4 divides; there are {count} "
                f"of {width}. Take flat or hnsw."
            )
        lists = max(16, int(2 * count**0.5 if count >= 100_000 else count**0.5))
        quantizer = faiss.IndexFlatIP(width)
        ann = faiss.IndexIVFPQ(quantizer, width, lists, width // 4, 8, faiss.METRIC_INNER_PRODUCT)
        for clustering in (ann.cp, ann.pq.cp):
            clustering.min_points_per_centroid = 1  # of small folders: no warnings
            clustering.max_points_per_centroid = (
                64  # FAISS' 256 points and 25 rounds take minutes on one thread
            )
            clustering.niter = 10
        ann.train(vectors)
        ann.nprobe = max(16, lists // 32)
    ann.add(vectors)
    return ann


def _read_ann(path: Path) -> Any:
    faiss = import_faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
