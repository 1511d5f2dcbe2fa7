"""Embedding against a plain forward pass; indexes of growing size: build time, memory, queries per second, recall."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from anytoken.benchmarks.harness import Figures, interleaved_timing, ratio_of_turns
from anytoken.inference.api import AnyToken
from anytoken.inference.index import KINDS, RERANK, Index, import_faiss
from anytoken.inference.index_files import Item
from anytoken.model.embedding_head import read_states, similar_lengths
from anytoken.utils.errors import EvaluationError

QUERIES, NEAR = 200, 10
DRAWN = 1 << 16  # vectors drawn at once
RERANKS = (
    1,
    2,
    4,
    RERANK,
    32,
)  # of IVF-PQ, with a quarter of the lists that it reads by default and with all of them


def bench_embed(
    model: AnyToken,
    prompts: Sequence[object],
    sizes: Sequence[int],
    width: int,
    repeats: int,
    kinds: Sequence[str] = KINDS,
    save: Callable[[Figures], None] = lambda figures: None,
) -> Figures:
    """Rows of an index by kind and size, and the time of embedding relative to its forward passes alone.

    sizes: numbers of vectors in an index; they are sampled around centers, like those of a model. save: called with all
    figures so far after each row, since large sizes take long. EvaluationError if two ways of batching give other
    vectors.
    """
    ids = model.processor.encode_chats(list(prompts))
    untrained = not model.embedding_heads
    together = model.embed_ids(ids, untrained=untrained)
    alone = np.concatenate([model.embed_ids([one], untrained=untrained) for one in ids[:8]])
    worst = float(np.abs(together[:8] - alone).max())
    if worst > 1e-4:
        raise EvaluationError(
            f"A prompt's vector alone and in a batch differ by {worst:.2g}, so their speeds cannot be compared."
        )
    sides = {
        "embed": lambda: model.embed_ids(ids, untrained=untrained),
        "bare forward": lambda: bare_forward(model, ids),
    }
    taken = interleaved_timing(sides, repeats)
    tokens = sum(map(len, ids))
    speeds = {
        "prompts": len(ids), "tokens": tokens, "largest_difference": worst,
        "embed_tokens_per_second": tokens / taken["embed"], "prompts_per_second": len(ids) / taken["embed"],
        "embed_over_forward": ratio_of_turns(sides["embed"], sides["bare forward"], repeats),
    }  # fmt: skip
    rows: list[Figures] = []
    figures = {"embedding": speeds, "width": width, "queries": QUERIES, "repeats": repeats, "rows": rows}
    for size in sorted(sizes):
        for row in bench_index(model, size, width, kinds):
            rows.append(row)
            save(figures)
    return figures


@torch.inference_mode()
def bare_forward(model: AnyToken, ids: Sequence[Sequence[int]]) -> None:
    """Only the decoder, over the same batches."""
    for rows in similar_lengths([len(one) for one in ids]):
        batch = torch.full((len(rows), max(len(ids[row]) for row in rows)), model.token_space.pad)
        for place, row in enumerate(rows):
            batch[place, : len(ids[row])] = torch.tensor(ids[row])
        read_states(model.lm, batch.to(model.lm.device))


def bench_index(model: AnyToken, size: int, width: int, kinds: Sequence[str] = KINDS) -> Iterator[Figures]:
    """Rows of figures for one size: a row per kind; for IVF-PQ one per trade-off of speed and recall.

    Seconds are CPU seconds of one core, so other work on the machine counts little. memory_mb is the memory of a
    search; the vectors of flat and IVF-PQ are mapped from disk and not counted.
    """
    faiss = import_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield from _index_rows(model, size, width, kinds)
    finally:
        faiss.omp_set_num_threads(threads)


def _index_rows(model: AnyToken, size: int, width: int, kinds: Sequence[str]) -> Iterator[Figures]:
    rng = np.random.default_rng(size)
    centres = rng.normal(size=(max(10, size // 100), width)).astype(np.float32)

    def draw(count: int) -> np.ndarray:
        points = np.empty((count, width), np.float32)
        for part in np.array_split(points, -(-count // DRAWN)):  # views: a million vectors exist once
            rng.standard_normal(out=part, dtype=np.float32)
            part *= 0.7
            part += centres[rng.integers(len(centres), size=len(part))]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return points

    vectors, queries = draw(size), draw(QUERIES)
    items = [Item(str(number), "image") for number in range(size)]
    exact = Index.of_vectors(model, items, vectors).search_many(queries, NEAR)[1]
    for kind in kinds:
        if kind == "ivfpq" and size < 10_000:
            continue
        start = time.process_time()
        index = Index.of_vectors(model, items, vectors, kind)
        built = time.process_time() - start
        ann = index._ann
        held = 0 if ann is None else _bytes_of(ann) / 1e6
        probes = [ann.nprobe // 4, ann.nprobe] if kind == "ivfpq" else [None]
        for probe, rerank in [(n, r) for n in probes for r in (RERANKS if n else (1,))]:
            settings = {"lists": ann.nlist, "nprobe": probe, "rerank": rerank} if probe else {}
            if probe:
                ann.nprobe = probe
            start = time.process_time()
            rows = index.search_many(queries, NEAR, rerank)[1]
            seconds = max(time.process_time() - start, 1e-9)
            recall = np.mean([len(set(a) & set(b)) / NEAR for a, b in zip(exact, rows, strict=True)])
            yield {
                "kind": kind, "vectors": size, "build_s": built, "memory_mb": held, **settings,
                "queries/s": QUERIES / seconds, "recall@10": float(recall),
            }  # fmt: skip


def _bytes_of(ann: Any) -> int:
    """Bytes of a FAISS structure as it is stored, on disk: serializing a large one would hold it twice in memory."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "ann"
        import_faiss().write_index(ann, str(path))
        return path.stat().st_size
