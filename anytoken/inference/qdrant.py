"""An index on a Qdrant server, for collections that many machines share; `:memory:` or a folder for one machine.

    store = QdrantIndex(model, "http://localhost:6333", "photos")
    store.add(anytoken.Index.build("photos", model)); store.search("a fox on blue", k=5)

Payloads are the fields of `Item`, so Qdrant's own filters work on them. Point ids are derived from the item: adding an
item again replaces it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from anytoken.inference.api import AnyToken
from anytoken.inference.index import Hit, Index
from anytoken.inference.index_files import Item
from anytoken.utils.errors import RequestError

BATCH = 256  # points of one request


class QdrantIndex:
    """Items and vectors in a collection of a Qdrant server."""

    def __init__(self, model: AnyToken, url: str, collection: str, untrained: bool = False) -> None:
        """url: of a server, ":memory:", or a folder. RequestError if qdrant-client is not installed, or the collection
        has vectors of another width."""
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise RequestError(
                f"This needs qdrant-client ({error}); pip install 'anytoken[qdrant]'."
            ) from error
        where: dict[str, Any] = (
            {"url": url} if "://" in url else {"location": url} if url == ":memory:" else {"path": url}
        )
        self.model, self.collection, self.untrained = model, collection, untrained
        self.client, self._models = QdrantClient(**where), models
        width = len(model.embedding_probe(untrained))
        if not self.client.collection_exists(collection):
            space = models.VectorParams(size=width, distance=models.Distance.COSINE)
            self.client.create_collection(collection, vectors_config=space)
        vectors: Any = self.client.get_collection(collection).config.params.vectors
        held = vectors.size
        if held != width:
            raise RequestError(
                f"The collection {collection} holds vectors of {held} dimensions, and this model's have {width}."
            )

    def __len__(self) -> int:
        return int(self.client.count(self.collection).count)

    def add(self, index: Index) -> None:
        """Add the items of an index; existing ones are replaced."""
        root = index.meta["root"]
        for start in range(0, len(index), BATCH):
            points = [
                self._models.PointStruct(
                    id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{root}/{item.path}#{item.part}")),
                    vector=vector.tolist(),
                    payload={**asdict(item), "root": root},
                )
                for item, vector in zip(
                    index.items[start : start + BATCH], index.vectors[start : start + BATCH], strict=True
                )
            ]
            self.client.upsert(self.collection, points)

    def search(self, query: Any, k: int = 10, kinds: Sequence[str] | None = None) -> list[Hit]:
        """The k items nearest to a query (as for `Index.search`), best first."""
        models, chosen = self._models, None
        if kinds is not None:
            match = models.MatchAny(any=list(kinds))
            chosen = models.Filter(must=[models.FieldCondition(key="kind", match=match)])
        vector = (
            query if isinstance(query, np.ndarray) else self.model.embed([query], untrained=self.untrained)[0]
        )
        found = self.client.query_points(self.collection, query=vector.tolist(), limit=k, query_filter=chosen)
        hits = []
        for point in found.points:
            payload = dict(point.payload or {})
            root = Path(payload.pop("root"))
            item = Item(**payload)
            hits.append(Hit(float(point.score), item, root / item.path))
        return hits
