"""A weighted, deterministic mixture of (source, view) pairs over tokenized sets.

Sample ``i`` depends only on the seed and ``i``, so any worker can draw any sample and resuming needs only a
counter. A source may be joined with another at sampling time (``pair_with``): a random training
image of a concept with a random training utterance of its name gives speech->image from k x n combinations.
Weights count samples, not tokens. They may change over the steps of training, ``{0: 5, 500: 1}``, linearly between
the steps named (a curriculum), and a temperature T multiplies each by its source's size ^ (1/T) (arXiv 1910.10683).
"""

import logging
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from anytoken.data.shards import Shards
from anytoken.data.views import (
    Given,
    Piece,
    TrainingSequence,
    Turn,
    View,
    build_sequence,
    drop_prompt,
    parse_view,
    view_turns,
)
from anytoken.processor import Processor, first_frame_places
from anytoken.tokenizers.base import TokenizerError
from anytoken.utils.errors import DataError

MAX_TRIES = 1000  # draws of one sample before giving up on finding one that fits the context
LENGTHS_ASKED = 32  # samples of each view that tell how long its sequences are
CACHED_BYTES = 64 << 20  # of texts and their ids that each process keeps
PIECES = 1000  # of a weight that changes over the steps
log = logging.getLogger(__name__)


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairSpec(_Spec):
    """A second tokenized set: each record is joined with one that has an equal key ``by``, or any if null.

    Partners without one of the keys to take are left out.
    """

    path: str = Field(description="tokenized set of the partners, below data_root")
    take: dict[str, str] = Field(description="new key -> key of the partner", min_length=1)
    by: str | None = Field(
        default=None, description="key with equal values in both records; null: any partner"
    )
    split: str | None = Field(default="train", description="partners of this split; null: all")
    where: dict[str, Any] = Field(default={}, description="only partners whose keys have these values")


Schedule = Annotated[dict[NonNegativeInt, NonNegativeFloat], Field(min_length=1)]  # step -> weight
Weight = Annotated[float, Field(gt=0)] | Schedule


class SourceSpec(_Spec):
    """A tokenized set, its views, and a selection of its records."""

    path: str = Field(description="tokenized set, or a file or folder of records, below data_root")
    views: dict[str, Weight] = Field(
        min_length=1,
        description="view -> weight, such as {text->image: 3}; auto: everything the records can teach",
    )
    weight: Weight = Field(
        default=1.0, description="share of samples; {step: weight} changes it during training"
    )
    split: str | None = Field(default="train", description="records of this split; null: all")
    where: dict[str, Any] = Field(default={}, description="only records whose keys have these values")
    pair_with: PairSpec | None = Field(default=None, description="a second set joined to each record")


class SamplingSpec(_Spec):
    """How samples are drawn from the sources, and how many unusable ones are tolerated."""

    temperature: float | None = Field(
        default=None, gt=0, description="1: by size; large values: uniform over sources"
    )
    max_bad: float = Field(default=0.01, ge=0, le=1, description="maximum share of unusable samples")
    workers: int = Field(default=0, ge=0, description="processes that draw ahead of the training step")
    verify: bool = Field(default=True, description="compare the checksums of the sets when they are opened")


def matches(record: dict[str, Any], split: str | None, where: dict[str, Any]) -> bool:
    """Whether a record is in the split (train by default) and has the given values (any value of a list)."""
    if split is not None and record.get("split", "train") != split:
        return False
    return all(
        record.get(key) in (value if isinstance(value, list) else [value]) for key, value in where.items()
    )


def weights_over(weight: Weight, steps: np.ndarray) -> np.ndarray:
    """A weight at each step: constant, or interpolated linearly between the steps of a schedule."""
    if isinstance(weight, dict):
        named = sorted(weight)
        return np.interp(steps, named, [weight[step] for step in named])
    return np.full(len(steps), weight)


@dataclass(frozen=True)
class _Choice:
    """One view of one source with the records that can fill it."""

    source: "_Source"
    view: View
    rows: np.ndarray

    def weights_over(self, steps: np.ndarray) -> np.ndarray:
        """The view's share of its source's weight at each step."""
        spec = self.source.spec
        views = {name: weights_over(weight, steps) for name, weight in spec.views.items()}
        whole = np.maximum(np.sum(list(views.values()), axis=0), 1e-12)
        return self.source.scale * weights_over(spec.weight, steps) * views[self.view.name] / whole


class _Source:
    def __init__(self, spec: SourceSpec, processor: Processor, sampling: SamplingSpec) -> None:
        self.spec = spec
        self.processor = processor
        self.shards = self._open(spec.path, sampling)
        self.partners: dict[Any, list[int]] = defaultdict(list)
        if spec.pair_with is not None:
            pair = spec.pair_with
            self.partner_shards = self._open(pair.path, sampling)
            for index, record in enumerate(self.partner_shards.records):
                whole = all(record.get(key) is not None for key in pair.take.values())
                if whole and matches(record, pair.split, pair.where):
                    self.partners[record.get(pair.by) if pair.by else None].append(index)
        self.rows = [index for index, record in enumerate(self.shards.records) if self._counts(record)]
        self.scale = len(self.rows) ** (1 / sampling.temperature) if sampling.temperature else 1.0

    def _open(self, path: str, sampling: SamplingSpec) -> Shards:
        shards = Shards(path, self.processor.tokenizers, sampling.verify)
        if self.processor.first_frames and shards.lack_first_frames:
            raise DataError(
                f"{path} lacks the first frames of its videos, which this model reads; tokenize its records again with "
                "--first-frames"
            )
        return shards

    def _counts(self, record: dict[str, Any]) -> bool:
        paired = self.spec.pair_with is None or self._partner_key(record) in self.partners
        return matches(record, self.spec.split, self.spec.where) and paired

    def choices(self) -> list[_Choice]:
        """Every view with the records that can fill it."""
        found = []
        taken = self.spec.pair_with.take if self.spec.pair_with is not None else {}
        for name in self.spec.views:
            view = parse_view(name)
            keys = [key for key in view.keys if key not in taken]
            records = self.shards.records
            named = [row for row in self.rows if all(records[row].get(key) is not None for key in keys)]
            rows = [row for row in named if all(self._fills(row, key) for key in keys)]
            if not rows:
                raise self._nothing_fits(name, keys, named)
            if len(rows) < len(named):
                log.warning(
                    "%s: %d of %d records are left out of view %s: a key is neither text nor a tokenized medium",
                    self.spec.path, len(named) - len(rows), len(named), name,
                )  # fmt: skip
            found.append(_Choice(self, view, np.array(rows)))
        return found

    def _nothing_fits(self, view: str, keys: list[str], named: list[int]) -> "DataError":
        """Why no record fills a view; ``named`` are the records with all of its keys."""
        wrong = [key for key in keys if not any(self._fills(row, key) for row in named)]
        first = sorted(self.shards.records[0]) if len(self.shards) else "nothing"
        why = (
            f"{', '.join(wrong or keys)} must be text or tokenized media"
            if named
            else "no record has its keys"
        )
        return DataError(
            f"{self.spec.path}: nothing fits view {view!r} with split={self.spec.split!r}, "
            f"where={self.spec.where}: {why}; the set's first record has {first}"
        )

    def _fills(self, row: int, key: str) -> bool:
        value = self.shards.records[row][key]
        text = isinstance(value, str) and key not in self.processor.tokenizers
        return text or key == "messages" or self.shards.has(row, key)

    def _partner_key(self, record: dict[str, Any]) -> Any:
        by = self.spec.pair_with.by if self.spec.pair_with else None
        return record.get(by) if by else None

    def partners_of(self, index: int) -> list[int]:
        """The records of the second set that a record can be joined with; none without a second set."""
        if self.spec.pair_with is None:
            return []
        return self.partners[self._partner_key(self.shards.records[index])]

    def turns(
        self, index: int, view: View, rng: np.random.Generator, partner: int | None = None
    ) -> list[Turn]:
        """A record's turns, joined with the given partner or a random one."""
        record = self.shards.records[index]
        if view.special == "messages":
            return self._conversation(index)
        keys: Sequence[str] = view.keys
        if view.special == "interleaved":
            keys = [key for key in ("text", *self.processor.tokenizers) if record.get(key) is not None]
        places: dict[str, tuple[Shards, int, str]] = {}
        pair = self.spec.pair_with
        if pair is not None:
            partners = self.partners_of(index)
            partner = partners[int(rng.integers(len(partners)))] if partner is None else partner
            places = {new: (self.partner_shards, partner, key) for new, key in pair.take.items()}
        places |= {key: (self.shards, index, key) for key in keys if key not in places}
        item = {name: self._piece(*place) for name, place in places.items()}
        if not self.processor.first_frames:
            return view_turns(view, item, rng)
        kinds = [places[one][2] if isinstance(one, str) else None for one in view.sources]
        videos = [str(view.sources[place]) for place in first_frame_places(kinds)]
        asked = {name: [*self._first_frame(*places[name][:2]), *item[name]] for name in videos}
        return view_turns(view, item, rng, item | asked)

    def _first_frame(self, shards: Shards, index: int, row: int | None = None) -> list[int]:
        return self.processor.codes_to_ids("image", shards.first_frame(index, row))

    def _piece(self, shards: Shards, index: int, key: str) -> Piece:
        if shards.has(index, key):
            return self.processor.codes_to_ids(key, shards.codes(index, key))
        value = shards.records[index].get(key)
        if not isinstance(value, str) or key in self.processor.tokenizers:
            raise DataError(
                f"{shards.path} record {index}: {key!r} is neither text nor a tokenized medium ({value!r})"
            )
        return value

    def _conversation(self, index: int) -> list[Turn]:
        """Merge adjacent texts, so that training sees the same ids as a prompt."""
        turns: list[Turn] = []
        for message in self.shards.records[index]["messages"]:
            content = message["content"]
            parts: list[dict[str, Any]] = content
            if isinstance(content, str):
                parts = [{"type": "text", "text": content}]
            pieces: list[Piece | Given] = []
            reads = self.processor.first_frames and message["role"] == "user"
            videos = first_frame_places([part["type"] for part in parts]) if reads else []
            for place, part in enumerate(parts):
                kind = part["type"]
                if kind != "text":
                    if place in videos:
                        pieces.append(self._first_frame(self.shards, index, part["row"]))
                    pieces.append(
                        self.processor.codes_to_ids(kind, self.shards.codes(index, kind, part["row"]))
                    )
                elif pieces and isinstance(pieces[-1], str):
                    pieces[-1] += part["text"]
                else:
                    pieces.append(part["text"])
            turns.append((message["role"], pieces))
        return turns


class TextCache:
    """Ids of recently used texts, in at most ``limit`` bytes: captions recur, but long documents would fill memory."""

    def __init__(self, encode: Callable[[str], list[int]], limit: int = CACHED_BYTES) -> None:
        self.encode, self.limit, self.bytes = encode, limit, 0
        self._kept: OrderedDict[str, array[int]] = OrderedDict()

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text].tolist()
        ids = self.encode(text)
        kept = array("i", ids)
        size = sys.getsizeof(text) + sys.getsizeof(kept)
        if size <= self.limit // 16:  # one text must not drive out all others
            self._kept[text] = kept
            self.bytes += size
        while self.bytes > self.limit:
            old, dropped = self._kept.popitem(last=False)
            self.bytes -= sys.getsizeof(old) + sys.getsizeof(dropped)
        return ids


class Mixture:
    """Draws training sequences: ``sample(i)`` is a function of the seed and ``i`` alone."""

    def __init__(
        self,
        sources: Sequence[SourceSpec],
        processor: Processor,
        context: int,
        seed: int = 0,
        cfg_dropout: float = 0.1,
        learn_all: bool = False,
        sampling: SamplingSpec | None = None,
        tokens_per_step: int | None = None,
    ) -> None:
        """Open the sources; samples longer than ``context`` ids are never drawn.

        cfg_dropout: share of samples whose user turns become the null prompt. learn_all: learn prompts too.
        tokens_per_step: ids of an optimizer step over all processes; weights that change over steps need it.
        """
        if not sources:
            raise DataError("the mixture is empty; name at least one source under data")
        self.context, self.seed, self.cfg_dropout, self.learn_all = context, seed, cfg_dropout, learn_all
        self.controls, sampling = processor.token_space, sampling or SamplingSpec()
        self._encode_text = TextCache(processor.text_tokenizer.encode)
        self.choices = [choice for spec in sources for choice in _Source(spec, processor, sampling).choices()]
        named = {
            step
            for spec in sources
            for weight in (spec.weight, *spec.views.values())
            for step in _steps(weight)
        }
        # A weight that changes does so in a thousand pieces, each of which knows its first sample.
        steps = np.unique([0.0, *named, *np.linspace(0, max(named), PIECES)]) if named else np.zeros(1)
        weights = np.stack([choice.weights_over(steps) for choice in self.choices], axis=1)
        if not weights.sum(1).all():
            nothing = steps[weights.sum(1) == 0][0]
            raise DataError(f"all weights are zero at step {nothing:g}; leave one above zero at every step")
        weights /= weights.sum(1, keepdims=True)
        self._cumulated = weights.cumsum(1) / weights.cumsum(1)[:, -1:]
        self._firsts = self._first_samples(steps, weights, tokens_per_step)

    def _first_samples(
        self, steps: np.ndarray, weights: np.ndarray, tokens_per_step: int | None
    ) -> np.ndarray:
        """The number of samples drawn before each of the steps, estimated from the mean sequence length of each view.

        A sample's step must depend on its index alone, not on how other samples are packed.
        """
        if len(steps) == 1:
            return np.zeros(1)
        if tokens_per_step is None:
            raise DataError("weights that change over the steps need tokens_per_step, the ids of one step")
        lengths = []
        for number, choice in enumerate(self.choices):
            rng = np.random.default_rng((self.seed, number, LENGTHS_ASKED))
            asked = [len(self._draw(choice, rng).ids) for _ in range(LENGTHS_ASKED)]
            lengths.append(np.mean([length for length in asked if length <= self.context] or [self.context]))
        drawn = tokens_per_step / (weights @ np.array(lengths))
        return np.cumsum([0, *(np.diff(steps) * (drawn[:-1] + drawn[1:]) / 2)])

    def sample(self, index: int) -> TrainingSequence:
        """Draw sample ``index``; DataError if no record of the mixture fits the context.

        Unusable samples (too long, or with codes that the tokenizer's shape does not allow) are redrawn and counted.
        """
        rng = np.random.default_rng((self.seed, index))
        cumulated = self._cumulated[self._firsts.searchsorted(index, side="right") - 1]
        skipped: list[str] = []
        for _ in range(MAX_TRIES):
            choice = self.choices[int(cumulated.searchsorted(rng.random(), side="right"))]
            try:
                sequence = self._draw(choice, rng)
            except TokenizerError:
                skipped.append(f"of illegal codes in {choice.source.spec.path}")
                continue
            if len(sequence.ids) <= self.context:
                return replace(sequence, skipped=tuple(skipped)) if skipped else sequence
            skipped.append(f"longer than the context of {self.context} ids in {choice.source.spec.path}")
        reasons = ", ".join(f"{number} {reason}" for reason, number in Counter(skipped).most_common())
        raise DataError(
            f"nothing could be drawn in {MAX_TRIES} tries ({reasons}); raise context or fix the data"
        )

    def _draw(self, choice: _Choice, rng: np.random.Generator) -> TrainingSequence:
        row = int(choice.rows[int(rng.integers(len(choice.rows)))])
        turns = choice.source.turns(row, choice.view, rng)
        if rng.random() < self.cfg_dropout:
            turns = drop_prompt(turns)
        return build_sequence(turns, self.controls, self._encode_text, self.learn_all)


def _steps(weight: Weight) -> list[int]:
    return list(weight) if isinstance(weight, dict) else []
