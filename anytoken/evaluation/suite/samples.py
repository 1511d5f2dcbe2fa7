"""Records as questions: select a task's records and build prompts, examples, true answers and labels."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anytoken.data.forms import to_record
from anytoken.data.records import Record, open_media
from anytoken.data.sources import open_source, read_records
from anytoken.evaluation.suite.schema import Classify, Task
from anytoken.evaluation.suite.template import MESSAGES, Field, fields, fill, fill_each, segment_types
from anytoken.segments import Segment, Text
from anytoken.utils.errors import EvaluationError, RecordError
from anytoken.utils.hints import nearest

OTHER = "other"  # the field of a joined record
Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One question.

    id: the record's number in its set. messages: the conversation, with segments; may be empty. truth: the correct
    answers, each a list of segments. labels: the choices of a classification; truth_label: the index of the correct
    one, -1 if it is not among them.
    """

    id: int
    messages: tuple[Message, ...]
    truth: tuple[list[Segment], ...]
    record: Record
    labels: tuple[Any, ...] = ()
    truth_label: int = -1

    @property
    def prompt(self) -> list[Any]:
        """The prompt of the model: bare segments for a single turn."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "user":
            return list(self.messages[0]["content"])
        return list(self.messages)

    @property
    def truth_text(self) -> str:
        """The first true answer as text."""
        return written(self.truth[0])


@dataclass(frozen=True)
class Outcome:
    """The outcome of one question: a reply, a choice with probabilities, a score, or a ranking of items.

    ranks: those of the correct items, from 1, in order.
    """

    sample: Sample
    answer: tuple[Segment, ...] = ()
    choice: int | None = None
    probabilities: tuple[float, ...] = ()
    score: float | None = None
    ranking: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()


def written(segments: Sequence[Segment]) -> str:
    """Segments as readable text: media as <image>, DNA as its bases."""
    words = [
        one.text if isinstance(one, Text) else getattr(one, "bases", f"<{one.kind}>") for one in segments
    ]
    return " ".join(words) if len(words) > 1 else "".join(words)


class TaskSet:
    """The records of a task, read once."""

    def __init__(self, task: Task, sets: Path) -> None:
        """EvaluationError if the set is missing or has no record for the task, RecordError for a bad record."""
        self.task, self.sets = task, sets
        path = self.find(task.data)
        self.root, self.digest = open_source(path).root, open_source(path).digest
        self.everything = list(enumerate(islice(read_records(path), task.first)))
        if not self.everything:
            raise EvaluationError(f"{task.name}: {task.data} holds no records.")
        self.records = [(number, one) for number, one in self.everything if self.wanted(one, task.split)]
        if not self.records:
            splits = sorted({str(one.get("split")) for _, one in self.everything})
            raise EvaluationError(
                f"{task.name}: none of the {len(self.everything)} records of {task.data} has split {task.split!r} and "
                f"{task.where}; their splits: {', '.join(splits) or 'none'}."
            )
        self._check_keys()
        self.partners, self.partner_root = self._partners()

    def _check_keys(self) -> None:
        """Raise EvaluationError for a grouping key that records lack."""
        task = self.task
        named = [("decoding.match", getattr(task.decoding, "match", None)), ("group_by", task.group_by)]
        named += [(f"{one.name}.{key}", getattr(one, key)) for one in task.metrics for key in one.keys]
        for option, key in named:
            lacking = [
                (number, one) for number, one in self.records if key is not None and one.get(key) is None
            ]
            if len(lacking) == len(self.records) or (lacking and option != "group_by"):
                number, one = lacking[0]
                raise EvaluationError(
                    f"{task.name}: {option} is {key!r}, and record {number + 1} of {task.data} has no such key"
                    f"{nearest(key, list(map(str, one)))}; it has: {', '.join(map(str, one))}."
                )

    def find(self, data: str) -> str | Path:
        """The location of a set: a hub name unchanged; a path next to the task file, or in the folder of the sets."""
        if data.startswith("hf:"):
            return data
        places = [self.task.folder / data, self.sets / data]
        found = next((one for one in places if one.exists() or list(one.parent.glob(one.name))), None)
        if found is None:
            raise EvaluationError(
                f"{self.task.name}: there is no {' and no '.join(map(str, dict.fromkeys(places)))}; build the set, or "
                "say with --data where it is."
            )
        return found

    def wanted(self, record: Record, split: str | None) -> bool:
        """Whether a record is in a split and has the values of `where`."""
        if split is not None and record.get("split") != split:
            return False
        return all(
            record.get(key) in (value if isinstance(value, list) else [value])
            for key, value in self.task.where.items()
        )

    def _partners(self) -> tuple[dict[Any, list[Record]], Path]:
        found: dict[Any, list[Record]] = defaultdict(list)
        if self.task.join is None:
            return found, self.root
        path = self.find(self.task.join.data)
        for record in read_records(path):
            if self.task.join.split not in (None, record.get("split")):
                continue
            found[record.get(self.task.join.key)].append(record)
        return found, open_source(path).root

    def samples(self) -> list[Sample]:
        """The questions, in a random order determined by the task's name, split and seed."""
        task = self.task
        rng = np.random.default_rng((task.seed, zlib.crc32(f"{task.name} {task.split or ''}".encode())))
        shots = self._shots()
        found: list[Sample] = []
        for index in rng.permutation(len(self.records)):
            if len(found) == task.count:
                break
            number, record = self.records[index]
            if task.join is not None:
                options = self.partners.get(record.get(task.join.key))
                if not options:
                    continue
                record = {**record, OTHER: options[int(rng.integers(len(options)))]}
            try:
                found.append(self._sample(number, record, shots))
            except RecordError as error:
                raise EvaluationError(f"{task.name}: record {number + 1} of {task.data}: {error}") from error
        if not found:
            raise EvaluationError(f"{task.name}: no record of {task.data} has a partner in {task.join}.")
        return self._labelled(found)

    def _sample(self, number: int, record: Record, shots: Sequence[tuple[int, list[Message]]]) -> Sample:
        truth = tuple(self._answers(record)) if self.task.answer else ()
        others = [turn for place, turns in shots if place != number for turn in turns]
        count = 2 * self.task.shots.count if self.task.shots else 0
        asked = self._asked(record)
        start = next((place for place, one in enumerate(asked) if one["role"] != "system"), 0)
        return Sample(number, (*asked[:start], *others[:count], *asked[start:]), truth, record)

    def _asked(self, record: Record) -> list[Message]:
        """The turns of a prompt; ``{messages}`` is a conversation up to its last answer."""
        turns: list[Message] = []
        for turn in self.task.prompt:
            if turn.content == f"{{{MESSAGES}}}":
                turns += self._conversation(record)[:-1]
            else:
                turns.append({"role": turn.role, "content": fill(turn.content, record, self.opener(record))})
        return turns

    def _answers(self, record: Record) -> list[list[Segment]]:
        if self.task.answer == f"{{{MESSAGES}}}":
            return [self._conversation(record)[-1]["content"]]
        return fill_each(self.task.answer, record, self.opener(record))

    def _conversation(self, record: Record) -> list[Message]:
        """The messages of a record with its media opened, the assistant's last one at the end."""
        messages = to_record(record).get(MESSAGES)
        if not messages:
            raise RecordError("the record is not a conversation, so {messages} has nothing to stand for")
        last = max(place for place, one in enumerate(messages) if one["role"] == "assistant")
        types, turns = segment_types(), []
        for one in messages[: last + 1]:
            content = one["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            opened = [
                Text(part["text"]) if part["type"] == "text"
                else open_media(part[part["type"]], types[part["type"]], self.root, self.sets)
                for part in parts
            ]  # fmt: skip
            turns.append({"role": one["role"], "content": opened})
        return turns

    def opener(self, record: Record) -> Any:
        """Opens the media in the fields of a record."""

        def open_(field: Field, value: Any) -> Segment:
            root = self.partner_root if field.name == OTHER else self.root
            return open_media(value, segment_types()[field.kind], root, self.sets)

        return open_

    def _shots(self) -> list[tuple[int, list[Message]]]:
        """Examples as pairs of turns, one more than shown, so that the sample itself can be excluded."""
        task = self.task
        if task.shots is None:
            return []
        pool = [(number, one) for number, one in self.everything if self.wanted(one, task.shots.split)]
        if len(pool) <= task.shots.count:
            raise EvaluationError(
                f"{task.name}: {task.shots.count} shots need more records of split {task.shots.split!r} than that; "
                f"{task.data} has {len(pool)}."
            )
        order = np.random.default_rng(task.shots.seed).permutation(len(pool))[: task.shots.count + 1]
        found = []
        for number, record in (pool[index] for index in order):
            asked = [one for one in self._asked(record) if one["role"] != "system"]
            if len(asked) != 1:
                raise EvaluationError(
                    f"{task.name}: shots are examples of one question each; this prompt has several turns."
                )
            found.append((number, [*asked, {"role": "assistant", "content": self._answers(record)[0]}]))
        return found

    def _labelled(self, samples: list[Sample]) -> list[Sample]:
        """Samples with the choices of a classification."""
        decoding = self.task.decoding
        if not isinstance(decoding, Classify):
            return samples
        if isinstance(decoding.labels, str):
            return [
                _with_labels(
                    one, [_plain(label) for label in fill_each(decoding.labels, one.record, self.opener({}))]
                )
                for one in samples
            ]
        labels = decoding.labels
        if labels is None:
            labels = sorted(self._all_answers() or {one.truth_text for one in samples})
        if len(labels) < 2:
            raise EvaluationError(
                f"{self.task.name}: to classify takes two labels or more; there is {labels}."
            )
        found = [_with_labels(one, labels) for one in samples]
        wrong = next((one for one in found if one.truth_label < 0), None)
        if wrong is not None:
            raise EvaluationError(
                f"{self.task.name}: the answer {wrong.truth_text!r:.80} of record {wrong.id + 1} is none of the "
                f"labels: {', '.join(labels)}."
            )
        return found

    def _all_answers(self) -> set[str]:
        """The answers of all eligible records, so that they do not depend on `count`."""
        if any(field.name == OTHER for field in fields(self.task.answer)):
            return set()
        return {written(one) for _, record in self.records for one in self._answers(record)[:1]}

    def truths(self, split: str) -> list[str]:
        """The first answers, as text, of the records of another split; for the majority answer."""
        if any(field.kind != "text" or field.name == OTHER for field in fields(self.task.answer)):
            return []
        return [written(self._answers(one)[0]) for _, one in self.everything if self.wanted(one, split)]

    def items(
        self, samples: Sequence[Sample], template: str | None = None
    ) -> tuple[list[Any], list[list[int]]]:
        """The distinct items to retrieve, each as segments, and the correct ones of each sample.

        template: of the items, by default the task's.
        Items come from all eligible records; with joined records, from the samples.
        """
        decoding: Any = self.task.decoding
        template = template or decoding.item or self.task.answer
        pool = [one.record for one in samples] if self.task.join else [record for _, record in self.records]
        numbers: dict[str, int] = {}
        groups: dict[str, set[int]] = defaultdict(set)
        items: list[list[Segment]] = []
        for record in pool:
            key = _key(template, record)
            if key not in numbers:
                numbers[key] = len(items)
                items.append(fill(template, record, self.opener(record)))
            groups[str(record.get(decoding.match))].add(numbers[key])
        right = [
            groups[str(one.record.get(decoding.match))]
            if decoding.match
            else {numbers[_key(template, one.record)]}
            for one in samples
        ]
        return items, [sorted(one) for one in right]


def _key(template: str, record: Record) -> str:
    """The identity of an item: the raw values of its fields."""
    return json.dumps([_raw(field, record) for field in fields(template)] or template)


def _raw(field: Field, record: Mapping[str, Any]) -> Any:
    value = field.value(dict(record))
    return value if isinstance(value, str | int | float | list) else getattr(value, "name", str(value))


def _plain(segments: Sequence[Segment]) -> Any:
    """A label: a string, or a segment of another kind."""
    [one] = segments if len(segments) == 1 else [list(segments)]
    return one.text if isinstance(one, Text) else one


def _with_labels(sample: Sample, labels: Sequence[Any]) -> Sample:
    truth = _plain(sample.truth[0])
    place = next((number for number, label in enumerate(labels) if label == truth), -1)
    return replace(sample, labels=tuple(labels), truth_label=place)
