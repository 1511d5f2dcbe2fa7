"""The token space: text ids, control ids, then a contiguous range of ids for every codebook.

Order: text ids from 0, the shared control ids, then, for each modality in the order of appending, its open and close
ids, one range per codebook and one for its global codes, if any. Appending never moves an id, so a modality can be
added to a trained checkpoint. The meaning of an id is arithmetic (`torch.bucketize` over a few boundaries); there are
no strings such as ``<img17>``, and names are only for display. One discrete stream for all modalities is the idea of
Chameleon (arXiv 2405.09818) and Unified-IO (arXiv 2206.08916).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from anytoken.tokenizers.base import CodeGrid, CodeShape, TokenizerError, code_shape_from_dict
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import TokenSpaceError

CONTROLS = ("pad", "bos", "user", "assistant", "system", "end", "null")
VERSION = 1


@dataclass(frozen=True)
class Range:
    """Ids start to stop - 1 of one kind; `codebook` counts within the modality; None for global codes and other ids."""

    name: str
    start: int
    stop: int
    kind: Literal["text", "control", "code"]
    modality: str
    codebook: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start


class TokenSpace:
    """The meaning of every id.

    The control ids are attributes: `pad`, `bos` (begins a sequence), `user`, `assistant`, `system` (begin a
    turn), `end` (ends one), and `null` (stands for a dropped prompt in classifier-free guidance). Size tokens
    1 to `max_size_token` are shared by all grids.
    """

    pad: int
    bos: int
    user: int
    assistant: int
    system: int
    end: int
    null: int

    def __init__(
        self, text_size: int, max_size_token: int = 64, text_ranges: Iterable[Sequence[int]] | None = None
    ) -> None:
        """A space with only text and control ids; TokenSpaceError unless both numbers are at least 1.

        text_ranges: ascending half-open spans of the text ids that stand for text, if not all do: a backbone keeps
        its rows, but its own special ids and padding are never read or generated.
        """
        if text_size < 1 or max_size_token < 1:
            raise TokenSpaceError(
                f"text_size and max_size_token must be at least 1; received {text_size} and {max_size_token}."
            )
        self.text_size = int(text_size)
        self.text_ranges = tuple((int(a), int(b)) for a, b in text_ranges or [(0, self.text_size)])
        edges = [edge for span in self.text_ranges for edge in span]
        if edges != sorted(edges) or edges[0] < 0 or edges[-1] > self.text_size:
            raise TokenSpaceError(
                f"text_ranges are ascending spans within 0 to {self.text_size}; received {self.text_ranges}."
            )
        self.max_size_token = int(max_size_token)
        for offset, name in enumerate(CONTROLS):
            setattr(self, name, self.text_size + offset)
        self._size_zero = self.text_size + len(CONTROLS) - 1
        first_free = self._size_zero + self.max_size_token + 1
        self.ranges: list[Range] = [
            Range("text", 0, self.text_size, "text", "text"),
            Range("control", self.text_size, first_free, "control", "text"),
        ]
        self.shapes: dict[str, CodeShape] = {}
        self._codebooks: dict[str, list[Range]] = {}
        self._globals: dict[str, Range] = {}
        self._opens: dict[str, int] = {}
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # ---- modalities ----

    def append_modality(
        self, name: str, codebook_sizes: Sequence[int], shape: CodeShape, global_codebook_size: int = 0
    ) -> None:
        """Append a modality's ids at the end: open, close, a range per codebook and one for global codes.

        TokenSpaceError, without changing anything, for a name that is taken or not an identifier, for sizes that do
        not fit the shape, and for a grid larger than the size tokens can express.
        """
        sizes = [int(size) for size in codebook_sizes]
        self._check_new(name, sizes, shape, global_codebook_size)
        start = self.vocab_size
        self._opens[name] = start
        self.ranges.append(Range(f"{name} control", start, start + 2, "control", name))
        self._codebooks[name] = []
        for codebook, size in enumerate(sizes):
            label = name if len(sizes) == 1 else f"{name}[{codebook}]"
            span = Range(label, self.vocab_size, self.vocab_size + size, "code", name, codebook)
            self.ranges.append(span)
            self._codebooks[name].append(span)
        if global_codebook_size:
            size = self.vocab_size + int(global_codebook_size)
            self._globals[name] = Range(f"{name}.global", self.vocab_size, size, "code", name)
            self.ranges.append(self._globals[name])
        self.shapes[name] = shape
        self._tables.clear()

    def _check_new(self, name: str, sizes: list[int], shape: CodeShape, global_size: int) -> None:
        reserved = ("text", "size", *CONTROLS)
        if not isinstance(name, str) or not name.isidentifier() or name in reserved:
            raise TokenSpaceError(
                f"A modality's name is an identifier other than {', '.join(reserved)}; received {name!r}."
            )
        if name in self.shapes:
            raise TokenSpaceError(
                f"Modality {name!r} is in the token space already (it holds {', '.join(self.modality_names)}); "
                "give the new one another name."
            )
        if not sizes or min(sizes) < 1 or len(sizes) != shape.num_codebooks:
            raise TokenSpaceError(
                f"{name} declares {shape.num_codebooks} codebooks and needs that many sizes of at least 1; "
                f"received {sizes}."
            )
        if bool(shape.num_global_codes) != (global_size > 0):
            raise TokenSpaceError(
                f"{name} declares {shape.num_global_codes} global codes; received a global_codebook_size of "
                f"{global_size}; both or neither are 0."
            )
        if isinstance(shape, CodeGrid) and max(shape.max_size) > self.max_size_token:
            raise TokenSpaceError(
                f"{name} grids reach {max(shape.max_size)} on an axis, but size tokens end at {self.max_size_token}; "
                "declare a smaller max_size or begin a TokenSpace with a larger max_size_token."
            )

    @property
    def modalities(self) -> list[str]:
        """Names of the appended modalities, in order."""
        return list(self.shapes)

    @property
    def modality_names(self) -> list[str]:
        """ "text" and the modalities, in the order of the indices of `modality_of`."""
        return ["text", *self.shapes]

    @property
    def vocab_size(self) -> int:
        """The number of ids, which is the first free one."""
        return self.ranges[-1].stop

    # ---- ids ----

    def size_token(self, n: int) -> int:
        """The id for n cells along an axis, n from 1 to `max_size_token`."""
        if not 1 <= n <= self.max_size_token:
            raise TokenSpaceError(f"Size tokens go from 1 to {self.max_size_token}; received {n}.")
        return self._size_zero + int(n)

    def open_token(self, modality: str) -> int:
        """The id that begins a segment of this modality."""
        return self._opens[self._known(modality)]

    def close_token(self, modality: str) -> int:
        """The id that ends a segment of this modality."""
        return self._opens[self._known(modality)] + 1

    def code_range(self, modality: str, codebook: int = 0) -> Range:
        """The ids of one codebook: code c is id `start + c`."""
        books = self._codebooks[self._known(modality)]
        if not 0 <= codebook < len(books):
            raise TokenSpaceError(f"{modality} has codebooks 0 to {len(books) - 1}; received {codebook}.")
        return books[codebook]

    def global_range(self, modality: str) -> Range:
        """The ids of a modality's global codes; TokenSpaceError if it has none."""
        if self._known(modality) not in self._globals:
            raise TokenSpaceError(f"{modality} has no global codes.")
        return self._globals[modality]

    def global_codebook_size(self, modality: str) -> int:
        """The number of values of a modality's global codes; 0 without global codes."""
        span = self._globals.get(self._known(modality))
        return len(span) if span else 0

    def codebook_sizes(self, modality: str) -> tuple[int, ...]:
        """The number of codes in each codebook of a modality."""
        return tuple(len(span) for span in self._codebooks[self._known(modality)])

    def _known(self, modality: str) -> str:
        if modality not in self._opens:
            choices = ", ".join(self.shapes) or "none yet"
            raise TokenSpaceError(f"Unknown modality {modality!r}; this token space has {choices}.")
        return modality

    def range_of(self, token: int) -> Range:
        """The range of an id; TokenSpaceError outside 0 to vocab_size - 1."""
        if not 0 <= token < self.vocab_size:
            raise TokenSpaceError(f"Ids go from 0 to {self.vocab_size - 1}; received {token}.")
        return self.ranges[bisect_right(self.ranges, token, key=lambda span: span.start) - 1]

    def token_name(self, token: int) -> str:
        """Display name: text:5, <|bos|>, <|size:8|>, <|image|>, <|/image|>, image:17, tone[1]:3, image.global:2."""
        span = self.range_of(token)
        if span.kind != "control":
            return f"{span.name}:{token - span.start}"
        if span.modality != "text":
            return f"<|{'/' if token > span.start else ''}{span.modality}|>"
        if token > self._size_zero:
            return f"<|size:{token - self._size_zero}|>"
        return f"<|{CONTROLS[token - self.text_size]}|>"

    def describe(self, spans: Iterable[tuple[int, int]]) -> str:
        """A description of half-open spans of ids, such as "text:0 to text:299, <|end|>"; "nothing" for none."""
        parts = []
        for start, stop in spans:
            inner = [span.start for span in self.ranges if start < span.start < stop]
            for first, after in zip([start, *inner], [*inner, stop], strict=True):
                name = self.token_name(first)
                parts.append(name if after - first == 1 else f"{name} to {self.token_name(after - 1)}")
        return ", ".join(parts) or "nothing"

    # ---- modality of ids, vectorised ----

    def bucket_boundaries(self) -> list[int]:
        """Ids at which the modality changes, ascending; buckets are counted with `right=True`."""
        return [start for start, _ in self._buckets()[1:]]

    def bucket_modalities(self) -> list[int]:
        """Index into `modality_names` of every bucket; one more than boundaries."""
        return [index for _, index in self._buckets()]

    def _buckets(self) -> list[tuple[int, int]]:
        names = {name: index for index, name in enumerate(self.modality_names)}
        buckets: list[tuple[int, int]] = []
        for span in self.ranges:
            index = names[span.modality] if span.kind == "code" else 0
            if not buckets or buckets[-1][1] != index:
                buckets.append((span.start, index))
        return buckets

    def modality_of(self, ids: Tensor) -> Tensor:
        """Index into `modality_names` of each id, int64, same shape; all control ids count as text."""
        if ids.device not in self._tables:
            self._tables[ids.device] = (
                torch.tensor(self.bucket_boundaries(), dtype=torch.long, device=ids.device),
                torch.tensor(self.bucket_modalities(), dtype=torch.long, device=ids.device),
            )
        boundaries, modalities = self._tables[ids.device]
        return modalities[torch.bucketize(ids, boundaries, right=True)]

    # ---- saving, loading, comparing ----

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON-ready data."""
        whole = self.text_ranges == ((0, self.text_size),)
        return {
            "version": VERSION,
            "text_size": self.text_size,
            **({} if whole else {"text_ranges": [list(span) for span in self.text_ranges]}),
            "max_size_token": self.max_size_token,
            "modalities": [
                {
                    "name": name,
                    "codebook_sizes": list(self.codebook_sizes(name)),
                    "shape": shape.to_dict(),
                    **({"global_codebook_size": size} if (size := self.global_codebook_size(name)) else {}),
                }
                for name, shape in self.shapes.items()
            ],
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenSpace:
        """The inverse of `to_dict`; TokenSpaceError says what is wrong."""
        try:
            if data["version"] != VERSION:
                raise TokenSpaceError(
                    f"version {data['version']!r} is not known; this library reads {VERSION}"
                )
            space = cls(data["text_size"], data["max_size_token"], data.get("text_ranges"))
            for entry in data["modalities"]:
                space.append_modality(
                    entry["name"],
                    entry["codebook_sizes"],
                    code_shape_from_dict(entry["shape"]),
                    entry.get("global_codebook_size", 0),
                )
            expected = data["vocab_size"]
        except (KeyError, TypeError, AttributeError, TokenizerError) as error:
            raise TokenSpaceError(f"the data are incomplete or malformed ({error!r})") from error
        if space.vocab_size != expected:
            raise TokenSpaceError(f"it claims {expected} ids, but its ranges come to {space.vocab_size}")
        return space

    def save(self, path: str | Path) -> Path:
        """Write token_space.json, completely or not at all."""
        return write_file(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TokenSpace:
        """Read a file written by `save`; TokenSpaceError names a file that is missing, truncated or altered."""
        path = Path(path)
        if not path.is_file():
            raise TokenSpaceError(f"{path} is missing: the checkpoint folder is incomplete; copy it again.")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise TokenSpaceError(
                f"{path} is not a usable token space: {error}; copy the checkpoint again."
            ) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenSpace) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # appending changes it

    def __repr__(self) -> str:
        parts = [f"text {self.text_size}"]
        for name in self.shapes:
            sizes = "+".join(str(size) for size in self.codebook_sizes(name))
            parts.append(
                f"{name} {sizes}" + (f" global {n}" if (n := self.global_codebook_size(name)) else "")
            )
        return f"TokenSpace({self.vocab_size} ids: {', '.join(parts)})"
