"""A collection of Qdrant as the store of an index, on a server or in a folder.

Payloads are the fields of `Item` and the folder, so Qdrant's own filters work on them. Points are numbered by what they
are of: storing an item again replaces it. What describes the collection is its metadata (Qdrant 1.16).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from anytoken.inference.index_files import Item
from anytoken.inference.vector_store import Found, VectorStore
from anytoken.utils.errors import RequestError

BATCH = 256  # points of one request
OURS = "anytoken"  # the key of a collection's metadata


class QdrantStore(VectorStore):
    """Items and vectors in a collection."""

    def __init__(self, url: str, collection: str) -> None:
        """url: of a server, or file:///FOLDER. RequestError if qdrant-client is not installed."""
        try:
            from qdrant_client import QdrantClient, models
            from qdrant_client.http.exceptions import ApiException, ResponseHandlingException
        except ImportError as error:
            raise RequestError(
                f"This needs qdrant-client ({error}); pip install 'anytoken[qdrant]'."
            ) from error
        self.errors = (ApiException, ResponseHandlingException, OSError)
        split = urlsplit(url)
        where: dict[str, Any] = {"path": unquote(split.path)}
        if split.scheme != "file":
            where = {"url": url, "api_key": os.environ.get("QDRANT_API_KEY"), "check_compatibility": False}
        self.collection, self._models = collection, models
        try:
            self.client = QdrantClient(**where)
        except (RuntimeError, OSError) as error:  # a folder that another process uses, or that cannot be made
            raise RequestError(f"{url} cannot be opened: {error}") from error

    def meta(self) -> dict[str, Any] | None:
        if not self.client.collection_exists(self.collection):
            return None
        found: Any = self.client.get_collection(self.collection).config.metadata
        return dict((found or {}).get(OURS, {}))

    def create(self, meta: dict[str, Any]) -> None:
        space = self._models.VectorParams(size=meta["width"], distance=self._models.Distance.COSINE)
        self.client.create_collection(self.collection, vectors_config=space, metadata={OURS: meta})

    def drop(self) -> None:
        self.client.delete_collection(self.collection)

    def put(self, root: str, items: Sequence[Item], vectors: np.ndarray) -> None:
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            points = [
                self._models.PointStruct(
                    id=_id(root, item), vector=vector.tolist(), payload={**asdict(item), "root": root}
                )
                for item, vector in zip(part, vectors[start : start + BATCH], strict=True)
            ]
            self.client.upsert(self.collection, points, wait=True)

    def remove(self, root: str, items: Sequence[Item]) -> None:
        for start in range(0, len(items), BATCH):
            ids: Any = [_id(root, item) for item in items[start : start + BATCH]]
            self.client.delete(self.collection, ids, wait=True)

    def stored(self, root: str) -> Iterator[tuple[Item, np.ndarray]]:
        chosen, offset = self._filter(root=[root]), None
        while True:
            points, offset = self.client.scroll(
                self.collection, chosen, limit=BATCH, offset=offset, with_vectors=True
            )
            for point in points:
                yield _item(point)[1], np.array(point.vector, np.float32)
            if offset is None:
                return

    def nearest(self, vector: np.ndarray, k: int, kinds: Sequence[str] | None) -> list[Found]:
        chosen = None if kinds is None else self._filter(kind=kinds)
        found = self.client.query_points(self.collection, query=vector.tolist(), limit=k, query_filter=chosen)
        return [(float(point.score), *_item(point)) for point in found.points]

    def _filter(self, **values: Sequence[str]) -> Any:
        """Points whose payload has one of these values under a key."""
        models = self._models
        return models.Filter(
            must=[
                models.FieldCondition(key=key, match=models.MatchAny(any=list(some)))
                for key, some in values.items()
            ]
        )

    def __len__(self) -> int:
        return int(self.client.count(self.collection).count)

    def close(self) -> None:
        self.client.close()


def _id(root: str, item: Item) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{root}/{item.path}#{item.part}"))


def _item(point: Any) -> tuple[str, Item]:
    payload = dict(point.payload)
    return payload.pop("root"), Item(**payload)
