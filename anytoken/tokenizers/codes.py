"""Codes and their shapes: what a tokenizer provides to the grammar, the processor and the shards.

Shapes: N positions of local codes, Q codebooks, G global codes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anytoken import moved
from anytoken.utils.errors import TokenizerError

PATTERNS = ("flatten", "delay")
NO_HEADER = np.zeros(0, dtype=np.int64)
NO_HEADER.setflags(write=False)


@dataclass(frozen=True)
class CodeGrid:
    """Codes on a grid: a size header (one number per axis), then prod(size) positions in raster order.

    order: see `codebook_pattern`. num_global_codes: global codes between the size header and the positions.
    """

    axes: tuple[str, ...]
    min_size: tuple[int, ...]
    max_size: tuple[int, ...]
    num_codebooks: int = 1
    order: str = "flatten"
    num_global_codes: int = 0

    def __post_init__(self) -> None:
        _check_declared(self)
        for field in ("axes", "min_size", "max_size"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.axes or not len(self.axes) == len(self.min_size) == len(self.max_size):
            raise TokenizerError(f"CodeGrid needs one min and one max per axis; got {self}.")
        if any(lo < 1 or hi < lo for lo, hi in zip(self.min_size, self.max_size, strict=True)):
            raise TokenizerError(f"CodeGrid needs 1 <= min_size <= max_size on every axis; got {self}.")
        if self.num_codebooks < 1:
            raise TokenizerError(f"CodeGrid needs at least one codebook; got {self.num_codebooks}.")

    def to_dict(self) -> dict[str, Any]:
        """The declaration as JSON-ready data."""
        return {"type": "grid", **_declared(self)}


@dataclass(frozen=True)
class CodeSequence:
    """A sequence of codes: `min_length` to `max_length` frames of `num_codebooks` codes each.

    order: see `codebook_pattern`. num_global_codes: global codes before the first frame.
    """

    min_length: int
    max_length: int
    num_codebooks: int = 1
    order: str = "flatten"
    num_global_codes: int = 0

    def __post_init__(self) -> None:
        _check_declared(self)
        if not 1 <= self.min_length <= self.max_length or self.num_codebooks < 1:
            raise TokenizerError(
                f"CodeSequence needs 1 <= min_length <= max_length and num_codebooks >= 1; got {self}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The declaration as JSON-ready data."""
        return {"type": "run", **_declared(self)}


CodeShape = CodeGrid | CodeSequence


def _check_declared(shape: CodeShape) -> None:
    pattern = moved.current_settings({"codebook_pattern": shape.order})["codebook_pattern"]
    object.__setattr__(shape, "order", pattern)
    if shape.order not in PATTERNS:
        raise TokenizerError(f"Unknown codebook pattern {shape.order!r}; allowed: {', '.join(PATTERNS)}.")
    if not isinstance(shape.num_global_codes, int) or shape.num_global_codes < 0:
        raise TokenizerError(
            f"num_global_codes is a whole number, 0 for none; received {shape.num_global_codes!r}."
        )


def _declared(shape: CodeShape) -> dict[str, Any]:
    """The fields of a shape; `order` and `num_global_codes` only if not the default, as in older files."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(shape).items()}
    return {k: v for k, v in fields.items() if (k, v) not in (("order", "flatten"), ("num_global_codes", 0))}


def codebook_pattern(shape: CodeShape, frames: int) -> np.ndarray:
    """The order of the codes of `frames` frames in a sequence: flat indices frame * Q + codebook, int64 [frames * Q].

    "flatten": frame by frame. "delay": codebook q of a frame is written with codebook 0 of the q-th later frame
    (the delay pattern of MusicGen, arXiv 2306.05284, without padding), so that the first codes are known early.
    """
    books = shape.num_codebooks
    flat = np.arange(frames * books)
    if shape.order == "flatten":
        return flat
    return np.lexsort((flat % books, flat // books + flat % books))


def code_shape_from_dict(data: dict[str, Any]) -> CodeShape:
    """Read back what `to_dict` wrote; TokenizerError on an unknown type."""
    fields = {k: moved.PATTERNS.get(v, v) if k == "order" else v for k, v in data.items() if k != "type"}
    types: dict[str, type[CodeShape]] = {"grid": CodeGrid, "run": CodeSequence}
    if data.get("type") not in types:
        raise TokenizerError(f"Unknown code shape {data.get('type')!r}; allowed: {', '.join(types)}.")
    return types[data["type"]](**fields)


@dataclass(frozen=True, eq=False)
class Codes:
    """Discrete codes of one segment: local codes `values` int64 [N, Q]; `size` is the grid size, or () for a sequence.

    header: global codes int64 [G], none by default.
    """

    values: np.ndarray
    size: tuple[int, ...] = ()
    header: np.ndarray = dataclasses.field(default_factory=lambda: NO_HEADER)

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.int64)
        header = np.asarray(self.header, dtype=np.int64)
        if values.ndim != 2:
            raise TokenizerError(f"Codes need an array [N, Q]; got shape {values.shape}.")
        if header.ndim != 1:
            raise TokenizerError(f"Global codes are an array [G]; got shape {header.shape}.")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        object.__setattr__(self, "header", header)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Codes)
            and self.size == other.size
            and np.array_equal(self.values, other.values)
            and np.array_equal(self.header, other.header)
        )

    def __len__(self) -> int:
        return len(self.values)
