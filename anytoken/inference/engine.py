"""The generation engine: ids and the grammar, nothing of media.

Every row of a batch walks its own grammar state with its own plan, budget and random numbers (`scheduler.py`). The
grammar says which ids may come next; only their logits are computed (`model_runner.py`); an id that is the only choice
is appended without asking the model. A reply is therefore well-formed by construction, for any weights, any sampling
and any budget. Classifier-free guidance gives a row a second sequence, the reply so far after an empty prompt, with
its own cache row in the same forward; it joins when the first guided kind begins.

Drafts by prompt lookup (arXiv 2304.04487 and transformers' prompt_lookup_num_tokens) are left out: texts, speech and
DNA repeat nothing of what came before; pictures and videos repeat their plain areas, so that a step would decide
nearly two ids when greedy and one and a half as sampled by default, but on a CPU a step of four ids costs about two
of one id.
"""

import secrets
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers import PreTrainedModel

from anytoken.grammar import Grammar, State
from anytoken.inference.batch import Slot
from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.sampling import Sampling
from anytoken.inference.scheduler import Request, Scheduler, Token
from anytoken.inference.weights import checksum, storage_key
from anytoken.utils.errors import RequestError

Plan = Sequence[str] | None


@dataclass(frozen=True)
class GeneratedIds:
    """One finished reply: its ids up to and with the end token, and why it ended.

    finish_reason is "stop" when the model (or the plan) ended it, "length" when the token limit left no
    choice.
    """

    ids: list[int]
    finish_reason: str


class Engine:
    """Batched generation with a causal language model whose vocabulary is the grammar's token space."""

    def __init__(
        self, lm: PreTrainedModel, grammar: Grammar, compiled: bool = False, cuda_graphs: bool = False
    ) -> None:
        self.grammar = grammar
        self.compiled, self.cuda_graphs = compiled, cuda_graphs
        self.lm = lm
        self._head: ModelRunner | None = None
        self._objects: list[object] = []
        self._facts: list[object] = []

    @property
    def context(self) -> int:
        """The longest sequence the model can read, prompt and reply together."""
        return int(self.lm.config.get_text_config().max_position_embeddings)

    def head(self) -> ModelRunner:
        """The model for decoding, prepared again whenever the views of its weights would be of other ones."""
        objects, facts = storage_key(self.lm)
        if facts != self._facts or any(a is not b for a, b in zip(objects, self._objects, strict=True)):
            self._head = ModelRunner(self.lm, self.compiled, self.cuda_graphs)
            self._objects, self._facts = objects, facts
        assert self._head is not None
        return self._head

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        plans: Sequence[Plan] | None = None,
        sampling: Mapping[str, Sampling] | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        null_prompt: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> list[GeneratedIds]:
        """One reply for every prompt; arguments as for `stream`."""
        replies: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        for token in self.stream(prompts, plans, sampling, max_new_tokens, seed, null_prompt, rows, sizes):
            replies[token.row].append(token.id)
            reasons[token.row] = token.finish_reason or ""
        return [GeneratedIds(ids, reason) for ids, reason in zip(replies, reasons, strict=True)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        plans: Sequence[Plan] | None = None,
        sampling: Mapping[str, Sampling] | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        null_prompt: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
        prefixes: PrefixCache | None = None,
        scored: bool = False,
    ) -> Generator[Token, None, None]:
        """Yield the ids of all replies as they are decided; a row's ids come in order.

        `plans` gives each prompt the kinds its reply holds (None: the model decides); `sampling` maps kinds
        to settings; `max_new_tokens` None means up to the context. A row draws from (`seed`, its number in
        `rows`), by default its place in `prompts`, and from nothing else. `sizes` pins the grid size of a
        kind. `prefixes` keeps what is decoded for prompts that go on from it. `scored` asks for log-probabilities.
        RequestError or TokenSpaceError before the first token if something does not fit.
        """
        seed = secrets.randbits(63) if seed is None else seed
        scheduler = Scheduler(self)
        plans = [None] * len(prompts) if plans is None else plans
        numbers = range(len(prompts)) if rows is None else rows
        for prompt, plan, number in zip(prompts, plans, numbers, strict=True):
            scheduler.submit(
                prompt, plan=plan, sampling=sampling, max_new_tokens=max_new_tokens, seed=seed, draw=number,
                null_prompt=null_prompt, sizes=sizes, prefixes=prefixes, scored=scored,
            )  # fmt: skip
        return _drain(scheduler)

    def request(
        self,
        number: int,
        prompt: Sequence[int],
        plan: Plan = None,
        sampling: Mapping[str, Sampling] | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        draw: int = 0,
        null_prompt: Sequence[int] | None = None,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
        prefixes: PrefixCache | None = None,
        scored: bool = False,
    ) -> Request:
        """A checked request for the scheduler; it draws from (`seed`, `draw`), the rest is as for `stream`."""
        settings = dict(sampling or {})
        self._check_ids(prompt)
        if null_prompt is None and any(one.cfg_scale != 1 for one in settings.values()):
            raise RequestError("cfg_scale needs the null prompt to guide away from; pass null_prompt.")
        state = self.grammar.reply(plan, sizes=dict(sizes) if sizes else None)
        budget = self._budget(state, max(len(prompt), len(null_prompt or ())), max_new_tokens)
        random = np.random.default_rng([_checked_seed(seed), draw])
        if prefixes is not None:
            _, facts = storage_key(self.lm)
            prefixes.use((facts, checksum(chain(self.lm.parameters(), self.lm.buffers()))))
        slot = Slot(prompt, prefixes)
        return Request(number, state, budget, random, slot, settings, list(null_prompt or ()), scored)

    def _check_ids(self, prompt: Sequence[int]) -> None:
        """RequestError for a prompt without ids, or with something that is none of the vocabulary's."""
        size = self.grammar.token_space.vocab_size
        if not len(prompt):
            raise RequestError(
                "The prompt is empty: the model continues a sequence, so give at least one id, such as bos."
            )
        for place, token in enumerate(prompt):
            whole = hasattr(token, "__index__") and not isinstance(token, bool)
            if not whole or not 0 <= token < size:
                raise RequestError(
                    f"Ids are whole numbers from 0 to {size - 1}; id {place} of the prompt is {token!r}."
                )

    def _budget(self, state: State, prompt_length: int, max_new_tokens: int | None) -> int:
        """How many ids a reply may have; RequestError if its shortest legal form is longer."""
        whole = isinstance(max_new_tokens, int | np.integer) and not isinstance(max_new_tokens, bool)
        if max_new_tokens is not None and not (whole and max_new_tokens >= 1):
            raise RequestError(
                f"max_new_tokens must be a whole number from 1 up; received {max_new_tokens!r}."
            )
        room = self.context - prompt_length
        least = self.grammar.min_remaining(state)
        if room < least:
            raise RequestError(
                f"The prompt has {prompt_length} tokens and the shortest reply {least}, but the context is "
                f"{self.context} tokens: shorten the prompt or ask for less."
            )
        if max_new_tokens is not None and max_new_tokens < least:
            raise RequestError(
                f"max_new_tokens is {max_new_tokens}, but the shortest reply of the requested kinds "
                f"takes {least} tokens."
            )
        return room if max_new_tokens is None else min(room, max_new_tokens)


def _drain(scheduler: Scheduler) -> Generator[Token, None, None]:
    try:
        while len(scheduler):
            yield from scheduler.step()
    finally:  # also when the caller stops in the middle
        scheduler.close()


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise RequestError(f"seed must be a whole number from 0 up; received {seed!r}.")
    return int(seed)
