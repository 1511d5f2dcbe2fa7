"""The interface of the engine to the model: ids in, logits of the allowed ids out.

An image's next token needs 4 k rows of the output matrix, not all of the vocabulary. Slices of it are kept for each
set of ranges, as views: no weight is copied. Shapes: S sequences, W tokens of each, N rows, D model dimension, V
vocabulary, K allowed ids.
"""

from __future__ import annotations

import logging
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from anytoken.grammar_tables import Ranges
from anytoken.inference.cuda_graphs import StepGraphs
from anytoken.inference.fast_decode import blocked, flat_decoder, product
from anytoken.inference.kv_cache import KVCache, forward_inputs
from anytoken.model.attention import usable_attention
from anytoken.model.grid_positions import CodeWalk, Place

SLICES = 1024  # sets of ranges whose rows are kept
log = logging.getLogger(__name__)


class ModelRunner:
    """Logits of the allowed ids only.

    Slicing is used if it equals the full computation. For a model that scales or caps its logits, or whose head is
    wrapped by an adapter, all logits are computed and the allowed columns selected. A single token of each sequence
    goes through the flat decoder if it supports the model.
    """

    def __init__(self, lm: PreTrainedModel, compiled: bool = False, cuda_graphs: bool = False) -> None:
        self.lm = lm
        self.layer = lm.get_output_embeddings()
        self.walk = CodeWalk.of(lm)  # before any id; None where places are of no use
        self._slices: dict[Ranges, list[Tensor]] = {}
        with usable_attention(lm, cached=True):
            self.sliced = self._slicing_is_exact()
            self.decoder, reason = flat_decoder(lm) if self.sliced else (None, "its logits are its own")
        if not self.sliced:
            log.info("%s makes its logits in its own way: all of them are computed", type(lm).__name__)
        if reason:
            log.info("%s decodes by its own forward: %s", type(lm).__name__, reason)
        if compiled:
            self._compile(reason)
        if cuda_graphs and self.decoder is not None and lm.device.type == "cuda":
            self.decoder.graphs = StepGraphs(self.decoder)
        elif cuda_graphs:
            log.warning("cuda_graphs has no effect: %s", reason or f"the model is on {lm.device}")

    def _compile(self, reason: str) -> None:
        """Compile the decoding step now, with a log message, since it takes a while."""
        if self.decoder is None:
            log.warning("compile=True has no effect on %s: %s", type(self.lm).__name__, reason)
            return
        print("Compiling the decoding step (a minute or so the first time) ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            self.decoder.compile()
        except RuntimeError as error:  # no C++ compiler is the usual reason
            said = str(error).strip().splitlines()[0]
            log.warning("The decoding step could not be compiled and runs as it is: %s", said)
        else:
            print(f"Compiled in {time.perf_counter() - began:.0f} s.", file=sys.stderr, flush=True)

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

    def features(
        self,
        ids: list[list[int]],
        positions: list[list[int]],
        cache: KVCache,
        start: int,
        code_places: list[list[Place]] | None = None,
    ) -> Tensor:
        """Feed ids at positions [S, W] to the cache's rows from `start` on.

        code_places: [S, W, 4], needed for a model with grid positions, see `model/grid_positions.py`.
        What `__call__` needs of the last position of each: [S, D], or [S, V] when unsliced.
        """
        if self.decoder is not None and cache.keys and len(ids[0]) == 1:
            places = None if code_places is None else [one for (one,) in code_places]
            return self.decoder.step(
                [one for (one,) in ids], [one for (one,) in positions], cache, start, places
            )
        with usable_attention(self.lm, cached=True):
            inputs, ends = forward_inputs(self.lm, ids, positions, cache, start, code_places)
            if self.sliced:
                hidden = self.lm.base_model(**inputs).last_hidden_state
                return hidden[:, -1] if ends is None else hidden[0, ends]
            logits = self.lm(**inputs, logits_to_keep=1 if ends is None else ends).logits
            return logits[:, -1] if ends is None else logits[0]

    def __call__(self, features: Tensor, ranges: Ranges) -> Tensor:
        """Logits [N, K] in float32, on the model's device, of the K ids of `ranges`, from N rows of features."""
        if not self.sliced:
            parts = [features[:, start:stop] for start, stop in ranges]
        elif self.layer.bias is None:
            parts = [product(features, rows) for rows in self._rows(ranges)]
        else:
            weight, bias = self.layer.weight, self.layer.bias
            parts = [F.linear(features, weight[start:stop], bias[start:stop]) for start, stop in ranges]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).float()

    def _rows(self, ranges: Ranges) -> list[Tensor]:
        if ranges not in self._slices:
            if len(self._slices) >= SLICES:
                self._slices.clear()
            weight = self.layer.weight.detach()
            self._slices[ranges] = [blocked(weight[start:stop]) for start, stop in ranges]
        return self._slices[ranges]
