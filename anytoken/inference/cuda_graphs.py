"""Decoding steps as CUDA graphs: one per number of rows, recorded once and replayed with new ids.

A step of a small model is hundreds of kernels of a few microseconds each, so launching them one by one dominates. A
CUDA graph launches all of them at once. It needs tensors with fixed addresses: a step here reads ids and positions from
one buffer, writes into the key-value cache as it lies, and reads all columns of its storage through the mask. When the
storage grows, which doubles it, graphs are recorded again. The number of rows is rounded up to a power of two; the rows
beyond write to rows of the cache that no sequence has yet, or after the end of one that is still reading its prompt,
which overwrites it.

Off by default: `Engine(lm, grammar, cuda_graphs=True)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anytoken.inference.kv_cache import KVCache
from anytoken.model.grid_positions import NOWHERE, Place
from anytoken.utils.device import sent

if TYPE_CHECKING:
    from anytoken.inference.fast_decode import FlatDecoder

Recorded = tuple[Callable[[], object], Tensor]  # runs the work again; where its result is then
WARMUPS = 3  # runs before a graph is recorded, in which kernels choose their algorithms
log = logging.getLogger(__name__)


def record(work: Callable[[], Tensor]) -> Recorded:
    """Record the kernels of a piece of work on the current CUDA device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


class StepGraphs:
    """The recorded steps of one decoder over one cache; several caches of a decoder may alternate."""

    def __init__(
        self, decoder: FlatDecoder, record: Callable[[Callable[[], Tensor]], Recorded] = record
    ) -> None:
        self.decoder = decoder
        self._record = record
        self._graphs: dict[int, tuple[Tensor, Recorded]] = {}
        self._storage: tuple[int, ...] = ()
        self.broken = False  # what could not be recorded once is not tried again

    def step(
        self, ids: list[int], positions: list[int], cache: KVCache, code_places: Sequence[Place] | None = None
    ) -> Tensor | None:
        """Feed one id to each of the first rows; hidden states [S, H], valid until the next step.

        None if the step cannot be recorded.
        """
        rows = 1 << (len(ids) - 1).bit_length()
        if self.broken or rows > cache.seen.shape[0]:
            return None
        self.decoder.reach(cache.seen.shape[-1])
        tensors = (*cache.keys, *cache.values, cache.seen, self.decoder.cos)
        storage = tuple(one.data_ptr() for one in tensors)
        if storage != self._storage:
            self._graphs.clear()
            self._storage = storage
        fill = rows - len(ids)
        ends = (cache.beyond + [0] * fill)[:fill]
        places = code_places or [NOWHERE] * len(ids)
        columns = [(token, where, *place) for token, where, place in zip(ids, positions, places, strict=True)]
        columns += [(0, end, *NOWHERE) for end in ends]
        given = sent(columns, self.decoder.embedding.device, torch.long).T.contiguous()
        if rows not in self._graphs:
            try:
                self._graphs[rows] = given, self._record(lambda: self._work(given, cache))
            except RuntimeError as error:
                log.warning("The decoding step could not be recorded and runs as it is: %s", error)
                self.broken = True
                return None
        buffer, (replay, result) = self._graphs[rows]
        buffer.copy_(given)
        replay()
        return result[: len(ids)]

    def _work(self, given: Tensor, cache: KVCache) -> Tensor:
        decoder, (ids, positions, *places) = self.decoder, given
        rows = torch.arange(len(ids), device=given.device)
        cache.seen[rows, 0, 0, positions] = 0
        open_ = None if decoder.open is None else decoder.open[ids]
        layers = zip(cache.keys, cache.values, strict=True)
        read = [(keys[: len(ids)], values[: len(ids)]) for keys, values in layers]
        cos, sin = decoder.cos[positions], decoder.sin[positions]
        mask = cache.seen[: len(ids)]
        grid = decoder.grid_positions
        placed = None if grid is None else grid(torch.stack(places, -1))
        return decoder.forward(
            ids, positions, rows, cos, sin, open_, placed, cache.keys, cache.values, read, mask
        )
