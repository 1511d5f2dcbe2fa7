"""A table of PostgreSQL with pgvector (github.com/pgvector/pgvector) as the store of an index.

One row per item, with an HNSW index of cosines. Searches that HNSW cannot answer whole (more results than it looks at,
or only some kinds) read all rows. What describes the table is its comment, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, fields
from typing import Any

import numpy as np

from anytoken.inference.index_files import Item
from anytoken.inference.vector_store import Found, VectorStore
from anytoken.utils.errors import RequestError

LOOKED_AT = 200  # rows that HNSW compares for a search
WIDEST = 2000  # dimensions that pgvector's HNSW takes
COLUMNS = ", ".join(f'"{one.name}"' for one in fields(Item))


class PgvectorStore(VectorStore):
    """Items and vectors in a table."""

    def __init__(self, url: str, table: str) -> None:
        """RequestError if psycopg is not installed, or the database cannot be reached or has no pgvector."""
        try:
            import psycopg
        except ImportError as error:
            raise RequestError(f"This needs psycopg ({error}); pip install 'anytoken[pgvector]'.") from error
        self.errors = (psycopg.Error,)
        self.table, self._name = table, psycopg.sql.Identifier(table)
        try:
            self.database = psycopg.connect(url, autocommit=True)
            self.database.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except psycopg.Error as error:
            raise RequestError(
                f"PostgreSQL with pgvector is needed: {' '.join(str(error).split())}"
            ) from error

    def _run(self, query: str, values: Any = None, many: bool = False, **literals: Any) -> Any:
        """A query in which {table} and `literals` are filled in."""
        from psycopg import sql

        names = {name: sql.Literal(value) for name, value in literals.items()}
        text = sql.SQL(query).format(table=self._name, **names)
        cursor = self.database.cursor()
        return cursor.executemany(text, values) if many else cursor.execute(text, values)

    def meta(self) -> dict[str, Any] | None:
        row = self.database.execute(
            "SELECT obj_description(to_regclass(%s)), to_regclass(%s) IS NULL", [f'"{self.table}"'] * 2
        ).fetchone()
        if row is None or row[1]:
            return None
        try:
            found = json.loads(row[0] or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def create(self, meta: dict[str, Any]) -> None:
        with self.database.transaction():
            self._run(
                'CREATE TABLE {table} ("root" text, "path" text, "kind" text, "part" int, "text" text, "bytes" bigint,'
                ' "time_ns" bigint, "vector" vector({width}), PRIMARY KEY ("root", "path", "part"))',
                width=meta["width"],
            )
            if meta["width"] <= WIDEST:
                self._run('CREATE INDEX ON {table} USING hnsw ("vector" vector_cosine_ops)')
            self._run("COMMENT ON TABLE {table} IS {meta}", meta=json.dumps(meta))

    def drop(self) -> None:
        self._run("DROP TABLE {table}")

    def put(self, root: str, items: Sequence[Item], vectors: np.ndarray) -> None:
        rows = [(root, *astuple(item), _written(vector)) for item, vector in zip(items, vectors, strict=True)]
        marks = ", ".join(["%s"] * (1 + len(asdict(items[0])))) if items else ""
        with self.database.transaction():
            self._run(
                f'INSERT INTO {{table}} ("root", {COLUMNS}, "vector") VALUES ({marks}, %s::vector) '
                'ON CONFLICT ("root", "path", "part") DO UPDATE SET "kind" = EXCLUDED."kind", '
                '"text" = EXCLUDED."text", "bytes" = EXCLUDED."bytes", "time_ns" = EXCLUDED."time_ns", '
                '"vector" = EXCLUDED."vector"',
                rows, many=True,
            )  # fmt: skip

    def remove(self, root: str, items: Sequence[Item]) -> None:
        rows = [(root, item.path, item.part) for item in items]
        with self.database.transaction():
            self._run(
                'DELETE FROM {table} WHERE "root" = %s AND "path" = %s AND "part" = %s', rows, many=True
            )

    def stored(self, root: str) -> Iterator[tuple[Item, np.ndarray]]:
        for row in self._run(f'SELECT {COLUMNS}, "vector"::text FROM {{table}} WHERE "root" = %s', [root]):
            yield Item(*row[:-1]), np.array(json.loads(row[-1]), np.float32)

    def nearest(self, vector: np.ndarray, k: int, kinds: Sequence[str] | None) -> list[Found]:
        chosen = "" if kinds is None else 'WHERE "kind" = ANY(%(kinds)s)'
        with self.database.transaction():
            self._run("SET LOCAL hnsw.ef_search = {rows}", rows=LOOKED_AT)
            if kinds is not None or k > LOOKED_AT // 2:
                self._run("SET LOCAL enable_indexscan = off")
            found = self._run(
                f'SELECT 1 - ("vector" <=> %(vector)s::vector), "root", {COLUMNS} FROM {{table}} {chosen} '
                'ORDER BY "vector" <=> %(vector)s::vector LIMIT %(k)s',
                {"vector": _written(vector), "k": min(k, 2**31), "kinds": list(kinds or ())},
            ).fetchall()
        return [(float(row[0]), row[1], Item(*row[2:])) for row in found]

    def __len__(self) -> int:
        return int(self._run("SELECT count(*) FROM {table}").fetchone()[0])

    def close(self) -> None:
        self.database.close()


def _written(vector: np.ndarray) -> str:
    """A vector as pgvector reads it; nine digits keep a float32."""
    return "[" + ",".join(f"{value:.9g}" for value in vector.tolist()) + "]"
