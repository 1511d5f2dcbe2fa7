"""An index in a vector database, for folders that many machines share or that are more than one can hold.

    index = ServerIndex.build("photos", model, "http://localhost:6333#photos")
    index = ServerIndex.open("postgresql://me@localhost/mydb#photos", model); index.search("a fox on blue", k=5)

Several folders may share a collection. Building stores each part of a folder as soon as it is embedded, so that an
interrupted build resumes; items of files that have gone are removed at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anytoken.inference.api import AnyToken
from anytoken.inference.index import (
    Hit,
    check_k,
    check_kinds,
    embedding_space,
    is_older,
    query_vector,
    refuse_other,
)
from anytoken.inference.index_files import FolderEmbedder, Item, Key, list_files
from anytoken.inference.vector_store import VectorStore, open_store, without_password
from anytoken.utils.errors import RequestError, reason


class ServerIndex:
    """A collection of a vector database, and the model that computed its vectors."""

    def __init__(self, model: AnyToken, url: str, store: VectorStore, meta: dict[str, Any]) -> None:
        self.model, self.url, self.store, self.meta = model, without_password(url), store, meta
        self._projected = is_older(self.url, meta, model)  # queries go through the head's `to_old`

    def __len__(self) -> int:
        with _database_errors(self.url, self.store):
            return len(self.store)

    def __repr__(self) -> str:
        return f"ServerIndex({self.url}; {len(self)} items, {self.meta['width']} dimensions)"

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: AnyToken,
        url: str,
        width: int | None = None,
        untrained: bool = False,
        overwrite: bool = False,
        progress: bool = False,
        engine: str = "local",
        workers: int = 1,
        opened_by: dict[str, Any] | None = None,
    ) -> ServerIndex:
        """Embed a folder as `Index.build` does, into the collection of a URL (see `vector_store`).

        overwrite: replace a collection of another model or width. opened_by: see `how_to_open`. RequestError as for
        `Index.build`, and if the server does not answer or the collection is of something else.
        """
        root = Path(folder)
        files = list_files(root, model.kinds)
        meta = {**embedding_space(model, width, untrained), **(opened_by or {})}
        store = open_store(url)
        with _database_errors(url, store):
            before = store.meta()
            if before is not None and overwrite:
                store.drop()
            elif before is not None:
                refuse_other(without_password(url), _ours(url, before), meta, ("width", "untrained"))
            if before is None or overwrite:
                store.create(meta)
            work = _StoreEmbedder(root, model, meta, store, engine, workers)
            work.run(files, progress)
            work.clear()
        return cls(model, url, store, meta)

    @classmethod
    def open(cls, url: str, model: AnyToken, store: VectorStore | None = None) -> ServerIndex:
        """Open a collection; RequestError if it is not there, empty, or of another model.

        store: of the URL, where it is open already.
        """
        store = store or open_store(url)
        index = cls(model, url, store, read_meta(url, store))
        if not len(index):
            raise RequestError(f"{index.url} is empty; build it again from a folder with media.")
        return index

    def search(self, query: Any, k: int = 10, kinds: Sequence[str] | None = None) -> list[Hit]:
        """The k items nearest to a query, best first; as `Index.search`."""
        check_k(k)
        if kinds is not None:
            check_kinds(kinds, self.model.kinds)
        vector = query_vector(self.model, self.meta, query, self._projected)
        with _database_errors(self.url, self.store):
            found = self.store.nearest(vector, k, kinds)
        return [Hit(score, item, Path(root) / item.path) for score, root, item in found]


def read_meta(url: str, store: VectorStore) -> dict[str, Any]:
    """What describes a collection; RequestError if it is not there, or of something else."""
    with _database_errors(url, store):
        found = store.meta()
    if found is None:
        raise RequestError(
            f"{without_password(url)} is not an index; make one with `anytoken index FOLDER --out URL`."
        )
    return _ours(url, found)


def _ours(url: str, meta: dict[str, Any]) -> dict[str, Any]:
    if not {"width", "untrained", "probe"} <= meta.keys():
        raise RequestError(f"{without_password(url)} holds something else; choose another name after #.")
    return meta


@contextmanager
def _database_errors(url: str, store: VectorStore) -> Iterator[None]:
    """Turn the errors of a database into a RequestError."""
    try:
        yield
    except RequestError:
        raise
    except store.errors as error:
        raise RequestError(
            f"{without_password(url)} does not work: {' '.join(reason(error).split())}"
        ) from error


class _StoreEmbedder(FolderEmbedder):
    """Embedding a folder into a store, which also says what is embedded already."""

    def __init__(
        self, root: Path, model: AnyToken, meta: dict[str, Any], store: VectorStore, engine: str, workers: int
    ) -> None:
        super().__init__(root, model, meta, None, engine, workers)
        self.store, self.place = store, str(root.resolve())
        self.before: list[Item] = []

    def _recall(self) -> None:
        found: dict[Key, list[tuple[Item, np.ndarray]]] = {}
        for item, vector in self.store.stored(self.place):
            self.before.append(item)
            found.setdefault((item.path, item.bytes, item.time_ns), []).append((item, vector))
        # part 0 is stored last (see _keep), so a file that has it is whole
        self.known = {
            key: sorted(pairs, key=lambda pair: pair[0].part)
            for key, pairs in found.items()
            if any(item.part == 0 for item, _ in pairs)
        }

    def _keep(self, items: list[Item], vectors: np.ndarray) -> None:
        order = sorted(range(len(items)), key=lambda place: -items[place].part)
        self.store.put(self.place, [items[place] for place in order], vectors[order])

    def run(self, files: list[Path], progress: bool) -> tuple[list[Item], np.ndarray]:
        items, vectors = super().run(files, progress)
        left = {(item.path, item.part) for item in items}
        self.store.remove(self.place, [one for one in self.before if (one.path, one.part) not in left])
        return items, vectors
