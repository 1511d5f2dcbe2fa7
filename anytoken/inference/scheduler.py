"""Continuous batching: requests join and leave a running batch at any step, and each walks its own grammar state.

The one generation loop. `Engine.stream` submits all its prompts and steps until none is left; a server submits as
requests come in. A request gets the same ids whatever runs beside it. (`generate_batch` of transformers has the
paging and scheduling, but cannot carry the grammar: its logits processors see the ids of the current step only, none
of a request's state, custom ones take a fixed number of int32 scalars a request, and all of the vocabulary is
computed for them to mask.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from anytoken.grammar import Grammar, State
from anytoken.grammar_tables import Ranges
from anytoken.inference.batch import Batch, Slot
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.sampling import Sampling, apply_cfg, apply_repetition_penalty, sample
from anytoken.utils.device import sent

MAX_ROWS = 64  # replies decoded together; more wait for a free place


@dataclass(frozen=True)
class Token:
    """One id as it is decided.

    row: its request's number (in `Engine.stream` the prompt's). finish_reason: set on a reply's last token. logprob: of
    the id among those allowed, before temperature, filters and guidance; 0 where there was no choice.
    """

    row: int
    id: int
    finish_reason: str | None = None
    logprob: float = 0.0


@dataclass(eq=False)
class Request:
    """A reply in the making. `ranges` are the ids it may go on with."""

    number: int
    state: State
    budget: int
    random: np.random.Generator
    slot: Slot
    sampling: Mapping[str, Sampling]
    null_prompt: list[int]
    scored: bool = False
    setting: Sampling = field(default_factory=Sampling)
    ranges: Ranges = ()
    uncond: Slot | None = None
    ids: list[int] = field(default_factory=list)
    cut: bool = False
    finished: bool = False

    def enter(self, kind: str) -> None:
        """Take the settings of a kind."""
        self.setting = self.sampling.get(kind) or Sampling()


class Decoder(Protocol):
    """What a scheduler is given: an `Engine`."""

    @property
    def grammar(self) -> Grammar:
        """What the ids of a reply may be."""

    def head(self) -> ModelRunner:
        """The model as it is now."""

    def request(self, number: int, prompt: Sequence[int]) -> Request:
        """A checked request, with the options of `Engine.request`."""


class Scheduler:
    """A running batch of one engine's model."""

    def __init__(self, engine: Decoder, max_rows: int | None = None) -> None:
        self.max_rows = max_rows or MAX_ROWS
        self.grammar = engine.grammar
        self._engine = engine
        space = engine.grammar.token_space
        self._opens = {space.open_token(name): name for name in space.modalities}
        self._closes = {space.close_token(name) for name in space.modalities}
        self._controls = {
            id_ for one in space.ranges if one.kind == "control" for id_ in range(one.start, one.stop)
        }
        self._head = engine.head()
        self._batch = Batch(self._head)
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []
        self._submitted = 0

    def __len__(self) -> int:
        """How many requests wait or run."""
        return len(self._waiting) + len(self._rows)

    def submit(self, prompt: Sequence[int], **options: object) -> int:
        """Take a request; the number that its tokens carry. Options as for `Engine.request`, errors too."""
        row = self._engine.request(self._submitted, prompt, **options)
        self._submitted += 1
        self._waiting.append(row)
        return row.number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Drop a request and its cache rows at once; nothing happens if it has ended."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        self._leave([row for row in self._rows if row.number == number])

    def close(self) -> None:
        """Drop all requests and the cache."""
        self._waiting.clear()
        self._rows.clear()
        self._batch.free()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """The next id of every running request, with those that follow without a choice.

        What newcomers begin with if there is no choice comes alone, before the model has read anything.
        """
        tokens: list[Token] = []
        if self._waiting and not self._rows:
            self._refresh()
        while self._waiting and len(self._rows) < self.max_rows:
            row = self._waiting.popleft()
            row.enter("text")
            self._rows.append(row)
            tokens += self._settle(row)
            if not row.finished:
                self._batch.slots.append(row.slot)
        if not tokens and self._rows:
            for row in self._rows:
                if row.uncond is None and row.setting.cfg_scale != 1:
                    row.uncond = self._batch.add(row.null_prompt + row.ids)
            for row, (token, logprob) in zip(self._rows, self._choose(self._batch.forward()), strict=True):
                tokens.append(self._append(row, token, logprob))
                tokens += self._settle(row)
        self._leave([row for row in self._rows if row.finished])
        return tokens

    def _refresh(self) -> None:
        """Between requests the weights may have become others: take what the engine decodes with now."""
        head = self._engine.head()
        if head is not self._head:
            self._head, self._batch = head, Batch(head)

    def _leave(self, rows: list[Request]) -> None:
        if rows:
            self._rows = [row for row in self._rows if row not in rows]
            slots = [slot for row in rows for slot in (row.slot, row.uncond) if slot in self._batch.slots]
            self._batch.drop([slot for slot in slots if slot is not None])

    def _choose(self, features: Tensor) -> list[tuple[int, float]]:
        """The next id of every row; rows with the same choices and settings are drawn together.

        All of it stays on the model's device until the ids are known, for which the host waits once.
        """
        place = {slot: index for index, slot in enumerate(self._batch.slots)}
        groups: dict[tuple[Ranges, Sampling], list[int]] = {}
        for index, row in enumerate(self._rows):
            groups.setdefault((row.ranges, row.setting), []).append(index)
        drawn: list[
            tuple[list[int], Tensor, Tensor, Tensor | None]
        ] = []  # rows, ids, columns, log-probabilities
        for (ranges, setting), members in groups.items():
            rows = [self._rows[i] for i in members]
            slots = [row.slot for row in rows]
            if setting.cfg_scale != 1:
                slots += [row.uncond for row in rows if row.uncond is not None]
            logits = self._head(_rows_of(features, [place[slot] for slot in slots]), ranges)
            plain, without = logits[: len(rows)], logits[len(rows) :]
            logits = plain if setting.cfg_scale == 1 else apply_cfg(plain, without, setting.cfg_scale)
            table = self.grammar.index(ranges)
            if setting.repetition_penalty != 1:
                seen = [_columns(table, set(row.ids) - self._controls).to(logits.device) for row in rows]
                logits = apply_repetition_penalty(logits, seen, setting.repetition_penalty)
            uniforms = sent([row.random.random() for row in rows], logits.device, torch.float64)
            columns = sample(logits, setting, uniforms)
            logprobs = _logprobs(plain, columns) if any(row.scored for row in rows) else None
            drawn.append((members, table, columns, logprobs))
        return self._read(drawn)

    def _read(self, drawn: list[tuple[list[int], Tensor, Tensor, Tensor | None]]) -> list[tuple[int, float]]:
        """The ids [rows] that were drawn, and their log-probabilities: here the host waits for the device."""
        columns = torch.cat([one for _, _, one, _ in drawn]).cpu()
        chosen = [(0, 0.0)] * len(self._rows)
        sizes = [len(members) for members, *_ in drawn]
        for (members, table, _, logprobs), own in zip(drawn, columns.split(sizes), strict=True):
            scores = [0.0] * len(members) if logprobs is None else logprobs.tolist()
            for i, token, logprob in zip(members, table[own].tolist(), scores, strict=True):
                chosen[i] = (token, logprob)
        return chosen

    def _append(self, row: Request, token: int, logprob: float = 0.0) -> Token:
        """Add one id to a row and to what its sequences have to feed."""
        row.state = self.grammar.advance(row.state, token)
        row.budget -= 1
        row.ids.append(token)
        row.slot.ids.append(token)
        if row.uncond is not None:
            row.uncond.ids.append(token)
        if token in self._opens:
            row.enter(self._opens[token])
        elif token in self._closes:
            row.enter("text")
        row.finished = self.grammar.finished(row.state)
        reason = ("length" if row.cut else "stop") if row.finished else None
        return Token(row.number, token, reason, logprob)

    def _settle(self, row: Request) -> list[Token]:
        """Append ids for as long as there is only one choice."""
        tokens: list[Token] = []
        while not row.finished:
            row.ranges = self.grammar.allowed(row.state, row.budget)
            if not _single(row.ranges):
                break
            row.cut = row.cut or not _single(self.grammar.allowed(row.state))
            tokens.append(self._append(row, row.ranges[0][0]))
        return tokens


def _single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1


def _columns(table: Tensor, ids: set[int]) -> Tensor:
    """Where those of `ids` that are in the ascending `table` stand in it."""
    wanted = torch.tensor(sorted(ids), dtype=torch.long)
    columns = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
    return columns[table[columns] == wanted]


def _rows_of(features: Tensor, rows: list[int]) -> Tensor:
    """Some rows of features [S, D]; a view where they lie in a line."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return features[rows[0] : rows[0] + len(rows)]
    return features[sent(rows, features.device, torch.long)]


def _logprobs(logits: Tensor, columns: Tensor) -> Tensor:
    """Log-probability of the chosen column in each row of logits [N, K], [N]."""
    return logits.log_softmax(-1).gather(-1, columns[:, None])[:, 0]
