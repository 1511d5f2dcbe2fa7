"""Mixture: weights, filters, joins and determinism, on a set with a toy modality."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from anytoken.data.mixture import Mixture, MixtureError, SourceSpec
from anytoken.data.shards import tokenize_records
from anytoken.segments import Segment
from anytoken.tokenizers.base import Codes, ModalityTokenizer, Run

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
        super().__init__(shape=Run(1, 50), codebook_sizes=[50], config={})

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
        "words": [{"word": word, "name": word[0]} for word in ("ax", "ay", "cz")],
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
    options = {"context": 100, "prompt_drop": 0.0, **options}
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


def test_join_takes_any_partner_with_the_same_key(shards: Path) -> None:
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
        count for ids, count in drawn(mixture(spec, prompt_drop=0.25), 2000).items() if ids[2] == NULL
    )
    assert dropped / 2000 == pytest.approx(0.25, abs=0.04)


def test_long_sequences_are_left_out_and_nothing_left_is_an_error(shards: Path) -> None:
    spec = {"path": str(shards / "beeps"), "views": {"beep->text": 1}}
    assert max(len(ids) for ids in drawn(mixture(spec, context=10))) == 10  # beeps of three codes need eleven
    with pytest.raises(MixtureError, match="context of 5"):
        mixture(spec, context=5).sample(0)


def test_a_view_that_no_record_fits_is_named(shards: Path) -> None:
    with pytest.raises(MixtureError, match="smell->text"):
        mixture({"path": str(shards / "beeps"), "views": {"smell->text": 1}})
    with pytest.raises(MixtureError, match="empty"):
        mixture()
