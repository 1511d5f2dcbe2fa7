"""The generation loop: ids and the grammar, nothing of media.

Every row of a batch walks its own grammar state with its own plan, budget and random numbers. The grammar
says which ids may come next; only their logits are computed (`batch.Head`); an id that is the only choice is
appended without asking the model and fed together with the next one. A reply is therefore well-formed by
construction, for any weights, any sampling and any budget. Classifier-free guidance gives a row a second
sequence, the reply so far after an empty prompt, with its own cache rows in the same forward; it joins when
the first guided kind begins.
"""

import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anytoken.grammar import Grammar, State
from anytoken.inference.batch import Batch, Head, Ranges, Slot
from anytoken.inference.sampling import Sampling, draw, guide, penalise

Plan = Sequence[str] | None
MAX_ROWS = 64  # rows decoded together; more wait for the next group


class EngineError(ValueError):
    """A prompt or a plan that does not fit, a bad seed, or guidance without a null prompt."""


@dataclass(frozen=True)
class GeneratedIds:
    """One finished reply: its ids up to and with the end token, and why it ended.

    finish_reason is "stop" when the model (or the plan) ended it, "length" when the token limit left no
    choice.
    """

    ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Token:
    """One id as it is decided: `row` counts prompts; `finish_reason` is set on a row's last token."""

    row: int
    id: int
    finish_reason: str | None = None


@dataclass(eq=False)
class _Row:
    """A reply in the making."""

    index: int
    state: State
    budget: int
    random: np.random.Generator
    slot: Slot
    mate: Slot | None = None
    kind: str = "text"
    ids: list[int] = field(default_factory=list)
    cut: bool = False
    finished: bool = False


class Engine:
    """Batched generation with a causal language model whose vocabulary is the grammar's token space."""

    def __init__(self, lm: PreTrainedModel, grammar: Grammar) -> None:
        self.grammar = grammar
        self.lm = lm
        space = grammar.token_space
        self._opens = {space.open_token(name): name for name in space.modalities}
        self._closes = {space.close_token(name) for name in space.modalities}
        self._controls = {
            id_ for one in space.ranges if one.kind == "control" for id_ in range(one.start, one.stop)
        }
        self._head: Head | None = None

    @property
    def context(self) -> int:
        """The longest sequence the model can read, prompt and reply together."""
        return int(self.lm.config.get_text_config().max_position_embeddings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        plans: Sequence[Plan] | None = None,
        sampling: Mapping[str, Sampling] | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        on_token: Callable[[Token], None] | None = None,
        null_prompt: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> list[GeneratedIds]:
        """One reply for every prompt; arguments as for `stream`. `on_token` is called with each id."""
        replies: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        for token in self.stream(prompts, plans, sampling, max_new_tokens, seed, null_prompt, rows, sizes):
            replies[token.row].append(token.id)
            reasons[token.row] = token.finish_reason or ""
            if on_token is not None:
                on_token(token)
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
    ) -> Generator[Token, None, None]:
        """Yield the ids of all replies as they are decided; a row's ids come in order.

        `plans` gives each prompt the kinds its reply holds (None: the model decides); `sampling` maps kinds
        to settings; `max_new_tokens` None means up to the context. A row draws from (`seed`, its number in
        `rows`), by default its place in `prompts`, and from nothing else. `sizes` pins the grid size of a
        kind. EngineError or GrammarError before the first token if something does not fit.
        """
        settings = dict(sampling or {})
        if null_prompt is None and any(one.cfg_scale != 1 for one in settings.values()):
            raise EngineError("cfg_scale needs the null prompt to guide away from; pass null_prompt.")
        seed = secrets.randbits(63) if seed is None else _checked_seed(seed)
        plans = [None] * len(prompts) if plans is None else plans
        numbers = range(len(prompts)) if rows is None else rows
        reserve = len(null_prompt or ())
        waiting = []
        for index, (prompt, plan, number) in enumerate(zip(prompts, plans, numbers, strict=True)):
            state = self.grammar.reply(plan, sizes=dict(sizes) if sizes else None)
            budget = self._budget(state, max(len(prompt), reserve), max_new_tokens)
            random = np.random.default_rng([seed, number])
            waiting.append(_Row(index, state, budget, random, Slot(list(prompt))))
        return self._run(waiting, settings, list(null_prompt or ()))

    def _budget(self, state: State, prompt_length: int, max_new_tokens: int | None) -> int:
        """How many ids a reply may have; EngineError if its shortest legal form is longer."""
        whole = isinstance(max_new_tokens, int | np.integer) and not isinstance(max_new_tokens, bool)
        if max_new_tokens is not None and not (whole and max_new_tokens >= 1):
            raise EngineError(
                f"max_new_tokens must be a whole number from 1 up; received {max_new_tokens!r}."
            )
        room = self.context - prompt_length
        least = self.grammar.min_remaining(state)
        if room < least:
            raise EngineError(
                f"The prompt has {prompt_length} tokens and the shortest reply {least}, but the context is "
                f"{self.context} tokens: shorten the prompt or ask for less."
            )
        if max_new_tokens is not None and max_new_tokens < least:
            raise EngineError(
                f"max_new_tokens is {max_new_tokens}, but the shortest reply of the requested kinds "
                f"takes {least} tokens."
            )
        return room if max_new_tokens is None else min(room, max_new_tokens)

    @torch.inference_mode()
    def _run(
        self, waiting: list[_Row], sampling: dict[str, Sampling], null_prompt: list[int]
    ) -> Generator[Token, None, None]:
        if (
            self._head is None or self._head.layer is not self.lm.get_output_embeddings()
        ):  # an adapter wraps it
            self._head = Head(self.lm)
        head = self._head
        for start in range(0, len(waiting), MAX_ROWS):
            batch = Batch(head)
            try:
                yield from self._run_batch(waiting[start : start + MAX_ROWS], batch, sampling, null_prompt)
            finally:  # also when the caller stops in the middle
                batch.free()

    def _run_batch(
        self, rows: list[_Row], batch: Batch, sampling: dict[str, Sampling], null_prompt: list[int]
    ) -> Iterator[Token]:
        for row in rows:
            yield from self._settle(row)
        rows = [row for row in rows if not row.finished]
        batch.slots.extend(row.slot for row in rows)
        while rows:
            for row in rows:
                if row.mate is None and _setting(sampling, row).cfg_scale != 1:
                    row.mate = batch.add(null_prompt + row.ids)
            chosen = self._choose(rows, batch, batch.forward(), batch.head, sampling)
            for row, token in zip(rows, chosen, strict=True):
                yield self._append(row, token)
                yield from self._settle(row)
            done = [row for row in rows if row.finished]
            if done:
                rows = [row for row in rows if not row.finished]
                batch.drop([slot for row in done for slot in (row.slot, row.mate) if slot is not None])

    def _choose(
        self, rows: list[_Row], batch: Batch, features: Tensor, head: Head, sampling: dict[str, Sampling]
    ) -> list[int]:
        """The next id of every row; rows with the same choices and settings are drawn together."""
        place = {slot: index for index, slot in enumerate(batch.slots)}
        groups: dict[tuple[Ranges, Sampling], list[int]] = {}
        for index, row in enumerate(rows):
            key = (self.grammar.allowed(row.state, row.budget), _setting(sampling, row))
            groups.setdefault(key, []).append(index)
        chosen = [0] * len(rows)
        for (ranges, setting), members in groups.items():
            logits = head(features[[place[rows[i].slot] for i in members]], ranges)
            if setting.cfg_scale != 1:
                mates = [place[mate] for i in members if (mate := rows[i].mate) is not None]
                logits = guide(logits, head(features[mates], ranges), setting.cfg_scale)
            table = self.grammar.index(ranges)
            if setting.repetition_penalty != 1:
                seen = [_columns(table, set(rows[i].ids) - self._controls) for i in members]
                logits = penalise(logits, seen, setting.repetition_penalty)
            uniforms = torch.tensor([rows[i].random.random() for i in members], dtype=torch.float64)
            for i, token in zip(members, table[draw(logits, setting, uniforms)].tolist(), strict=True):
                chosen[i] = token
        return chosen

    def _append(self, row: _Row, token: int) -> Token:
        """Add one id to a row and to what its sequences have to feed."""
        row.state = self.grammar.advance(row.state, token)
        row.budget -= 1
        row.ids.append(token)
        row.slot.pending.append(token)
        if row.mate is not None:
            row.mate.pending.append(token)
        if token in self._opens:
            row.kind = self._opens[token]
        elif token in self._closes:
            row.kind = "text"
        row.finished = self.grammar.finished(row.state)
        reason = ("length" if row.cut else "stop") if row.finished else None
        return Token(row.index, token, reason)

    def _settle(self, row: _Row) -> Iterator[Token]:
        """Append ids for as long as there is only one choice."""
        while not row.finished:
            ranges = self.grammar.allowed(row.state, row.budget)
            if not _single(ranges):
                return
            row.cut = row.cut or not _single(self.grammar.allowed(row.state))
            yield self._append(row, ranges[0][0])


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise EngineError(f"seed must be a whole number from 0 up; received {seed!r}.")
    return int(seed)


def _setting(sampling: Mapping[str, Sampling], row: _Row) -> Sampling:
    return sampling.get(row.kind) or Sampling()


def _single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1


def _columns(table: Tensor, ids: set[int]) -> Tensor:
    """Where those of `ids` that are in the ascending `table` stand in it."""
    wanted = torch.tensor(sorted(ids), dtype=torch.long)
    columns = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
    return columns[table[columns] == wanted]
