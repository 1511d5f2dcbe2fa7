"""The grammar for `generate` of transformers: the same legal replies from any of its decoding methods.

    lm.generate(ids, logits_processor=[GrammarLogitsProcessor(grammar, prompt_length, plan=["image"])],
                max_new_tokens=200, pad_token_id=space.pad, eos_token_id=space.end)

The engine in this room is faster, since it computes only the allowed logits; this is for beam search,
assisted decoding, and everything else that transformers brings.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from anytoken.grammar import Grammar, State


class GrammarLogitsProcessor(LogitsProcessor):
    """Sets the logits of ids that the grammar does not allow to minus infinity.

    `prompt_length` is the number of columns of `input_ids` that are prompt (with its padding). `plan` and
    `sizes` are those of `Grammar.reply`. Give `max_new_tokens` the value `generate` gets, so that every reply
    is complete within it; GrammarError (a ValueError) if the shortest reply is longer. States are kept by
    prefix, not by row, so beams may be reordered. Use a new object for each call of `generate`.
    """

    def __init__(
        self,
        grammar: Grammar,
        prompt_length: int,
        plan: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.grammar = grammar
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        start = grammar.reply(plan, sizes=dict(sizes) if sizes else None)
        grammar.allowed(start, max_new_tokens)
        self._states: dict[tuple[int, ...], State] = {(): start}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masked = torch.full_like(scores, -torch.inf)
        states: dict[tuple[int, ...], State] = {}
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            prefix = tuple(ids)
            state = states[prefix] = self._state(prefix)
            if self.grammar.finished(state):
                masked[row] = scores[row]  # generate pads a finished row by itself
                continue
            budget = None if self.max_new_tokens is None else self.max_new_tokens - len(prefix)
            for start, stop in self.grammar.allowed(state, budget):
                masked[row, start:stop] = scores[row, start:stop]
        self._states = states
        return masked

    def _state(self, prefix: tuple[int, ...]) -> State:
        if prefix in self._states:
            return self._states[prefix]
        before = self._states[prefix[:-1]]
        return before if self.grammar.finished(before) else self.grammar.advance(before, prefix[-1])
