"""Prompts to unit vectors, in batches of similar length, and what an index needs to know its model again.

Prompts are read as for `generate`, up to and with the assistant's opening. They are padded on the right without a
mask, so a batch is a bare forward pass and a prompt's vector is the one that it gets alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anytoken.model.attention import usable_attention
from anytoken.model.embedding_head import (
    CONTROL,
    UNKNOWN,
    EmbeddingHead,
    decoder_of,
    pool,
    probe_ids,
    read_states,
    similar_lengths,
)
from anytoken.processor import Processor
from anytoken.segments import Segment
from anytoken.utils.errors import RequestError

ALIKE = 0.999  # cosine of two fingerprints of one model, on any device and in any precision


def prompts_of(prompts: Any) -> list[Any]:
    """A list of prompts: itself, or a list of one for a string, a segment, or messages."""
    if isinstance(prompts, str | Segment) or not isinstance(prompts, list | tuple):
        return [prompts]
    if prompts and all(isinstance(one, Mapping) and "role" in one for one in prompts):
        return [prompts]
    if not prompts:
        raise RequestError("embed takes a segment, or a list of segments and prompts; the list is empty.")
    return list(prompts)


class Embedder:
    """A language model with an embedding head, over the ids of one processor."""

    def __init__(self, lm: Any, head: EmbeddingHead, processor: Processor) -> None:
        self.lm, self.processor = lm, processor
        self.head = head.to(lm.device).eval()
        self.table = head.table(processor.token_space).to(lm.device)
        self.context = int(lm.config.get_text_config().max_position_embeddings)

    @torch.inference_mode()
    def vectors(self, prompts: Sequence[Sequence[int]], width: int | None = None) -> np.ndarray:
        """Unit vectors float32 [N, width] of prompts that are ids; RequestError for one that does not fit."""
        width = self.head.pick_width(width)
        found = np.empty((len(prompts), width), np.float32)
        for rows, ids, lengths in self.batches(prompts):
            modality, states = self.table[ids], read_states(self.lm, ids)
            vectors = self.head(pool(states, modality, lengths, len(self.head.modalities)))
            found[rows] = self.head.prefix(vectors, width).float().cpu().numpy()
        return found

    @torch.inference_mode()
    def token_vectors(self, prompts: Sequence[Sequence[int]], width: int | None = None) -> list[np.ndarray]:
        """For each prompt a unit vector per content token, float32 [T, width]."""
        width = self.head.pick_width(width)
        found: dict[int, np.ndarray] = {}
        for rows, ids, _ in self.batches(prompts):
            modality, states = self.table[ids], read_states(self.lm, ids)
            vectors = self.head.prefix(self.head.token_vectors(states, modality), width)
            for place, row in enumerate(rows):
                found[row] = vectors[place, modality[place] >= 0].float().cpu().numpy()
        return [found[row] for row in range(len(prompts))]

    def probe(self) -> np.ndarray:
        """The vector of ids spread over the whole vocabulary: a fingerprint of weights, head and ids, [W]."""
        return self.vectors([probe_ids(self.table)])[0]

    def check(self, ids: Sequence[int]) -> None:
        """RequestError for a prompt that is longer than the context, or holds what the head has no map for."""
        if len(ids) > self.context:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, but the context is {self.context} tokens: shorten it."
            )
        places = self.table[torch.tensor(ids, device=self.table.device)]
        if bool((places == UNKNOWN).any()):
            token = int(torch.tensor(ids)[(places == UNKNOWN).cpu()][0])
            kind = self.processor.token_space.range_of(token).modality
            raise RequestError(
                f"The embedding head knows {', '.join(self.head.modalities)}, and the prompt holds {kind}: train a "
                "head on pairs with it (stages/embed_all.yaml)."
            )
        if bool((places == CONTROL).all()):
            raise RequestError("The prompt holds nothing to embed.")

    def batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Rows of the prompts with their ids [B, T], padded on the right, and lengths [B]."""
        for prompt in prompts:
            self.check(prompt)
        lengths = [len(ids) for ids in prompts]
        for rows in similar_lengths(lengths):
            taken = [lengths[row] for row in rows]
            ids = torch.full((len(rows), max(taken)), self.processor.token_space.pad)
            for place, row in enumerate(rows):
                ids[place, : lengths[row]] = torch.tensor(prompts[row])
            yield rows, ids.to(self.lm.device), torch.tensor(taken, device=self.lm.device)


@torch.no_grad()
def hidden_states(lm: Any, ids: Sequence[int]) -> Tensor:
    """States of a prompt's ids at every depth, float32 [L + 1, T, H] on the CPU; the first are the embeddings."""
    decoder = decoder_of(lm)
    with usable_attention(decoder):
        found = decoder(
            input_ids=torch.tensor([list(ids)], device=lm.device), use_cache=False, output_hidden_states=True
        )
    return torch.cat(found.hidden_states).float().cpu()
