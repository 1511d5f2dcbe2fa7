"""Continuous batching: requests join and leave a running batch at any step, each with its own grammar state.

This is the only generation loop. `Engine.stream` submits all its requests and steps until none is left; a server
submits them as they arrive. The ids of a request do not depend on the rest of the batch. (`generate_batch` of
transformers has the paging and scheduling, but cannot carry the grammar: its logits processors see the ids of the
current step only, none of a request's state, custom ones take a fixed number of int32 scalars a request, and all of the
vocabulary is computed for them to mask.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from anytoken.grammar import Grammar
from anytoken.grammar_tables import Ranges
from anytoken.inference.batch import Batch, BatchSequence
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.request import GenerationRequest, GrammarWalk, Token
from anytoken.inference.sampling import Sampling, add_exits, apply_cfg, apply_repetition_penalty, sample
from anytoken.inference.weights import fingerprint
from anytoken.utils.device import sent
from anytoken.utils.errors import RequestError

MAX_ROWS = 64  # replies decoded together; more wait for a free place


class RunningRequest(GrammarWalk):
    """A request in the batch: its sequence, and with guidance the unconditional one."""

    def __init__(self, request: GenerationRequest, grammar: Grammar, context: int, number: int) -> None:
        super().__init__(request, grammar, context, number)
        self.random = request.random()
        self.slot = BatchSequence(request.prompt, request.prefixes)
        self.uncond: BatchSequence | None = None

    def append(self, token: int, logprob: float = 0.0) -> Token:
        """Add an id to the reply and to its sequences."""
        added = super().append(token, logprob)
        for sequence in filter(None, (self.slot, self.uncond)):
            sequence.ids.append(added.id)
        return added

    @property
    def sequences(self) -> list[BatchSequence]:
        """The sequences of the request in the batch."""
        return [self.slot] if self.uncond is None else [self.slot, self.uncond]

    def restart(self) -> None:
        """Begin with new sequences, as in a cascade after each step."""
        self.slot, self.uncond, self.restarted = BatchSequence(self.context_ids), None, False


class Scheduler:
    """A running batch. `head` gives the model as it is now; context: the longest sequence that it can read.

    max_prefill_tokens: as for `Engine.scheduler`.
    """

    def __init__(
        self,
        grammar: Grammar,
        context: int,
        head: Callable[[], ModelRunner],
        max_rows: int | None = None,
        max_prefill_tokens: int | None = None,
    ) -> None:
        self.grammar, self.context, self.max_rows = grammar, context, max_rows or MAX_ROWS
        if max_prefill_tokens is not None and max_prefill_tokens < 1:
            raise RequestError(
                f"max_prefill_tokens is at least 1, or None for whole prompts; received {max_prefill_tokens}."
            )
        self.max_prefill_tokens = max_prefill_tokens
        controls = [one for one in grammar.token_space.ranges if one.kind == "control"]
        self._controls = {id_ for one in controls for id_ in range(one.start, one.stop)}
        self._newest_head, self._head = head, head()
        self._batch = Batch(self._head)
        self._waiting: deque[RunningRequest] = deque()
        self._rows: list[RunningRequest] = []
        self._submitted = 0

    def __len__(self) -> int:
        """The number of waiting and running requests."""
        return len(self._waiting) + len(self._rows)

    def submit(self, request: GenerationRequest) -> int:
        """Add a request; returns the number in its tokens. RequestError or TokenSpaceError if it does not fit."""
        row = RunningRequest(request, self.grammar, self.context, self._submitted)
        if request.prefixes is not None:
            request.prefixes.use(fingerprint(self._head.lm))
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

    def drain(self) -> Generator[Token, None, None]:
        """The tokens of all requests, until none is left; the cache is freed even if the caller stops early."""
        try:
            while len(self):
                yield from self.step()
        finally:
            self.close()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """The next id of every running request, with the forced ids after it.

        Forced ids at the beginning of new requests are returned first, before the model runs. With
        `max_prefill_tokens`, requests whose prompts are still being read return none.
        """
        tokens: list[Token] = []
        if self._waiting and not self._rows:
            self._refresh()
        while self._waiting and len(self._rows) < self.max_rows:
            row = self._waiting.popleft()
            self._rows.append(row)
            tokens += row.settle()
            if not row.finished:
                self._batch.slots.append(row.slot)
        if not tokens and self._rows:
            for row in self._rows:
                if row.uncond is None and row.setting.cfg_scale != 1:
                    row.uncond = self._batch.add([*(row.request.null_prompt or ()), *row.ids[row.begin :]])
            features = self._batch.forward(self.max_prefill_tokens)
            read = set(self._batch.decoded)
            ready = [row for row in self._rows if {row.slot, row.uncond or row.slot} <= read]
            for row, (token, logprob) in zip(ready, self._choose(ready, features), strict=True):
                tokens.append(row.append(token, logprob))
                tokens += row.settle()
                if row.restarted and not row.finished:
                    self._batch.drop(row.sequences)
                    row.restart()
                    self._batch.slots.append(row.slot)
        self._leave([row for row in self._rows if row.finished])
        return tokens

    def _refresh(self) -> None:
        """Between requests the weights may have changed: use the current model."""
        head = self._newest_head()
        if head is not self._head:
            self._head, self._batch = head, Batch(head)

    def _leave(self, rows: list[RunningRequest]) -> None:
        if rows:
            self._rows = [row for row in self._rows if row not in rows]
            self._batch.drop([slot for row in rows for slot in row.sequences if slot in self._batch.slots])

    def _choose(self, chosen: list[RunningRequest], features: Tensor | None) -> list[tuple[int, float]]:
        """The next ids of some rows; those with the same choices and settings are sampled together.

        All of it stays on the model's device until the ids are known, with one synchronization.
        """
        if not chosen or features is None:
            return []
        place = {slot: index for index, slot in enumerate(self._batch.decoded)}
        groups: dict[tuple[Ranges, Ranges, Sampling], list[int]] = {}
        for index, row in enumerate(chosen):
            exits = self.grammar.exits(row.state)
            groups.setdefault((row.ranges, exits, row.setting), []).append(index)
        drawn: list[
            tuple[list[int], Tensor, Tensor, Tensor | None]
        ] = []  # rows, ids, columns, log-probabilities
        for (ranges, exits, setting), members in groups.items():
            rows = [chosen[i] for i in members]
            slots = [row.slot for row in rows]
            if setting.cfg_scale != 1:
                slots += [row.uncond for row in rows if row.uncond is not None]
            inputs = _rows_of(features, [place[slot] for slot in slots])
            logits, table = self._head(inputs, ranges), self.grammar.index(ranges)
            if exits:
                logits = add_exits(logits, self._head(inputs, exits))
            plain, without = logits[: len(rows)], logits[len(rows) :]
            logits = plain if setting.cfg_scale == 1 else apply_cfg(plain, without, setting.cfg_scale)
            if setting.repetition_penalty != 1:
                seen = [_columns(table, set(row.ids) - self._controls).to(logits.device) for row in rows]
                logits = apply_repetition_penalty(logits, seen, setting.repetition_penalty)
            uniforms = sent([row.random.random() for row in rows], logits.device, torch.float64)
            columns = sample(logits, setting, uniforms)
            logprobs = _logprobs(plain, columns) if any(row.request.scored for row in rows) else None
            drawn.append((members, table, columns, logprobs))
        return self._read(drawn)

    def _read(self, drawn: list[tuple[list[int], Tensor, Tensor, Tensor | None]]) -> list[tuple[int, float]]:
        """The ids [rows] that were drawn, and their log-probabilities: synchronizes with the device."""
        columns = torch.cat([one for _, _, one, _ in drawn]).cpu()
        sizes = [len(members) for members, *_ in drawn]
        chosen = [(0, 0.0)] * sum(sizes)
        for (members, table, _, logprobs), own in zip(drawn, columns.split(sizes), strict=True):
            scores = [0.0] * len(members) if logprobs is None else logprobs.tolist()
            for i, token, logprob in zip(members, table[own].tolist(), scores, strict=True):
                chosen[i] = (token, logprob)
        return chosen


def _columns(table: Tensor, ids: set[int]) -> Tensor:
    """Positions in the ascending `table` of those `ids` that it contains."""
    wanted = torch.tensor(sorted(ids), dtype=torch.long)
    columns = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
    return columns[table[columns] == wanted]


def _rows_of(features: Tensor, rows: list[int]) -> Tensor:
    """Some rows of features [S, D]; a view if they are contiguous."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return features[rows[0] : rows[0] + len(rows)]
    return features[sent(rows, features.device, torch.long)]


def _logprobs(logits: Tensor, columns: Tensor) -> Tensor:
    """Log-probability of the chosen column in each row of logits [N, K], [N]."""
    return logits.log_softmax(-1).gather(-1, columns[:, None])[:, 0]
