"""The key-value cache of a running batch: preallocated, one row per sequence, one column per position.

Column p of a row holds the token at position p, so a sequence's keys do not depend on the rest of the batch, a row can
be copied to another (many samples of one prompt) or kept for later (a chat's next turn), and joining or leaving a batch
moves at most one row. Columns beyond a row's length are masked. Storage doubles when it is full. It is a `Cache` of
transformers, so that any model's own forward pass can write to it.

Shapes: S sequences, W new tokens of each, T columns in sight, G key-value heads, E head dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from anytoken.model.attention import runs_flash
from anytoken.model.grid_positions import Place

COLUMNS = 256  # the least storage of a row
ROWS = 2  # the least storage: one row alone would be another case for compiled code
SIGHT = 64  # visible columns grow in steps of this size, so that a view of the storage serves as many steps
KeyValues = list[tuple[Tensor, Tensor]]
T = TypeVar("T")


class KVCache(Cache):
    """Keys and values [R, G, C, E] of every layer, and which columns each row may read, [R, 1, 1, C]."""

    one_sample_a_row = True  # a token is written where its position says: a row cannot hold two samples

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.seen = torch.full((ROWS, 1, 1, COLUMNS), -torch.inf, device=device, dtype=dtype)
        self.beyond: list[int] = []  # lengths of the rows after those of the current step
        self._columns = torch.arange(COLUMNS, device=device)
        self._flat: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self._views: tuple[tuple[int, int, int], KeyValues, Tensor] | None = None

    # ---- storage ----

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for this many rows and columns; what is stored keeps its place."""
        columns += SIGHT  # what is in sight is then never all there is, which compiled code would take for a new case
        have_rows, have_columns = self.seen.shape[0], self.seen.shape[-1]
        if rows <= have_rows and columns <= have_columns:
            return
        rows = max(have_rows, 1 << (rows - 1).bit_length())
        columns = max(have_columns, 1 << (columns - 1).bit_length())
        self.keys = [_grown(one, (rows, one.shape[1], columns, one.shape[3])) for one in self.keys]
        self.values = [_grown(one, (rows, one.shape[1], columns, one.shape[3])) for one in self.values]
        self.seen = _grown(self.seen, (rows, 1, 1, columns), -torch.inf)
        self._columns = torch.arange(columns, device=self.seen.device)
        self._views = None

    def free(self) -> None:
        """Free all keys and values."""
        self.keys.clear()
        self.values.clear()
        self._views = None

    def views(self, start: int, stop: int, length: int) -> tuple[KeyValues, Tensor]:
        """Inputs of rows start to stop at positions up to `length` - 1: keys and values of the layers, and the mask."""
        sight = self.sight(length)
        key = (start, stop, sight)
        if self._views is None or self._views[0] != key:
            layers = zip(self.keys, self.values, strict=True)
            seen = [(k[start:stop, :, :sight], v[start:stop, :, :sight]) for k, v in layers]
            self._views = (key, seen, self.seen[start:stop, ..., :sight])
        return self._views[1], self._views[2]

    def sight(self, length: int) -> int:
        """The number of columns that are read if the longest row has `length`."""
        return min(-(-length // SIGHT) * SIGHT, self.seen.shape[-1])

    def show(self, row: int, start: int, stop: int) -> None:
        """Let a row read its columns from start to stop."""
        self.seen[row, ..., start:stop] = 0

    # ---- rows ----

    def read_row(self, row: int, length: int) -> KeyValues:
        """Copies of a row's first `length` columns."""
        layers = zip(self.keys, self.values, strict=True)
        return [(k[row, :, :length].clone(), v[row, :, :length].clone()) for k, v in layers]

    def write_row(self, row: int, stored: KeyValues, length: int) -> None:
        """Write the first `length` columns of a `read_row` result to an empty row."""
        if not self.keys:
            self._allocate([(k[None], v[None]) for k, v in stored])
        for keys, values, (k, v) in zip(self.keys, self.values, stored, strict=True):
            keys[row, :, :length] = k[:, :length]
            values[row, :, :length] = v[:, :length]
        self.show(row, 0, length)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` columns of `source`, and nothing else."""
        for layer in (*self.keys, *self.values):
            layer[target, :, :length] = layer[source, :, :length]
        self.clear_row(target)
        self.show(target, 0, length)

    def swap_rows(self, one: int, other: int, length: int) -> None:
        """Exchange two rows, of which neither holds more than `length` columns."""
        there, back = [one, other], [other, one]
        for layer in (*self.keys, *self.values):
            layer[there, :, :length] = layer[back, :, :length]
        self.seen[there] = self.seen[back]

    def clear_row(self, row: int) -> None:
        """Let a row read nothing."""
        self.seen[row] = -torch.inf

    # ---- what a model's own forward does with a cache ----

    def aim(self, start: int, positions: Tensor) -> None:
        """Set where the next `update` of every layer writes: rows from `start` on, at positions [S, W]."""
        self._flat = None
        self._rows = slice(start, start + len(positions))
        self._positions = positions
        self._length = int(positions.max()) + 1
        self.seen[self._rows, 0, 0].masked_fill_(self._columns <= positions[:, -1:], 0)

    def aim_flat(self, start: int, positions: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The same for N tokens of all rows, concatenated for FlashAttention, at consecutive positions.

        Returns its arguments: where each row's new tokens (q) and keys (k) begin, and the maximum per row.
        """
        device, lasts = self.seen.device, [row[-1] for row in positions]
        new, lengths = (
            [last - row[0] + 1 for row, last in zip(positions, lasts, strict=True)],
            [n + 1 for n in lasts],
        )
        rows = torch.arange(start, start + len(positions), device=device)

        def places(counts: list[int], firsts: list[int]) -> tuple[Tensor, Tensor]:
            columns = [torch.arange(n, n + count) for n, count in zip(firsts, counts, strict=True)]
            return rows.repeat_interleave(torch.tensor(counts, device=device)), torch.cat(columns).to(device)

        self._flat = places(new, [row[0] for row in positions]), places(lengths, [0] * len(lengths))
        self._length = max(lengths)
        last = torch.tensor(lasts, device=device)[:, None]
        self.seen[start : start + len(positions), 0, 0].masked_fill_(self._columns <= last, 0)
        edges = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (new, lengths)]
        return {
            "cu_seq_lens_q": edges[0], "cu_seq_lens_k": edges[1],
            "max_length_q": max(new), "max_length_k": max(lengths),
        }  # fmt: skip

    def causal_mask(self, window: int | None = None) -> Tensor:
        """The mask [S, 1, W, T] of that write: each token reads its row up to itself, at most `window` columns."""
        columns, positions = self._columns[: self._length], self._positions[:, None, :, None]
        open_ = columns <= positions
        if window is not None:
            open_ &= columns > positions - window
        closed = torch.full((), torch.finfo(self.seen.dtype).min, device=open_.device, dtype=self.seen.dtype)
        return torch.where(open_, torch.zeros_like(closed), closed)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [S, G, W, E]; all that the rows hold, [S, G, T, E].

        After `aim_flat` [1, G, N, E], and the concatenated rows.
        """
        if layer_idx == len(self.keys):
            self._allocate([(key_states, value_states)])
        seen = []
        if self._flat is not None:
            (rows, columns), (held_rows, held_columns) = self._flat
            for layer, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
                layer[rows, :, columns] = new[0].transpose(0, 1)
                seen.append(layer[held_rows, :, held_columns].transpose(0, 1)[None])
            return seen[0], seen[1]
        for layer, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            rows = layer[self._rows]
            index = self._positions[:, None, :, None].expand_as(new)
            seen.append(rows.scatter_(2, index, new)[:, :, : self._length])
        return seen[0], seen[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of columns of the longest row in the current write."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of columns of a mask, starting at the first."""
        return self._length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the new tokens begin; unused, since rows differ and FlashAttention has its own lengths."""
        return 0

    def _allocate(self, layers: KeyValues) -> None:
        """Storage for further layers like these keys and values [S, G, W, E]."""
        rows, columns = self.seen.shape[0], self.seen.shape[-1]
        for k, v in layers:
            self.keys.append(k.new_zeros(rows, k.shape[1], columns, k.shape[3]))
            self.values.append(v.new_zeros(rows, v.shape[1], columns, v.shape[3]))


def forward_inputs(
    lm: PreTrainedModel,
    ids: list[list[int]],
    positions: list[list[int]],
    cache: KVCache,
    start: int,
    code_places: list[list[Place]] | None = None,
) -> tuple[dict[str, Any], Tensor | None]:
    """Inputs of a model's own forward pass that feed ids at positions [S, W] to the cache's rows from `start` on.

    code_places: [S, W, 4], for a model with grid positions.
    A row with fewer ids repeats its last one. For FlashAttention, which takes no mask, the rows are laid end to end
    without repetitions; then also where in the output the last id of each row is, [S].
    """
    flash = runs_flash(lm)
    if flash:
        extra = cache.aim_flat(start, positions)
        counts = [row[-1] - row[0] + 1 for row in positions]
        ids, positions = _end_to_end(ids, counts), _end_to_end(positions, counts)
        code_places = code_places and _end_to_end(code_places, counts)
    where = torch.tensor(positions, device=lm.device)
    if not flash:
        cache.aim(start, where)
        extra = {"attention_mask": _masks(lm.config.get_text_config(), cache)}
    inputs = {
        "input_ids": torch.tensor(ids, device=lm.device),
        "position_ids": where,
        "past_key_values": cache,
        "use_cache": True,
        **extra,
    }
    if code_places is not None:
        inputs["code_places"] = torch.tensor(code_places, device=lm.device)
    return inputs, extra["cu_seq_lens_q"][1:].long() - 1 if flash else None


def _end_to_end(rows: list[list[T]], counts: list[int]) -> list[list[T]]:
    """The first `counts[i]` elements of each row i, concatenated."""
    return [[one for row, count in zip(rows, counts, strict=True) for one in row[:count]]]


def _masks(config: PretrainedConfig, cache: KVCache) -> Tensor | dict[str, Tensor]:
    """One mask, or one per layer type if some layers use sliding windows."""
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if window is None or "sliding_attention" not in types:
        return cache.causal_mask(None if types else window)
    return {"full_attention": cache.causal_mask(), "sliding_attention": cache.causal_mask(window)}


class PrefixCache:
    """Keys and values of decoded sequences, reused for prompts with a common prefix.

    A chat keeps one: its next turn then reads only what is new. At most `max_sequences` are kept (least recently used
    goes first). Entries of other weights are not used.
    """

    def __init__(self, max_sequences: int = 1) -> None:
        self.max_sequences = max_sequences
        self._weights: object = None
        self._stored: OrderedDict[tuple[int, ...], KeyValues] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def use(self, weights: object) -> None:
        """Set the model in use, by anything that identifies it; what other models stored is dropped."""
        if self._weights != weights:
            self._stored.clear()
        self._weights = weights

    def find(self, ids: Sequence[int]) -> tuple[KeyValues, int]:
        """The stored sequence that agrees longest with the beginning of `ids`, and how far; ([], 0) if none."""
        best: tuple[int, ...] = ()
        length = 0
        for stored in self._stored:
            agreed = agreement(stored, ids)
            if agreed > length:
                best, length = stored, agreed
        if not length:
            return [], 0
        self._stored.move_to_end(best)
        return self._stored[best], length

    def keep(self, ids: Sequence[int], stored: KeyValues) -> None:
        """Store a sequence, replacing its prefixes."""
        key = tuple(ids)
        for old in [old for old in self._stored if agreement(old, key) == len(old)]:
            del self._stored[old]
        self._stored[key] = stored
        while len(self._stored) > self.max_sequences:
            self._stored.popitem(last=False)


def agreement(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    shortest = min(len(left), len(right))
    return next((place for place in range(shortest) if left[place] != right[place]), shortest)


def _grown(old: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """A larger tensor with the old one at its beginning, in the same memory layout (required by compiled code)."""
    grown = old.new_full(shape, fill)
    grown[tuple(slice(length) for length in old.shape)] = old
    return grown
