"""Mixture: weights, filters, joins and determinism, on a set with a toy modality."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from anytoken.data.mixture import (
    Mixture,
    SamplingSpec,
    SourceSpec,
    TextCache,
)
from anytoken.data.packing import PackedStream
from anytoken.data.shards import tokenize_records
from anytoken.segments import Segment
from anytoken.tokenizers.base import Codes, CodeSequence, ModalityTokenizer
from anytoken.utils.errors import DataError

BOS, USER, ASSISTANT, SYSTEM, END, NULL = range(300, 306)


class Beep(Segment):
    kind: ClassVar[str] = "beep"

    def __init__(self, length: int) -> None:
        self.length = length

    @classmethod
    def open(cls, source: Any) -> "Beep":
        return cls(int(Path(source).name))


class BeepTokenizer(ModalityTokenizer):
    """A beep named n is the code n, n times over."""

    kind = "beep"
    segment_type = Beep

    def __init__(self) -> None:
        super().__init__(shape=CodeSequence(1, 50), codebook_sizes=[50], config={})

    def encode(self, segment: Segment) -> Codes:
        assert isinstance(segment, Beep)
        return Codes(np.full((segment.length, 1), segment.length))


def beep_ids(kind: str, codes: Codes) -> list[int]:
    return [1000, *(1001 + codes.values[:, 0]).tolist(), 1999]


PROCESSOR: Any = SimpleNamespace(
    tokenizers={"beep": BeepTokenizer()},
    text_tokenizer=SimpleNamespace(encode=lambda text: [ord(letter) for letter in text]),
    token_space=SimpleNamespace(bos=BOS, user=USER, assistant=ASSISTANT, system=SYSTEM, end=END, null=NULL),
    codes_to_ids=beep_ids,
    first_frames=False,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    sets: dict[str, list[dict[str, Any]]] = {
        "beeps": [
            {"text": name, "beep": str(length), "name": name, "split": split, "loud": length > 2}
            for name, length, split in [
                ("a", 1, "train"),
                ("b", 2, "train"),
                ("a", 3, "train"),
                ("c", 4, "test"),
            ]
        ],
        "words": [{"word": word, "name": word[0]} for word in ("ax", "ay", "cz")] + [{"name": "b"}],
        "talk": [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "beep", "beep": "2"}, {"type": "text", "text": "?"}],
                    },
                    {"role": "assistant", "content": "b"},
                ]
            }
        ],
    }
    for name, records in sets.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenize_records(root / f"{name}.jsonl", PROCESSOR.tokenizers, root / name, progress=False)
    return root


def mixture(*specs: dict[str, Any], **options: Any) -> Mixture:
    options = {"context": 100, "cfg_dropout": 0.0, **options}
    return Mixture([SourceSpec(**spec) for spec in specs], PROCESSOR, **options)


def drawn(found: Mixture, count: int = 300) -> Counter[tuple[int, ...]]:
    return Counter(tuple(found.sample(index).ids.tolist()) for index in range(count))


def answer(text: str) -> tuple[int, ...]:
    return (ASSISTANT, *map(ord, text), END)


def beep(length: int) -> tuple[int, ...]:
    return tuple(beep_ids("beep", Codes(np.full((length, 1), length))))


def test_samples_are_a_function_of_seed_and_index(shards: Path) -> None:
    spec = {"path": str(shards / "beeps"), "views": {"text->beep": 1, "beep->text": 1}}
    first, second, other = mixture(spec), mixture(spec), mixture(spec, seed=1)
    order = [5, 0, 3, 5]
    ids = [[found.sample(index).ids.tolist() for index in order] for found in (first, second)]
    assert ids[0] == ids[1] and ids[0][0] == ids[0][3]
    assert [other.sample(index).ids.tolist() for index in range(20)] != [
        first.sample(index).ids.tolist() for index in range(20)
    ]


def test_split_and_where_choose_records(shards: Path) -> None:
    path, views = str(shards / "beeps"), {"beep->text": 1}
    train = drawn(mixture({"path": path, "views": views}))
    assert set(train) == {(BOS, USER, *beep(n), END, *answer(t)) for n, t in ((1, "a"), (2, "b"), (3, "a"))}
    test = drawn(mixture({"path": path, "views": views, "split": "test"}))
    assert set(test) == {(BOS, USER, *beep(4), END, *answer("c"))}
    loud = drawn(
        mixture({"path": path, "views": views, "split": None, "where": {"loud": True, "name": ["a", "b"]}})
    )
    assert set(loud) == {(BOS, USER, *beep(3), END, *answer("a"))}


def test_weights_count_samples(shards: Path) -> None:
    found = mixture(
        {"path": str(shards / "beeps"), "views": {"text->beep": 3, "beep->text": 1}, "weight": 1},
        {"path": str(shards / "talk"), "views": {"messages": 1}, "weight": 3},
    )
    counts: Counter[str] = Counter()
    for ids, count in drawn(found, 2000).items():
        counts["talk" if ord("?") in ids else "text->beep" if ids[2] < 300 else "beep->text"] += count
    assert counts["talk"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert counts["text->beep"] / counts["beep->text"] == pytest.approx(3, rel=0.35)


def test_join_takes_any_partner_with_the_same_key_that_has_what_is_taken(shards: Path) -> None:
    pair = {"path": str(shards / "words"), "by": "name", "take": {"word": "word"}}
    found = drawn(mixture({"path": str(shards / "beeps"), "views": {"beep->word": 1}, "pair_with": pair}))
    assert set(found) == {(BOS, USER, *beep(n), END, *answer(word)) for n in (1, 3) for word in ("ax", "ay")}


def test_join_without_a_key_takes_any_record(shards: Path) -> None:
    pair = {"path": str(shards / "beeps"), "take": {"text2": "text"}, "split": "test"}
    found = drawn(
        mixture({"path": str(shards / "beeps"), "views": {'text->text2,"!"': 1}, "pair_with": pair})
    )
    assert set(found) == {(BOS, USER, ord(t), END, *answer("c!")) for t in "ab"}


def test_conversation(shards: Path) -> None:
    (ids,) = drawn(mixture({"path": str(shards / "talk"), "views": {"messages": 1}}))
    assert ids == (BOS, USER, *beep(2), ord("?"), END, *answer("b"))


def test_prompts_are_dropped_at_the_asked_rate(shards: Path) -> None:
    spec = {"path": str(shards / "beeps"), "views": {"beep->text": 1}}
    dropped = sum(
        count for ids, count in drawn(mixture(spec, cfg_dropout=0.25), 2000).items() if ids[2] == NULL
    )
    assert dropped / 2000 == pytest.approx(0.25, abs=0.04)


def test_long_sequences_are_left_out_and_nothing_left_is_an_error(shards: Path) -> None:
    spec = {"path": str(shards / "beeps"), "views": {"beep->text": 1}}
    assert max(len(ids) for ids in drawn(mixture(spec, context=10))) == 10  # beeps of three codes need eleven
    with pytest.raises(DataError, match="context of 5"):
        mixture(spec, context=5).sample(0)


def test_a_view_that_no_record_fits_is_named(shards: Path) -> None:
    with pytest.raises(DataError, match="smell->text"):
        mixture({"path": str(shards / "beeps"), "views": {"smell->text": 1}})
    with pytest.raises(DataError, match="empty"):
        mixture()


def test_neighbouring_texts_of_a_message_are_one_text_as_in_a_prompt(tmp_path: Path) -> None:
    seen: list[str] = []

    def spy(text: str) -> list[int]:
        seen.append(text)
        return [1]

    document = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
        {"type": "beep", "beep": "2"},
        {"type": "beep", "beep": "3"},
        {"type": "text", "text": "c"},
    ]
    found = talk(tmp_path, [{"role": "assistant", "content": document}])
    processor = SimpleNamespace(**vars(PROCESSOR) | {"text_tokenizer": SimpleNamespace(encode=spy)})
    sequence = Mixture([found], processor, 100).sample(0)
    assert sequence.ids.tolist() == [BOS, ASSISTANT, 1, *beep(2), *beep(3), 1, END]
    assert set(seen) == {"ab", "c"}


def talk(root: Path, messages: list[dict[str, Any]]) -> SourceSpec:
    """A set of one conversation."""
    (root / "talk.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    path = tokenize_records(root / "talk.jsonl", PROCESSOR.tokenizers, root / "talk", progress=False)
    return SourceSpec(path=str(path), views={"messages": 1})


@pytest.mark.parametrize("learn_all", [False, True])
def test_several_turns_with_several_media_and_what_is_learnt(tmp_path: Path, learn_all: bool) -> None:
    parts = [{"type": "beep", "beep": "1"}, {"type": "beep", "beep": "2"}, {"type": "text", "text": "?"}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": [{"type": "beep", "beep": "3"}]},
    ]
    found = Mixture([talk(tmp_path, messages)], PROCESSOR, 100, cfg_dropout=0, learn_all=learn_all).sample(0)
    turns = [
        [SYSTEM, ord("s"), END],
        [USER, *beep(1), *beep(2), ord("?"), END],
        [*answer("ab")],
        [USER, *map(ord, "more"), END],
        [ASSISTANT, *beep(3), END],
    ]
    assert found.ids.tolist() == [BOS, *(id_ for turn in turns for id_ in turn)]
    answers = [False] + [turn[0] == ASSISTANT and place > 0 for turn in turns for place in range(len(turn))]
    assert found.learn.tolist() == ([False] + [True] * (len(found.ids) - 1) if learn_all else answers)


def kinds_drawn(found: Mixture, indices: range) -> Counter[str]:
    """How many samples are beep->text, text->beep and talk."""
    counts: Counter[str] = Counter()
    for index in indices:
        ids = found.sample(index).ids.tolist()
        counts["talk" if ord("?") in ids else "text->beep" if ids[2] < 300 else "beep->text"] += 1
    return counts


def test_weights_change_over_the_steps_in_a_straight_line(shards: Path) -> None:
    specs = [
        {
            "path": str(shards / "beeps"),
            "views": {"beep->text": {100: 1, 200: 0}, "text->beep": {100: 0, 200: 1}},
        },
        {"path": str(shards / "talk"), "views": {"messages": 1}, "weight": {0: 0, 100: 1}},
    ]
    found = mixture(*specs, tokens_per_step=200)
    # Until step 100 only the first view of the first source; talk comes in by and by.
    length = float(np.mean([len(found.sample(index).ids) for index in range(500)]))
    per_step = 200 / length
    start, middle, late = (round(step * per_step) for step in (0, 50, 150))
    assert kinds_drawn(found, range(start, start + 40))["talk"] <= 4
    around = kinds_drawn(found, range(middle - 300, middle + 300))
    assert around["talk"] / 600 == pytest.approx(1 / 3, abs=0.07) and not around["text->beep"]
    around = kinds_drawn(found, range(late - 300, late + 300))
    assert around["talk"] / 600 == pytest.approx(1 / 2, abs=0.07)
    assert around["text->beep"] / 600 == pytest.approx(1 / 4, abs=0.1)
    end = kinds_drawn(found, range(100_000, 100_200))
    assert not end["beep->text"] and end["text->beep"] == pytest.approx(100, abs=30)


def test_a_schedule_needs_the_ids_of_a_step_and_some_weight(shards: Path) -> None:
    spec = {"path": str(shards / "beeps"), "views": {"beep->text": 1}, "weight": {0: 1, 10: 2}}
    with pytest.raises(DataError, match="tokens_per_step"):
        mixture(spec)
    with pytest.raises(DataError, match="all weights are zero at step 10"):
        mixture(spec | {"weight": {0: 1, 10: 0}}, tokens_per_step=100)
    with pytest.raises(ValueError, match="weight"):
        mixture(spec | {"weight": 0})


@pytest.mark.parametrize(
    ("temperature", "share"), [(None, 1 / 2), (1, 3 / 4), (2, 3**0.5 / (3**0.5 + 1)), (1e6, 1 / 2)]
)
def test_temperature_goes_by_the_sources_sizes(shards: Path, temperature: float | None, share: float) -> None:
    found = mixture(
        {"path": str(shards / "beeps"), "views": {"beep->text": 1}},
        {"path": str(shards / "talk"), "views": {"messages": 1}},
        sampling=SamplingSpec(temperature=temperature),
    )
    assert kinds_drawn(found, range(2000))["beep->text"] / 2000 == pytest.approx(share, abs=0.04)


def test_draws_that_are_no_use_are_told(shards: Path) -> None:
    spec = {"path": str(shards / "beeps"), "views": {"beep->text": 1}}
    found = [mixture(spec, context=10).sample(index) for index in range(200)]
    skipped = Counter(reason for sequence in found for reason in sequence.skipped)
    assert set(skipped) == {f"longer than the context of 10 ids in {shards / 'beeps'}"}
    assert skipped.total() / (200 + skipped.total()) == pytest.approx(1 / 3, abs=0.08)


def test_records_whose_key_is_no_text_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"label": "x", "beep": "1"}, {"label": 3, "beep": "2"}, {"number": 4, "beep": "2"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = str(
        tokenize_records(tmp_path / "set.jsonl", PROCESSOR.tokenizers, tmp_path / "set", progress=False)
    )
    assert set(drawn(mixture({"path": path, "views": {"beep->label": 1}}))) == {
        (BOS, USER, *beep(1), END, *answer("x"))
    }
    assert "1 of 2 records are left out" in caplog.text
    with pytest.raises(DataError, match="number must be text or tokenized media"):
        mixture({"path": path, "views": {"number->beep": 1}})


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_of_a_mixture_are_the_same_for_any_number_of_workers(shards: Path, workers: int) -> None:
    found = mixture(
        {"path": str(shards / "beeps"), "views": {"text->beep": 1, "interleaved": 1}}, cfg_dropout=0.3
    )
    streams = [PackedStream(found.sample, 2, 100, 0, workers=count) for count in (0, workers)]
    for _, alone, together in zip(range(5), *streams, strict=False):
        assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_the_cache_of_texts_is_bounded_by_bytes() -> None:
    asked: list[str] = []

    def encode(text: str) -> list[int]:
        asked.append(text)
        return [ord(letter) for letter in text]

    cache = TextCache(encode, limit=20_000)
    for text in ("a" * 100, "b" * 5000, *(f"{number:0100}" for number in range(500)), "a" * 100):
        assert cache(text) == [ord(letter) for letter in text]
        assert cache(text) == [ord(letter) for letter in text] and cache.bytes <= 20_000
    counts = Counter(asked)
    assert counts["b" * 5000] == 2  # too long to keep
    assert counts["a" * 100] == 2 and counts[f"{7:0100}"] == 1
