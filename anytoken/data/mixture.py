"""A weighted, deterministic mixture of (source, view) pairs over tokenized sets.

Sample ``i`` depends on nothing but the seed and ``i``, so any worker can draw any sample and resuming needs
only a counter. A source may be joined with another at sampling time (``pair_with``): a random training
picture of a concept with a random training utterance of its name gives speech->image from k x n combinations.
Weights count samples, not tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from anytoken.data.shards import Shards
from anytoken.data.views import (
    Piece,
    TrainingSequence,
    Turn,
    View,
    ViewError,
    build_sequence,
    drop_prompt,
    parse_view,
    view_turns,
)
from anytoken.processor import Processor

MAX_TRIES = 1000  # draws of one sample before giving up on finding one that fits the context


class MixtureError(ValueError):
    """A mixture that cannot be sampled: no records left, a key missing, nothing that fits."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairSpec(_Spec):
    """A second tokenized set that joins each record: one with an equal key ``by``, any if that is null."""

    path: str
    take: dict[str, str] = Field(description="new key -> key of the partner", min_length=1)
    by: str | None = None
    split: str | None = "train"
    where: dict[str, Any] = {}


class SourceSpec(_Spec):
    """One tokenized set, the views drawn from it, and which of its records count."""

    path: str
    views: dict[str, float] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    split: str | None = "train"
    where: dict[str, Any] = {}
    pair_with: PairSpec | None = None


def matches(record: dict[str, Any], split: str | None, where: dict[str, Any]) -> bool:
    """Whether a record is of the split (without one: train) and has the wanted values (a list: any of)."""
    if split is not None and record.get("split", "train") != split:
        return False
    return all(
        record.get(key) in (value if isinstance(value, list) else [value]) for key, value in where.items()
    )


@dataclass(frozen=True)
class _Choice:
    """One view of one source with the records that can fill it."""

    source: "_Source"
    view: View
    rows: np.ndarray


class _Source:
    def __init__(self, spec: SourceSpec, processor: Processor) -> None:
        self.spec = spec
        self.processor = processor
        self.shards = Shards(spec.path, processor.tokenizers)
        self.partners: dict[Any, list[int]] = defaultdict(list)
        if spec.pair_with is not None:
            pair = spec.pair_with
            self.partner_shards = Shards(pair.path, processor.tokenizers)
            for index, record in enumerate(self.partner_shards.records):
                if matches(record, pair.split, pair.where):
                    self.partners[record.get(pair.by) if pair.by else None].append(index)

    def choices(self) -> list[tuple[_Choice, float]]:
        """Every view with the rows that can fill it, and its weight in the whole mixture."""
        found = []
        total = sum(self.spec.views.values())
        for name, weight in self.spec.views.items():
            view = parse_view(name)
            rows = [index for index in range(len(self.shards)) if self._usable(index, view)]
            if not rows:
                raise MixtureError(
                    f"{self.spec.path}: no record fits view {name!r} with split={self.spec.split!r}, "
                    f"where={self.spec.where}; the set's first record has {sorted(self.shards.records[0])}"
                )
            found.append((_Choice(self, view, np.array(rows)), self.spec.weight * weight / total))
        return found

    def _usable(self, index: int, view: View) -> bool:
        record = self.shards.records[index]
        if not matches(record, self.spec.split, self.spec.where):
            return False
        taken: dict[str, str] = {}
        if self.spec.pair_with is not None:
            taken = self.spec.pair_with.take
            if self._partner_key(record) not in self.partners:
                return False
        return all(key in taken or record.get(key) is not None for key in view.keys)

    def _partner_key(self, record: dict[str, Any]) -> Any:
        by = self.spec.pair_with.by if self.spec.pair_with else None
        return record.get(by) if by else None

    def turns(self, index: int, view: View, rng: np.random.Generator) -> list[Turn]:
        record = self.shards.records[index]
        if view.special == "messages":
            return self._conversation(index)
        keys: Sequence[str] = view.keys
        if view.special == "interleaved":
            keys = [key for key in ("text", *self.processor.tokenizers) if record.get(key) is not None]
        item: dict[str, Piece] = {}
        pair = self.spec.pair_with
        if pair is not None:
            partners = self.partners[self._partner_key(record)]
            partner = partners[int(rng.integers(len(partners)))]
            item = {new: self._piece(self.partner_shards, partner, key) for new, key in pair.take.items()}
        item |= {key: self._piece(self.shards, index, key) for key in keys if key not in item}
        return view_turns(view, item, rng)

    def _piece(self, shards: Shards, index: int, key: str) -> Piece:
        if shards.has(index, key):
            return self.processor.codes_to_ids(key, shards.codes(index, key))
        value = shards.records[index].get(key)
        if not isinstance(value, str) or key in self.processor.tokenizers:
            raise ViewError(
                f"{shards.path} record {index}: {key!r} is neither text nor a tokenized medium ({value!r})"
            )
        return value

    def _conversation(self, index: int) -> list[Turn]:
        turns: list[Turn] = []
        for message in self.shards.records[index]["messages"]:
            content = message["content"]
            pieces: list[Piece] = [content] if isinstance(content, str) else []
            for part in content if isinstance(content, list) else []:
                kind = part["type"]
                if kind == "text":
                    pieces.append(part["text"])
                else:
                    pieces.append(
                        self.processor.codes_to_ids(kind, self.shards.codes(index, kind, part["row"]))
                    )
            turns.append((message["role"], pieces))
        return turns


class Mixture:
    """Draws training sequences: ``sample(i)`` is a function of the seed and ``i`` alone."""

    def __init__(
        self,
        sources: Sequence[SourceSpec],
        processor: Processor,
        context: int,
        seed: int = 0,
        prompt_drop: float = 0.1,
        learn_all: bool = False,
    ) -> None:
        """Open the sources; samples longer than ``context`` ids are never drawn.

        prompt_drop: share of samples whose user turns become the null prompt. learn_all: learn prompts too.
        """
        if not sources:
            raise MixtureError("the mixture is empty; name at least one source under data")
        self.context, self.seed, self.prompt_drop, self.learn_all = context, seed, prompt_drop, learn_all
        self.controls = processor.token_space
        self._encode_text = lru_cache(maxsize=100_000)(processor.text_tokenizer.encode)
        weighted = [choice for spec in sources for choice in _Source(spec, processor).choices()]
        self.choices = [choice for choice, _ in weighted]
        self.weights = np.array([weight for _, weight in weighted])
        self.weights /= self.weights.sum()

    def sample(self, index: int) -> TrainingSequence:
        """Draw sample ``index``; MixtureError if no record of the mixture fits the context."""
        rng = np.random.default_rng((self.seed, index))
        for _ in range(MAX_TRIES):
            choice = self.choices[int(rng.choice(len(self.choices), p=self.weights))]
            row = int(choice.rows[int(rng.integers(len(choice.rows)))])
            turns = choice.source.turns(row, choice.view, rng)
            if rng.random() < self.prompt_drop:
                turns = drop_prompt(turns)
            sequence = build_sequence(turns, self.controls, self._encode_text, self.learn_all)
            if len(sequence.ids) <= self.context:
                return sequence
        raise MixtureError(f"nothing in the mixture fits a context of {self.context} ids; raise context")
