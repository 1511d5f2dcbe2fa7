"""The id space: ranges tile it, appending moves nothing, files come back the same or are refused."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.token_space import (
    TokenSpace,
)
from anytoken.tokenizers.base import CodeGrid, CodeSequence
from anytoken.utils.errors import TokenSpaceError

SHAPES = st.one_of(
    st.builds(
        lambda axes, high, books, count: CodeGrid(
            tuple("abc"[:axes]), (1,) * axes, (high,) * axes, books, num_global_codes=count
        ),
        st.integers(1, 3), st.integers(1, 8), st.integers(1, 3), st.integers(0, 2),
    ),
    st.builds(
        lambda low, more, books, count: CodeSequence(low, low + more, books, num_global_codes=count),
        st.integers(1, 3), st.integers(0, 9), st.integers(1, 3), st.integers(0, 2),
    ),
)  # fmt: skip


@st.composite
def spaces(draw: st.DrawFn) -> TokenSpace:
    space = TokenSpace(draw(st.integers(1, 50)), draw(st.integers(8, 20)))
    for name in draw(
        st.lists(st.sampled_from(["image", "speech", "video", "dna", "x1"]), unique=True, max_size=4)
    ):
        shape = draw(SHAPES)
        sizes = [draw(st.integers(1, 30)) for _ in range(shape.num_codebooks)]
        space.append_modality(name, sizes, shape, draw(st.integers(1, 9)) if shape.num_global_codes else 0)
    return space


def example() -> TokenSpace:
    space = TokenSpace(10, 16)
    space.append_modality("image", [100], CodeGrid(("rows", "cols"), (1, 1), (16, 16)))
    space.append_modality("tone", [7, 5], CodeSequence(2, 5, num_codebooks=2))
    return space


def test_the_layout_of_a_small_space() -> None:
    space = example()
    controls = [space.pad, space.bos, space.user, space.assistant, space.system, space.end, space.null]
    assert controls == list(range(10, 17))
    assert [space.size_token(1), space.size_token(16)] == [17, 32]
    assert [space.open_token("image"), space.close_token("image")] == [33, 34]
    image = space.code_range("image")
    assert (image.start, image.stop, image.codebook, len(image)) == (35, 135, 0, 100)
    assert [space.open_token("tone"), space.code_range("tone", 0).start, space.code_range("tone", 1).start] == [
        135, 137, 144,
    ]  # fmt: skip
    assert space.vocab_size == 149 and space.codebook_sizes("tone") == (7, 5)
    assert space.modalities == ["image", "tone"] and space.modality_names == ["text", "image", "tone"]


def test_global_codes_have_one_range_after_the_codebooks() -> None:
    space = TokenSpace(10, 16)
    space.append_modality("tone", [7, 5], CodeSequence(2, 5, 2, num_global_codes=3), 4)
    span = space.global_range("tone")
    assert (span.start, span.stop, span.modality, span.codebook) == (47, 51, "tone", None)
    assert span.start == space.code_range("tone", 1).stop and space.vocab_size == 51
    assert space.token_name(49) == "tone.global:2" and "tone 7+5 global 4" in repr(space)
    assert space.global_codebook_size("tone") == 4 and example().global_codebook_size("tone") == 0
    entry = space.to_dict()["modalities"][0]
    assert entry["global_codebook_size"] == 4 and entry["shape"]["num_global_codes"] == 3
    for one in example().to_dict()["modalities"]:
        assert set(one) == {"name", "codebook_sizes", "shape"} and "num_global_codes" not in one["shape"]
    with pytest.raises(TokenSpaceError, match="tone has no global codes"):
        example().global_range("tone")
    for shape, size in ((CodeSequence(1, 2), 4), (CodeSequence(1, 2, num_global_codes=1), 0)):
        with pytest.raises(TokenSpaceError, match="both or neither are 0"):
            space.append_modality("hum", [3], shape, size)
        assert space.modalities == ["tone"] and space.vocab_size == 51


def test_the_file_of_an_older_checkpoint_is_written_as_it_was() -> None:
    text = (Path(__file__).parents[1] / "anytoken/pretrained/mini/token_space.json").read_text()
    assert json.dumps(TokenSpace.from_dict(json.loads(text)).to_dict(), indent=2) + "\n" == text


def test_names_of_ids() -> None:
    space = example()
    ids = {
        3: "text:3", space.pad: "<|pad|>", space.bos: "<|bos|>", space.assistant: "<|assistant|>",
        space.size_token(8): "<|size:8|>", space.open_token("image"): "<|image|>",
        space.close_token("image"): "<|/image|>", space.code_range("image").start + 17: "image:17",
        space.code_range("tone", 1).start + 3: "tone[1]:3",
    }  # fmt: skip
    assert {token: space.token_name(token) for token in ids} == ids
    assert space.describe([(0, 11), (15, 16)]) == "text:0 to text:9, <|pad|>, <|end|>"
    assert space.describe([]) == "nothing"


@given(spaces())
@settings(max_examples=50, deadline=None)
def test_ranges_tile_the_space_and_names_are_unique(space: TokenSpace) -> None:
    edges = [(span.start, span.stop) for span in space.ranges]
    assert edges[0][0] == 0 and edges[-1][1] == space.vocab_size
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    names = [space.token_name(token) for token in range(space.vocab_size)]
    assert len(set(names)) == space.vocab_size
    assert len({span.name for span in space.ranges}) == len(space.ranges)


@given(spaces())
@settings(max_examples=50, deadline=None)
def test_modality_of_is_what_the_ranges_say(space: TokenSpace) -> None:
    spans = [space.range_of(token) for token in range(space.vocab_size)]
    expected = [space.modality_names.index(span.modality) if span.kind == "code" else 0 for span in spans]
    ids = torch.arange(space.vocab_size)
    assert space.modality_of(ids).tolist() == expected
    assert space.modality_of(ids.reshape(1, -1)).shape == (1, space.vocab_size)
    buckets = torch.bucketize(ids, torch.tensor(space.bucket_boundaries(), dtype=torch.long), right=True)
    assert torch.tensor(space.bucket_modalities())[buckets].tolist() == expected
    assert len(space.bucket_modalities()) == len(space.bucket_boundaries()) + 1


@given(spaces(), SHAPES)
@settings(max_examples=50, deadline=None)
def test_appending_moves_no_id(space: TokenSpace, shape: CodeGrid | CodeSequence) -> None:
    old = copy.deepcopy(space)
    ids = torch.arange(old.vocab_size)
    before = space.modality_of(ids)
    size = 5 if shape.num_global_codes else 0
    space.append_modality("late", [3] * shape.num_codebooks, shape, size)
    assert [space.token_name(token) for token in range(old.vocab_size)] == [
        old.token_name(token) for token in range(old.vocab_size)
    ]
    assert space.ranges[: len(old.ranges)] == old.ranges and space != old
    assert torch.equal(space.modality_of(ids), before)
    assert space.open_token("late") == old.vocab_size
    assert space.vocab_size == old.vocab_size + 2 + 3 * shape.num_codebooks + size
    assert space.modality_of(torch.tensor([space.vocab_size - 1])).item() == len(space.modalities)


@given(spaces())
@settings(max_examples=25, deadline=None)
def test_saved_and_loaded_are_equal(tmp_path_factory: pytest.TempPathFactory, space: TokenSpace) -> None:
    path = space.save(tmp_path_factory.mktemp("space") / "deep" / "token_space.json")
    loaded = TokenSpace.load(path)
    assert loaded == space and loaded.ranges == space.ranges and loaded.shapes == space.shapes
    assert [one.name for one in path.parent.iterdir()] == ["token_space.json"]


@pytest.mark.parametrize(
    ("name", "sizes", "shape", "message"),
    [
        (
            "image",
            [3],
            CodeSequence(1, 2),
            r"'image' is in the token space already \(it holds text, image, tone\)",
        ),
        ("text", [3], CodeSequence(1, 2), "other than text.*received 'text'"),
        ("bos", [3], CodeSequence(1, 2), "received 'bos'"),
        ("a-b", [3], CodeSequence(1, 2), "identifier.*'a-b'"),
        ("smell", [3, 4], CodeSequence(1, 2), r"1 codebooks.*\[3, 4\]"),
        ("smell", [0], CodeSequence(1, 2), r"\[0\]"),
        ("smell", [3], CodeGrid(("rows",), (1,), (17,)), "17.*end at 16"),
    ],
)
def test_what_cannot_be_appended_changes_nothing(
    name: str, sizes: list[int], shape: CodeSequence | CodeGrid, message: str
) -> None:
    space = example()
    with pytest.raises(TokenSpaceError, match=message):
        space.append_modality(name, sizes, shape)
    assert space == example() and space.ranges == example().ranges


def test_what_is_not_there_is_named_with_the_choices() -> None:
    space = example()
    for call in (space.open_token, space.close_token, space.code_range, space.codebook_sizes):
        with pytest.raises(TokenSpaceError, match="'smell'; this token space has image, tone"):
            call("smell")
    with pytest.raises(TokenSpaceError, match="codebooks 0 to 1; received 2"):
        space.code_range("tone", 2)
    for size in (0, 17, -1):
        with pytest.raises(TokenSpaceError, match=f"1 to 16; received {size}"):
            space.size_token(size)
    for token in (-1, space.vocab_size):
        with pytest.raises(TokenSpaceError, match=f"0 to 148; received {token}"):
            space.token_name(token)
    with pytest.raises(TokenSpaceError, match="received 0 and 64"):
        TokenSpace(0)


def test_a_file_that_is_missing_truncated_or_altered_is_named(tmp_path: Path) -> None:
    path = tmp_path / "token_space.json"
    with pytest.raises(TokenSpaceError, match=r"token_space\.json is missing"):
        TokenSpace.load(path)
    whole = example().save(path).read_text()
    data = json.loads(whole)
    altered = [
        whole[: len(whole) // 2], "", "[]", "3", "\x00",
        json.dumps(data | {"vocab_size": 5}), json.dumps(data | {"version": 9}), json.dumps(data | {"text_size": "x"}),
        json.dumps(data | {"modalities": [data["modalities"][0]] * 2}),
        json.dumps(data | {"modalities": [{**data["modalities"][0], "shape": {"type": "ring"}}]}),
    ]  # fmt: skip
    for text in altered:
        path.write_text(text)
        with pytest.raises(TokenSpaceError, match=r"token_space\.json is not a usable"):
            TokenSpace.load(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TokenSpaceError, match=r"token_space\.json is not a usable"):
        TokenSpace.load(path)
