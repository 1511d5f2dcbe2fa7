"""Sequences of unequal length that share one forward pass and one key-value cache.

A sequence joins with the ids it has so far and may join or leave at any step. Newcomers read their prompts in chunks
among themselves, equal prompts once; then every forward feeds one id of each sequence. Positions count a sequence's
own ids, and so do the cache's columns: its hidden states do not depend on its company. Shapes: S sequences, W ids of
each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from anytoken.inference.kv_cache import KVCache, PrefixCache
from anytoken.inference.model_runner import ModelRunner

CHUNK = 512  # ids of a prompt that are read at once: bounds the memory of a long one
SHORT = 3  # so many waiting ids (some had no choice) cost less one by one through the flat decoder


class Slot:
    """One sequence of a batch: its ids, how many of them are in the cache, and where its beginning may be found."""

    def __init__(self, ids: Sequence[int], prefixes: PrefixCache | None = None) -> None:
        self.ids = list(ids)
        self.fed = 0
        self.prefixes = prefixes

    @property
    def waiting(self) -> int:
        """How many ids are still to be fed."""
        return len(self.ids) - self.fed


class Batch:
    """Sequences that are decoded together; row s of the cache is that of `slots[s]`."""

    def __init__(self, head: ModelRunner) -> None:
        self.head = head
        weight = head.lm.get_input_embeddings().weight
        with torch.inference_mode():  # as later when it grows: a compiled step takes one kind of tensor
            self.cache = KVCache(head.lm.device, weight.dtype)
        self.slots: list[Slot] = []
        self._known = 0  # slots before it have been in a forward

    def add(self, ids: Sequence[int], prefixes: PrefixCache | None = None) -> Slot:
        """A new sequence that begins with `ids`; it takes part from the next forward on."""
        slot = Slot(ids, prefixes)
        self.slots.append(slot)
        return slot

    def drop(self, slots: Collection[Slot]) -> None:
        """Forget sequences; the last row takes the place of each. Those with `prefixes` leave there what they read."""
        for slot in slots:
            row = self.slots.index(slot)
            if row >= self._known:
                del self.slots[row]
                continue
            if slot.prefixes is not None:
                slot.prefixes.keep(slot.ids[: slot.fed], self.cache.read_row(row, slot.fed))
            self._known -= 1
            last = self.slots.pop(self._known)
            if last is not slot:
                self.cache.copy_row(self._known, row, last.fed)
                self.slots[row] = last

    def free(self) -> None:
        """Let go of the cache, even while a traceback still holds on to this batch."""
        self.slots.clear()
        self._known = 0
        self.cache.free()

    def forward(self) -> Tensor:
        """Feed what is waiting, at least one id of each sequence; the head's features [S, ...] after each."""
        self._admit()
        width = max(slot.waiting for slot in self.slots)
        if self.head.decoder is None or width > SHORT:
            return self._feed(0, len(self.slots), width)
        while late := [row for row, slot in enumerate(self.slots) if slot.waiting > 1]:
            if len(late) == len(self.slots):
                self._feed(0, len(late), 1)
            else:
                for row in late:
                    self._feed(row, row + 1, 1)
        return self._feed(0, len(self.slots), 1)

    def _admit(self) -> None:
        """Let newcomers read all but the last chunk of their prompts; among others, all but the last id."""
        old, new = self.slots[: self._known], self.slots[self._known :]
        if not new:
            return
        first: dict[tuple[int, ...], Slot] = {}
        for slot in new:
            first.setdefault(tuple(slot.ids), slot)
        followers = [slot for slot in new if first[tuple(slot.ids)] is not slot]
        leaders = list(first.values())
        self.slots = old + leaders + followers
        self._known = len(self.slots)
        self.cache.reserve(len(self.slots), max(len(slot.ids) for slot in new))
        for row in range(len(old), len(self.slots)):
            self.cache.clear_row(row)
        for row, slot in enumerate(leaders, len(old)):
            self._recall(row, slot)
        keep = 1 if old or followers else CHUNK
        while (longest := max(slot.waiting for slot in leaders)) > keep:
            self._feed(len(old), len(old) + len(leaders), min(CHUNK, longest - keep), keep=1)
        rows = {slot: row for row, slot in enumerate(self.slots)}
        for slot in followers:
            leader = first[tuple(slot.ids)]
            self.cache.copy_row(rows[leader], rows[slot], leader.fed)
            slot.fed = leader.fed

    def _recall(self, row: int, slot: Slot) -> None:
        """Take the beginning of a sequence from its `prefixes`; its last id is always fed."""
        stored, length = slot.prefixes.find(slot.ids[:-1]) if slot.prefixes is not None else ([], 0)
        if length:
            self.cache.write_row(row, stored, length)
            slot.fed = length

    def _feed(self, start: int, stop: int, width: int, keep: int = 0) -> Tensor:
        """Feed up to `width` ids of slots start to stop, all but their last `keep`; the features after the last.

        A sequence that has fewer repeats its last one, at its place, where it writes again what is there.
        """
        ids, positions = [], []
        for slot in self.slots[start:stop]:
            take = min(width, slot.waiting - keep)
            last = max(slot.fed + take - 1, 0)
            places = [min(slot.fed + step, last) for step in range(width)]
            ids.append([slot.ids[place] for place in places])
            positions.append(places)
            slot.fed += take
        self.cache.reserve(len(self.slots), max(places[-1] for places in positions) + 1)
        return self.head.features(ids, positions, self.cache, start)
