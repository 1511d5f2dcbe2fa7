"""What a vector database has to do to hold an index, and its URL.

    http://localhost:6333#photos                     a collection of a Qdrant server (https too; QDRANT_API_KEY)
    postgresql://me@localhost/mydb#photos            a table of PostgreSQL with pgvector (PGPASSWORD)
    file:///data/store#photos                        Qdrant without a server, in a folder, for one process

Stores know nothing about models: see `ServerIndex`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urldefrag, urlsplit

import numpy as np

from anytoken.inference.index_files import Item
from anytoken.utils.errors import RequestError

Found = tuple[float, str, Item]  # cosine, root folder, item


class VectorStore(ABC):
    """A named collection of items and unit vectors, and what describes it."""

    errors: tuple[type[Exception], ...] = ()  # of a server that is away, refuses, or is of another kind

    @abstractmethod
    def meta(self) -> dict[str, Any] | None:
        """What was given to `create`; None if there is no collection, {} if it is someone else's."""

    @abstractmethod
    def create(self, meta: dict[str, Any]) -> None:
        """Make an empty collection of vectors of meta["width"] dimensions."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the collection."""

    @abstractmethod
    def put(self, root: str, items: Sequence[Item], vectors: np.ndarray) -> None:
        """Store items of a folder with vectors [N, W], in order; those of the same path and part are replaced."""

    @abstractmethod
    def remove(self, root: str, items: Sequence[Item]) -> None:
        """Remove items of a folder, by path and part."""

    @abstractmethod
    def stored(self, root: str) -> Iterator[tuple[Item, np.ndarray]]:
        """All items of a folder with their vectors."""

    @abstractmethod
    def nearest(self, vector: np.ndarray, k: int, kinds: Sequence[str] | None) -> list[Found]:
        """The k items nearest to a unit vector [W], best first; kinds: only items of these."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""


def is_url(place: object) -> bool:
    """Whether an index is named by a URL, not by a path."""
    return "://" in str(place)


def without_password(url: str) -> str:
    """A URL to print."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@", 1) if password else url


def open_store(url: str) -> VectorStore:
    """The store of a URL; RequestError for an unknown scheme, no collection, or a client that is not installed."""
    server, collection = urldefrag(url)
    scheme = urlsplit(url).scheme
    if scheme not in ("http", "https", "file", "postgresql", "postgres"):
        raise RequestError(
            f"{without_password(url)} is no URL of an index; expected http://HOST:PORT#NAME (Qdrant), "
            "postgresql://HOST/DATABASE#NAME (pgvector) or file:///FOLDER#NAME."
        )
    if not collection.replace("-", "_").isidentifier() or len(collection) > 60:
        raise RequestError(
            f"{without_password(url)}: name the collection after #, such as {without_password(server)}#photos; "
            f"letters, digits, - and _ are allowed, received {collection!r}."
        )
    if scheme.startswith("postgres"):
        from anytoken.inference.pgvector import PgvectorStore

        return PgvectorStore(server, collection)
    from anytoken.inference.qdrant import QdrantStore

    return QdrantStore(server, collection)
