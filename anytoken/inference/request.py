"""A reply before and during generation: the request, and its walk through the grammar.

One `GenerationRequest` goes from the API or a server through the engine to the scheduler. A `GrammarWalk` is the reply
so far, for our own engine and for an external one (`serving/remote.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from anytoken.grammar import CONTENT, Grammar, State
from anytoken.grammar_tables import Ranges
from anytoken.inference.chains import Cascade
from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.sampling import Sampling
from anytoken.utils.errors import RequestError

DEFAULT = Sampling()


@dataclass(frozen=True)
class Token:
    """One generated id.

    row: its request's number (in `Engine.stream` its place). finish_reason: set on a reply's last token: "stop" when
    the model (or `output_kinds`) ended it, "length" when the token limit left no choice. logprob: of the id among those
    allowed, before temperature, filters and guidance; 0 without an alternative. step: whether the segment that it
    begins is a step of a chain (`chains.py`).
    """

    row: int
    id: int
    finish_reason: str | None = None
    logprob: float = 0.0
    step: bool = False


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """A request for one reply.

    prompt: ids to continue. output_kinds: the kinds of the reply in order; None: the model decides. num_steps: the
    number of kinds, from the first, that are steps of a chain (`chains.py`). cascade: whether what follows a step is
    generated from that step alone. planned_chains: the steps to insert if the model decides and begins with the medium
    of a key; they have to fit the limit. sampling: settings by kind. max_new_tokens: limit of the whole reply; None is
    up to the context. seed, draw: the random numbers of the reply depend on both alone; without a seed they differ
    each time. null_prompt: the unconditional prompt of guidance. sizes: pins the grid of a kind. prefixes: keeps what
    is decoded for prompts that continue it. scored: asks for log-probabilities. Nothing is checked before `start`.
    """

    prompt: Sequence[int]
    output_kinds: Sequence[str] | None = None
    sampling: Mapping[str, Sampling] = field(default_factory=dict)
    max_new_tokens: int | None = None
    seed: int | None = None
    draw: int = 0
    null_prompt: Sequence[int] | None = None
    sizes: Mapping[str, tuple[int, ...]] | None = None
    prefixes: PrefixCache | None = None
    scored: bool = False
    num_steps: int = 0
    cascade: bool = False
    planned_chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def start(self, grammar: Grammar, context: int) -> tuple[State, int]:
        """The initial grammar state of the reply, and its limit in ids within a context of `context` ids.

        RequestError or TokenSpaceError if something does not fit.
        """
        self._check_prompt(grammar.token_space.vocab_size)
        if self.null_prompt is None and any(one.cfg_scale != 1 for one in self.sampling.values()):
            raise RequestError("cfg_scale needs a null prompt; pass null_prompt.")
        state = self.initial_state(grammar, self.output_kinds)
        return state, self._budget(grammar.min_remaining(state), context)

    def initial_state(self, grammar: Grammar, output_kinds: Sequence[str] | None) -> State:
        """The grammar state before a reply of these kinds."""
        return grammar.reply(output_kinds, sizes=dict(self.sizes) if self.sizes else None)

    def random(self) -> np.random.Generator:
        """The random generator of the reply; RequestError for an invalid seed."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise RequestError(f"seed must be an integer of at least 0; received {seed!r}.")
        return np.random.default_rng([int(seed), self.draw])

    def _check_prompt(self, size: int) -> None:
        if not len(self.prompt):
            raise RequestError(
                "The prompt is empty: the model continues a sequence, so give at least one id, such as bos."
            )
        for place, token in enumerate(self.prompt):
            whole = hasattr(token, "__index__") and not isinstance(token, bool)
            if not whole or not 0 <= token < size:
                raise RequestError(
                    f"Ids are whole numbers from 0 to {size - 1}; id {place} of the prompt is {token!r}."
                )

    def _budget(self, least: int, context: int) -> int:
        """The maximum number of ids in the reply; `least` is its shortest legal form."""
        limit, length = self.max_new_tokens, max(len(self.prompt), len(self.null_prompt or ()))
        whole = isinstance(limit, int | np.integer) and not isinstance(limit, bool)
        if limit is not None and not (whole and limit >= 1):
            raise RequestError(f"max_new_tokens must be an integer of at least 1; received {limit!r}.")
        room = context - length
        if room < least:
            raise RequestError(
                f"The prompt has {length} tokens and the shortest reply {least}, but the context is "
                f"{context} tokens: shorten the prompt or ask for less."
            )
        if limit is not None and limit < least:
            raise RequestError(
                f"max_new_tokens is {limit}, but the shortest reply of the requested kinds takes {least} tokens."
            )
        return room if limit is None else min(room, limit)


class GrammarWalk:
    """The reply to a request so far.

    `ids` are those of the reply, and `ranges` those that may follow. `context_ids` are what the model reads, the prompt
    and the reply, or in a cascade the last step and what follows it. `kind` is the kind of the open segment.
    """

    def __init__(self, request: GenerationRequest, grammar: Grammar, context: int, number: int = 0) -> None:
        self.request, self.grammar, self.number = request, grammar, number
        self.state, self.budget = request.start(grammar, context)
        space = grammar.token_space
        self._kinds = {space.open_token(name): name for name in space.modalities}
        self._kinds |= {space.close_token(name): "text" for name in space.modalities}
        self.kind, self.setting = "text", request.sampling.get("text", DEFAULT)
        self.ranges: Ranges = ()
        self.ids: list[int] = []
        self.num_steps, self.cascade = request.num_steps, request.cascade
        self._prompt: Sequence[int] = request.prompt
        self.begin = 0  # the first of `ids` that are read after the prompt
        self.restarted = False  # set when a step of a cascade has become the prompt
        self.cut = self.finished = False

    def append(self, token: int, logprob: float = 0.0) -> Token:
        """Add an id; TokenSpaceError for one that is not allowed.

        A first id that begins a medium with a planned chain stands for the one that begins the chain's first step.
        """
        if not self.ids and self.request.output_kinds is None:
            token = self._begin_chain(token)
        step, self.state = self.state.step, self.grammar.advance(self.state, token)
        self.budget -= 1
        self.ids.append(token)
        if self.cascade and step < min(self.state.step, self.num_steps):
            self._begin_cascade()
        if token in self._kinds:
            self.kind = self._kinds[token]
            self.setting = self.request.sampling.get(self.kind, DEFAULT)
        self.finished = self.grammar.finished(self.state)
        reason = ("length" if self.cut else "stop") if self.finished else None
        return Token(self.number, token, reason, logprob, self.state.step < self.num_steps)

    @property
    def context_ids(self) -> list[int]:
        """The ids that the next one follows."""
        return [*self._prompt, *self.ids[self.begin :]]

    def _begin_cascade(self) -> None:
        """Make the step that has just ended the prompt; a text ends where the next medium opens."""
        space = self.grammar.token_space
        end = len(self.ids) if self.state.phase is CONTENT else len(self.ids) - 1
        step = self.ids[self.begin : end]
        self._prompt = [space.bos, space.user, *step, space.end, space.assistant]
        self.begin, self.restarted = end, True

    def _begin_chain(self, token: int) -> int:
        """The id that opens the first step before the medium of `token`; `token` itself without a step."""
        kind = self._kinds.get(token, "text")
        steps = self.request.planned_chains.get(kind, ())
        if not steps:
            return token
        self.state = self.request.initial_state(self.grammar, (*steps, kind))
        self.num_steps, self.cascade = len(steps), isinstance(steps, Cascade)
        return self.grammar.token_space.open_token(steps[0])

    def settle(self) -> list[Token]:
        """Append ids as long as there is only one choice."""
        tokens: list[Token] = []
        while not self.finished:
            self.ranges = self.grammar.allowed(self.state, self.budget)
            if not _single(self.ranges):
                break
            self.cut = self.cut or not _single(self.grammar.allowed(self.state))
            tokens.append(self.append(self.ranges[0][0]))
        return tokens


def _single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1
