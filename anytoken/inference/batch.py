"""Sequences of unequal length that share one forward pass and one key-value cache.

A sequence joins with the ids it has so far and may join or leave at any step. Newcomers read their prompts in chunks
among themselves, equal prompts once; then every forward feeds one id of each sequence. A limit bounds the prompt ids
read between two decoding steps of the others (chunked prefill, Sarathi-Serve, arXiv 2403.02310). Positions count a
sequence's own ids, and so do the cache's columns: its hidden states do not depend on its company. Shapes: S sequences,
W ids of each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from anytoken.inference.kv_cache import KVCache, PrefixCache
from anytoken.inference.model_runner import ModelRunner
from anytoken.model.grid_positions import CodeWalk, Place

CHUNK = 512  # ids of a prompt that are read at once: bounds the memory of a long one
SHORT = 3  # up to this many waiting ids (some had no alternative) are cheaper one by one in the flat decoder


class BatchSequence:
    """One sequence of a batch: its ids, how many of them are in the cache, and where its beginning may be found."""

    def __init__(self, ids: Sequence[int], prefixes: PrefixCache | None = None) -> None:
        self.ids = list(ids)
        self.fed = 0
        self.prefixes = prefixes
        self._walk: CodeWalk | None = None
        self._places: list[Place] = []

    @property
    def waiting(self) -> int:
        """How many ids are still to be fed."""
        return len(self.ids) - self.fed

    def places(self, start: CodeWalk) -> list[Place]:
        """Of each id where the next code lies; start: the model's walk before any id."""
        self._walk = self._walk or start.copy()
        self._places += map(self._walk.step, self.ids[len(self._places) :])
        return self._places


class Batch:
    """Sequences that are decoded together; row s of the cache is that of `slots[s]`.

    In `slots`, the sequences that are decoded come first, then those that are reading their prompts, then those that
    have no row yet.
    """

    def __init__(self, head: ModelRunner) -> None:
        self.head = head
        weight = head.lm.get_input_embeddings().weight
        with torch.inference_mode():  # as later when it grows: a compiled step takes one kind of tensor
            self.cache = KVCache(head.lm.device, weight.dtype)
        self.slots: list[BatchSequence] = []
        self._read = 0  # slots before it have read their prompts
        self._known = 0  # slots before it have a row

    def add(self, ids: Sequence[int], prefixes: PrefixCache | None = None) -> BatchSequence:
        """A new sequence that begins with `ids`; it takes part from the next forward on."""
        slot = BatchSequence(ids, prefixes)
        self.slots.append(slot)
        return slot

    @property
    def decoded(self) -> list[BatchSequence]:
        """The sequences that the last forward gave features of, in order."""
        return self.slots[: self._read]

    def drop(self, slots: Collection[BatchSequence]) -> None:
        """Forget sequences; the last row takes the place of each. Those with `prefixes` leave there what they read."""
        for slot in slots:
            row = self.slots.index(slot)
            if slot.prefixes is not None and slot.fed:
                slot.prefixes.keep(slot.ids[: slot.fed], self.cache.read_row(row, slot.fed))
            if row < self._read:
                self._read -= 1
                row = self._move(self._read, row)
            if row < self._known:
                self._known -= 1
                row = self._move(self._known, row)
            del self.slots[row]

    def _move(self, source: int, target: int) -> int:
        """Put the sequence of one row in place of another's; the row that is free then."""
        if source != target:
            self.slots[target] = self.slots[source]
            self.cache.copy_row(source, target, self.slots[target].fed)
        return source

    def free(self) -> None:
        """Let go of the cache, even while a traceback still holds on to this batch."""
        self.slots.clear()
        self._read = self._known = 0
        self.cache.free()

    def forward(self, limit: int | None = None) -> Tensor | None:
        """Feed what is waiting, at least one id of each sequence; the head's features [S, ...] after each.

        limit: newcomers read at most this many ids, together, while others are decoded, and else one chunk each; those
        that have more to read have no features yet (`decoded`). A sequence without a waiting id, as one of a guided
        pair that waits for the other to be read, gets the features of its last one again, and if all are such or being
        read, the result is None. limit None: all read to the end.
        """
        self._admit(limit)
        width = max((slot.waiting for slot in self.decoded), default=0)
        if not width:
            return None
        if self.head.decoder is None or width > SHORT:
            return self._feed(0, self._read, width)
        while late := [row for row, slot in enumerate(self.decoded) if slot.waiting > 1]:
            if len(late) == self._read:
                self._feed(0, len(late), 1)
            else:
                for row in late:
                    self._feed(row, row + 1, 1)
        return self._feed(0, self._read, 1)

    def _admit(self, limit: int | None) -> None:
        """Let newcomers read all but the last chunk of their prompts; among others, all but the last id."""
        if self._read == len(self.slots):
            return
        first = self._place()
        start, followers = self._read, self.slots[self._known :]
        readers = self.slots[start : self._known]
        width, keep = CHUNK, 1 if start or followers else CHUNK
        if limit is not None and any(slot.waiting for slot in self.decoded):
            readers = readers[:limit]
            width = min(CHUNK, limit // len(readers))
        while (longest := max(slot.waiting for slot in readers)) > keep:
            self._feed(start, start + len(readers), min(width, longest - keep), keep=1)
            if limit is not None:
                break
        self._follow(first)
        for row in range(start, self._known):
            if self.slots[row].waiting <= keep:
                self._swap(row, self._read)
                self._read += 1

    def _place(self) -> dict[tuple[int, ...], BatchSequence]:
        """Give newcomers a row, of equal prompts only the first; who reads which prompt."""
        new = self.slots[self._known :]
        first = {tuple(slot.ids): slot for slot in reversed(self.slots[self._read : self._known])}
        for slot in new:
            first.setdefault(tuple(slot.ids), slot)
        leaders = [slot for slot in new if first[tuple(slot.ids)] is slot]
        self.slots[self._known :] = leaders + [slot for slot in new if first[tuple(slot.ids)] is not slot]
        self.cache.reserve(len(self.slots), max((len(slot.ids) for slot in new), default=0))
        for row, slot in enumerate(leaders, self._known):
            self.cache.clear_row(row)
            self._recall(row, slot)
        self._known += len(leaders)
        return first

    def _follow(self, first: dict[tuple[int, ...], BatchSequence]) -> None:
        """Copy what was read to those who have the same prompt."""
        rows = {slot: row for row, slot in enumerate(self.slots)}
        for slot in self.slots[self._known :]:
            leader = first[tuple(slot.ids)]
            if leader.waiting <= 1:
                self.slots.remove(slot)
                self.slots.insert(self._known, slot)
                self.cache.copy_row(rows[leader], self._known, leader.fed)
                slot.fed = leader.fed
                self._known += 1

    def _swap(self, row: int, other: int) -> None:
        if row != other:
            slots = self.slots
            self.cache.swap_rows(row, other, max(slots[row].fed, slots[other].fed))
            slots[row], slots[other] = slots[other], slots[row]

    def _recall(self, row: int, slot: BatchSequence) -> None:
        """Take the beginning of a sequence from its `prefixes`; its last id is always fed."""
        stored, length = slot.prefixes.find(slot.ids[:-1]) if slot.prefixes is not None else ([], 0)
        if length:
            self.cache.write_row(row, stored, length)
            slot.fed = length

    def _feed(self, start: int, stop: int, width: int, keep: int = 0) -> Tensor:
        """Feed up to `width` ids of slots start to stop, all but their last `keep`; the features after the last.

        A sequence that has fewer repeats its last one, at its place, where it writes again what is there.
        """
        ids, positions, code_places = [], [], []
        for slot in self.slots[start:stop]:
            take = min(width, slot.waiting - keep)
            last = max(slot.fed + take - 1, 0)
            places = [min(slot.fed + step, last) for step in range(width)]
            ids.append([slot.ids[place] for place in places])
            positions.append(places)
            if self.head.walk is not None:
                known = slot.places(self.head.walk)
                code_places.append([known[place] for place in places])
            slot.fed += take
        self.cache.reserve(len(self.slots), max(places[-1] for places in positions) + 1)
        self.cache.beyond = [slot.fed for slot in self.slots[stop : self._known]]
        return self.head.features(ids, positions, self.cache, start, code_places or None)
