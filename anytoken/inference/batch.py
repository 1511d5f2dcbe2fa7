"""Sequences of unequal length that share one forward pass and one key-value cache.

A sequence joins with the tokens it still has to feed and may join or leave at any step. Each forward feeds
every sequence all it has pending, padded on the left; padding stays in the cache as masked holes, so prompts
of unequal length, forced tokens and late joiners are one mechanism. Positions count real tokens only, so a
sequence's hidden states do not depend on its company. Shapes: S sequences, W new columns, T cached columns, D
model dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

log = logging.getLogger(__name__)

Ranges = tuple[tuple[int, int], ...]


class Head:
    """Logits of the allowed ids only: 4 k rows of the output matrix for a picture, not all of the vocabulary.

    Slicing is used where it gives what the model itself gives. A model that scales or caps its logits, or
    whose head is wrapped by an adapter, is asked for its logits and the allowed columns are taken.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.layer = lm.get_output_embeddings()
        self.sliced = self._slicing_is_exact()
        if not self.sliced:
            log.info("%s makes its logits in its own way: all of them are computed", type(lm).__name__)

    @torch.inference_mode()
    def _slicing_is_exact(self) -> bool:
        if type(self.layer) is not nn.Linear:
            return False
        probe = torch.zeros(1, 1, dtype=torch.long, device=self.lm.device)
        expected = self.lm(input_ids=probe, use_cache=False).logits
        hidden = getattr(self.lm.base_model(input_ids=probe, use_cache=False), "last_hidden_state", None)
        if hidden is None:  # a PeftModel's base model is the causal LM again
            return False
        return torch.allclose(self.layer(hidden).float(), expected.float(), rtol=1e-3, atol=1e-4)

    def features(self, **inputs: object) -> Tensor:
        """Run the model; what `__call__` needs of the last position: [S, D], or [S, V] when unsliced."""
        if self.sliced:
            return self.lm.base_model(**inputs).last_hidden_state[:, -1]
        return self.lm(**inputs, logits_to_keep=1).logits[:, -1]

    def __call__(self, features: Tensor, ranges: Ranges) -> Tensor:
        """Logits [N, K] in float32 on the CPU, of the K ids of `ranges` in order, from N rows of features."""
        if self.sliced:
            weight, bias = self.layer.weight, self.layer.bias
            parts = [
                F.linear(features, weight[start:stop], None if bias is None else bias[start:stop])
                for start, stop in ranges
            ]
        else:
            parts = [features[:, start:stop] for start, stop in ranges]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).float().cpu()


@dataclass(eq=False)
class Slot:
    """One sequence of a batch: the ids it has yet to feed, and how many it has fed."""

    pending: list[int]
    fed: int = 0


class Batch:
    """Sequences that are decoded together."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.device = head.lm.device
        self.cache = DynamicCache(config=head.lm.config)
        self.slots: list[Slot] = []
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=self.device)
        self.holes = False

    def add(self, ids: Sequence[int]) -> Slot:
        """A new sequence that begins with `ids`; it takes part from the next forward on."""
        slot = Slot(list(ids))
        self.slots.append(slot)
        return slot

    def drop(self, slots: Sequence[Slot]) -> None:
        """Forget sequences and their cache rows."""
        keep = [row for row, slot in enumerate(self.slots[: len(self.mask)]) if slot not in slots]
        self.slots = [slot for slot in self.slots if slot not in slots]
        index = torch.tensor(keep, dtype=torch.long, device=self.device)
        self.mask = self.mask[index]
        self.holes = not bool(self.mask.all())
        if keep:
            self.cache.batch_select_indices(index)

    def free(self) -> None:
        """Let go of the cache, even while a traceback still holds on to this batch."""
        self.cache.layers.clear()

    def forward(self) -> Tensor:
        """Feed what is pending, at least one id per sequence; the head's features [S, ...] after each."""
        self._admit()
        width = max(len(slot.pending) for slot in self.slots)
        ids, positions, real = [], [], []
        for slot in self.slots:
            gap = width - len(slot.pending)
            ids.append([0] * gap + slot.pending)
            positions.append([0] * gap + list(range(slot.fed, slot.fed + len(slot.pending))))
            real.append([False] * gap + [True] * len(slot.pending))
            self.holes = self.holes or gap > 0
            slot.fed += len(slot.pending)
            slot.pending = []
        self.mask = torch.cat([self.mask, torch.tensor(real, device=self.device)], dim=1)
        return self.head.features(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=self.mask.long() if self.holes else None,
            position_ids=torch.tensor(positions, device=self.device),
            past_key_values=self.cache,
            use_cache=True,
        )

    def _admit(self) -> None:
        """Give sequences that joined since the last forward empty, masked cache rows."""
        rows, columns = self.mask.shape
        new = len(self.slots) - rows
        if not new:
            return
        self.mask = torch.cat([self.mask, self.mask.new_zeros(new, columns)])
        self.holes = self.holes or columns > 0
        for layer in self.cache.layers if columns else ():
            layer.keys = torch.cat([layer.keys, layer.keys.new_zeros(new, *layer.keys.shape[1:])])
            layer.values = torch.cat([layer.values, layer.values.new_zeros(new, *layer.values.shape[1:])])
