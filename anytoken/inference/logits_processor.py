"""The grammar for transformers' `generate`: the same legal replies with its own decoding methods.

    inputs = model.lm_inputs("a fox", output="image")
    ids = model.lm.generate(**inputs, do_sample=True, top_k=50)

The engine is faster, since it computes only the allowed logits, and it has guidance and settings per kind; this is for
beam search and other features of transformers' loop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from anytoken import moved
from anytoken.grammar import Grammar, State
from anytoken.inference.sampling import add_exits
from anytoken.utils.errors import TokenSpaceError


class GrammarLogitsProcessor(LogitsProcessor):
    """Sets the logits of ids that the grammar does not allow to minus infinity.

    `output_kinds` and `sizes` are those of `Grammar.reply`. Give `max_new_tokens` the value `generate` gets, so that
    every reply is complete within it; TokenSpaceError (a ValueError) if the shortest reply is longer. `prompt_length`
    is the number of columns of `input_ids` that are prompt, with its padding on the left; by default those of the first
    call. States are kept by prefix, not by row, so beams may be reordered. Use a new object for each call of
    `generate`: TokenSpaceError says so where rows do not continue as replies, or where other settings leave nothing to
    follow. The former is also what assisted decoding meets, which writes ahead of the grammar.
    """

    @moved.renamed_argument("plan", "output_kinds")
    def __init__(
        self,
        grammar: Grammar,
        prompt_length: int | None = None,
        output_kinds: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.grammar = grammar
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        start = grammar.reply(output_kinds, sizes=dict(sizes) if sizes else None)
        grammar.allowed(start, max_new_tokens)
        self._states: dict[tuple[int, ...], State] = {(): start}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [N, V] after input_ids [N, T], with minus infinity where an id may not follow."""
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
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
            if exits := self.grammar.exits(state):  # the planned open id is the last one that is allowed
                others = scores[row, self.grammar.index(exits).to(scores.device)]
                masked[row, stop - 1] = add_exits(masked[row : row + 1, stop - 1 : stop], others[None])[0, 0]
            if masked[row].max() == -torch.inf:
                raise TokenSpaceError(self._contradiction(state, budget))
        self._states = states
        return masked

    def _contradiction(self, state: State, budget: int | None) -> str:
        space, ((first, stop), *more) = self.grammar.token_space, self.grammar.allowed(state, budget)
        names = space.token_name(first) if stop - first == 1 and not more else "ids"
        return (
            f"Nothing may follow: the grammar allows {names} here, and another setting of generate forbids it. "
            "min_new_tokens, suppress_tokens and bad_words_ids contradict a reply that is complete; leave them out, "
            "or ask for a longer reply by output, sizes or the prompt."
        )

    def _state(self, prefix: tuple[int, ...]) -> State:
        if prefix in self._states:
            return self._states[prefix]
        before = self._states.get(prefix[:-1])
        if before is None:
            raise TokenSpaceError(
                "The rows do not continue the prompt of the first call. A GrammarLogitsProcessor serves "
                "one call of generate, with greedy search, sampling or beams: make a new one for the next call, and "
                "do without assisted decoding (prompt_lookup_num_tokens, assistant_model)."
            )
        return before if self.grammar.finished(before) else self.grammar.advance(before, prefix[-1])


def lm_inputs(
    grammar: Grammar,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    output_kinds: Sequence[str] | None,
    max_new_tokens: int,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Inputs of transformers' `generate` for these prompts: ids padded on the left, mask, grammar and limits."""
    space, width = grammar.token_space, max(map(len, prompts))
    rows = [[space.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "logits_processor": [GrammarLogitsProcessor(grammar, width, output_kinds, max_new_tokens, sizes)],
        "max_new_tokens": max_new_tokens,
        "pad_token_id": space.pad,
        "eos_token_id": space.end,
    }
