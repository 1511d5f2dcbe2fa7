"""Prompts to ids and back: every form of prompt, what is learnt, what is refused, and that nothing is lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from anytoken.processor import (
    Processor,
)
from anytoken.segments import DNA, Image, Segment, SegmentError, Speech, Text
from anytoken.token_space import (
    TokenSpace,
)
from anytoken.tokenizers.base import (
    CodeGrid,
    Codes,
    CodeSequence,
    ModalityTokenizer,
    TokenizerError,
    register_modality,
)
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.utils.errors import RequestError, TokenSpaceError

BASES = "ACGT"
SHADES = 4


class Dots(Segment):
    """A plug-in kind: a small grid of shades, kept in a text file."""

    kind: ClassVar[str] = "dots"

    def __init__(self, shades: Any, scale: int = 1) -> None:
        self.shades = np.asarray(shades, dtype=np.int64) * scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dots) and np.array_equal(self.shades, other.shades)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Dots({self.shades.tolist()})"

    @classmethod
    def open(cls, source: str | Path) -> "Dots":
        return cls(json.loads(Path(source).read_text()))


@register_modality
class DotsTokenizer(ModalityTokenizer):
    """One code a dot, and two global codes that tell the first shade, on which the others hang; lossless."""

    kind = "dots"
    segment_type = Dots

    def __init__(self, side: int = 3) -> None:
        shape = CodeGrid(("rows", "columns"), (1, 1), (side, side), num_global_codes=2)
        super().__init__(
            shape=shape, codebook_sizes=[SHADES], config={"side": side}, global_codebook_size=SHADES
        )

    def encode(self, segment: Segment) -> Codes:
        self.check_segment(segment)
        assert isinstance(segment, Dots)
        first = segment.shades[0, 0]
        header = np.array([first, SHADES - 1 - first]) % SHADES
        return Codes((segment.shades ^ header[0]).reshape(-1, 1), segment.shades.shape, header)

    def decode(self, codes: Codes) -> Segment:
        self.check_codes(codes)
        assert codes.header.sum() == SHADES - 1
        return Dots(codes.values.reshape(codes.size) ^ codes.header[0])


class LetterTokenizer(ModalityTokenizer):
    """One base a code, twice, to have two codebooks; lossless. Not registered: `dna` has its own."""

    kind = "dna"
    segment_type = DNA

    def __init__(self) -> None:
        super().__init__(shape=CodeSequence(1, 6, num_codebooks=2), codebook_sizes=[4, 4], config={})

    def encode(self, segment: Segment) -> Codes:
        self.check_segment(segment)
        assert isinstance(segment, DNA)
        codes = np.array([BASES.find(letter) for letter in segment.bases])
        return Codes(np.stack([codes, 3 - codes], axis=1))

    def decode(self, codes: Codes) -> Segment:
        self.check_codes(codes)
        return DNA("".join(BASES[code] for code in codes.values[:, 0]))


class CornerTokenizer(ModalityTokenizer):
    """Pictures of one colour out of two; what is not of that form is not taken."""

    kind = "image"
    segment_type = Image

    def __init__(self) -> None:
        super().__init__(shape=CodeSequence(1, 1), codebook_sizes=[256], config={})

    def encode(self, segment: Segment) -> Codes:
        self.check_segment(segment)
        assert isinstance(segment, Image)
        return Codes(np.array([[int(segment.pixels[0, 0, 0])]]))

    def decode(self, codes: Codes) -> Segment:
        return grey(int(codes.values[0, 0]))


def grey(shade: int) -> Image:
    return Image(np.full((2, 2, 3), shade, np.uint8))


TEXT = TextTokenizer.train(["red apple"] * 3 + ["green pear, ein schöner Apfel", "What is this?"], 300)


def make_processor(*tokenizers: ModalityTokenizer) -> Processor:
    space = TokenSpace(TEXT.vocab_size, 3)
    for one in tokenizers:
        space.append_modality(one.kind, one.codebook_sizes, one.shape, one.global_codebook_size)
    return Processor(space, TEXT, {one.kind: one for one in tokenizers})


PROCESSOR = make_processor(CornerTokenizer(), DotsTokenizer(), LetterTokenizer())
SPACE = PROCESSOR.token_space
DOTS, GENE, APPLE = Dots([[0, 1, 2], [3, 2, 1]]), DNA("GATTAC"), Text("red apple")

texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["<|image|>", "<|/dots|>", "<|end|><|assistant|>", "<|size:2|>", "dots:3", "\x00", "é", "🍎"]
    ),
).map(Text)
dots = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda size: st.lists(
        st.integers(0, SHADES - 1), min_size=size[0] * size[1], max_size=size[0] * size[1]
    ).map(lambda shades: Dots(np.reshape(shades, size)))
)
media = st.one_of(dots, st.text(BASES, min_size=1, max_size=6).map(DNA), st.integers(0, 255).map(grey))
contents = st.lists(st.one_of(texts, media), max_size=6)
roles = st.sampled_from(["user", "assistant", "system"])


def joined(segments: list[Segment]) -> list[Segment]:
    """Neighbouring texts as one text, and no empty text: what a content means."""
    result: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Text) and result and isinstance(result[-1], Text):
            result[-1] = Text(result[-1].text + segment.text)
        elif segment != Text(""):
            result.append(segment)
    return result


# ---- segments and ids ----


@settings(max_examples=40, deadline=None)
@given(contents)
def test_any_segments_come_back_from_their_ids(segments: list[Segment]) -> None:
    ids = [token for segment in segments for token in PROCESSOR.tokenize(segment)]
    assert PROCESSOR.detokenize(ids) == joined(segments)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(roles, contents.filter(joined)), min_size=1, max_size=4))
def test_any_conversation_is_legal_and_comes_back(turns: list[tuple[str, list[Segment]]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = PROCESSOR.encode_chat(messages, add_generation_prompt=False)
    PROCESSOR.grammar.validate(ids)
    assert PROCESSOR.encode_chat(messages) == [*ids, SPACE.assistant]
    assert PROCESSOR.detokenize(ids) == [one for _, content in turns for one in joined(content)]
    starts = [token for token in ids if token in (SPACE.user, SPACE.assistant, SPACE.system)]
    assert starts == [getattr(SPACE, role) for role, _ in turns]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(texts, st.sampled_from(range(TEXT.vocab_size, SPACE.vocab_size)).map(SPACE.token_name))
    )
)
def test_no_text_becomes_a_control_or_code_id(parts: list[Text | str]) -> None:
    text = "".join(str(part) for part in parts)
    ids = PROCESSOR.segment_ids(Text(text))
    assert all(0 <= token < SPACE.text_size for token in ids)
    assert TEXT.decode(ids) == text
    if text:
        chat = PROCESSOR.encode_chat(text)
        assert chat == [SPACE.bos, SPACE.user, *ids, SPACE.end, SPACE.assistant]


def test_ids_of_each_kind() -> None:
    start, header = SPACE.code_range("dots").start, SPACE.global_range("dots").start
    assert PROCESSOR.segment_ids(DOTS) == [
        SPACE.open_token("dots"), SPACE.size_token(2), SPACE.size_token(3), header, header + 3,
        *(start + shade for shade in (0, 1, 2, 3, 2, 1)), SPACE.close_token("dots"),
    ]  # fmt: skip
    first, second = (SPACE.code_range("dna", book).start for book in (0, 1))
    assert PROCESSOR.segment_ids(DNA("AT")) == [
        SPACE.open_token("dna"), first, second + 3, first + 3, second, SPACE.close_token("dna"),
    ]  # fmt: skip
    assert PROCESSOR.segment_ids(Text("")) == []
    assert PROCESSOR.kinds == {"text": Text, "image": Image, "dots": Dots, "dna": DNA}
    assert f"{SPACE.vocab_size} ids" in repr(PROCESSOR)


def test_codes_and_ids_of_one_medium() -> None:
    codes = Codes(np.array([[0, 3], [2, 1]]))
    ids = PROCESSOR.codes_to_ids("dna", codes)
    assert [(one.kind, one.codes) for one in PROCESSOR.grammar.parse(ids)] == [("dna", codes)]
    assert PROCESSOR.grammar.parse(PROCESSOR.segment_ids(DOTS))[0].codes.size == (2, 3)
    with pytest.raises(TokenSpaceError, match="stop"):
        PROCESSOR.detokenize(ids[:-1])
    with pytest.raises(TokenizerError, match=r"dna codebook 1 has codes 0 to 3; received .* 4"):
        PROCESSOR.codes_to_ids("dna", Codes(np.array([[0, 4]])))
    with pytest.raises(TokenizerError, match="1 to 6 frames; received 7"):
        PROCESSOR.codes_to_ids("dna", Codes(np.zeros((7, 2))))
    with pytest.raises(
        RequestError, match=r"'dot' \(did you mean 'dots'\?\); allowed: text, image, dots, dna"
    ):
        PROCESSOR.codes_to_ids("dot", codes)


def test_text_cut_inside_a_letter_and_ids_that_are_no_sequence() -> None:
    ids = PROCESSOR.segment_ids(Text("a🍎"))
    assert PROCESSOR.detokenize(ids[:-1]) == [Text("a\ufffd")]
    assert PROCESSOR.detokenize([]) == PROCESSOR.detokenize(PROCESSOR.null_prompt()) == []
    PROCESSOR.grammar.validate(PROCESSOR.null_prompt()[:-1])
    dots_ids = PROCESSOR.segment_ids(DOTS)
    for wrong in (dots_ids[:-1], dots_ids[1:], [SPACE.vocab_size], [-1], [SPACE.pad]):
        with pytest.raises(TokenSpaceError, match=r"\w"):
            PROCESSOR.detokenize(wrong)


@pytest.mark.parametrize(
    ("segment", "error", "message"),
    [
        ("red apple", RequestError, "segment.*text, image, dots, dna.*str"),
        (None, RequestError, "NoneType"),
        (Speech([0.0]), RequestError, "'speech'; allowed: text, image, dots, dna"),
        (DNA("ACGTACG"), TokenizerError, "1 to 6 frames; received 7"),
        (DNA("ACN"), TokenizerError, "-1"),
        (Dots([[0] * 4]), TokenizerError, r"size \(1, 4\)"),
        (Dots([[0, SHADES]]), TokenizerError, "0 to 3"),
        (Text("\ud800"), TokenizerError, "Unicode"),
    ],
)
def test_segments_outside_the_limits(segment: Any, error: type[ValueError], message: str) -> None:
    with pytest.raises(error, match=message):
        PROCESSOR.segment_ids(segment)


# ---- prompts ----


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with one file of each kind."""
    grey(7).save(tmp_path / "a.png")
    GENE.save(tmp_path / "a.fa")
    APPLE.save(tmp_path / "a.txt")
    Speech([0.0]).save(tmp_path / "a.wav")
    (tmp_path / "dots.json").write_text(json.dumps(DOTS.shades.tolist()))
    return tmp_path


def contents_of(prompt: Any) -> list[Segment]:
    messages = PROCESSOR.messages(prompt)
    assert [message["role"] for message in messages] == ["user"]
    return messages[0]["content"]


def test_prompts_without_roles(files: Path) -> None:
    named = DNA(GENE.bases, "sequence")
    for prompt, wanted in [
        ("red apple", [APPLE]),
        (APPLE, [APPLE]),
        (DOTS, [DOTS]),
        (files / "a.png", [grey(7)]),
        (Picture.new("L", (2, 2), 9), [grey(9)]),
        (grey(3).pixels, [grey(3)]),
        ({"type": "dna", "dna": "ACGT"}, [DNA("ACGT")]),
        ([APPLE, DOTS, "red apple", ""], [APPLE, DOTS, APPLE]),
        (("red apple", GENE), [APPLE, GENE]),
        ([files / "a.fa", files / "a.txt", grey(3).to_pil()], [named, APPLE, grey(3)]),
        ([{"type": "text", "text": "red apple"}, Text(""), {"type": "text", "text": ""}], [APPLE]),
    ]:
        assert contents_of(prompt) == wanted


def test_parts_of_every_form(files: Path) -> None:
    named = DNA(GENE.bases, "sequence")
    for part, wanted in [
        ({"type": "image", "image": files / "a.png"}, grey(7)),
        ({"type": "image", "path": files / "a.png"}, grey(7)),
        ({"type": "image", "image": (files / "a.png").read_bytes()}, grey(7)),
        ({"type": "image", "image": grey(7).to_pil()}, grey(7)),
        ({"type": "image", "image": grey(7).pixels}, grey(7)),
        ({"type": "image", "image": grey(7)}, grey(7)),
        ({"type": "text", "text": "red apple"}, APPLE),
        ({"type": "text", "text": APPLE}, APPLE),
        ({"type": "text", "path": files / "a.txt"}, APPLE),
        ({"type": "dna", "dna": "acgt"}, DNA("acgt")),
        ({"type": "dna", "dna": files / "a.fa"}, named),
        ({"type": "dots", "dots": files / "dots.json"}, DOTS),
        ({"type": "dots", "dots": DOTS.shades}, DOTS),
        ({"type": "dots", "dots": np.array([[1]]), "scale": 3}, Dots([[3]])),
    ]:
        assert contents_of([part]) == [wanted], part
        message = {"role": "user", "content": [part]}
        assert (
            PROCESSOR.messages(message)
            == PROCESSOR.messages([message])
            == [{"role": "user", "content": [wanted]}]
        )


def test_strings_of_messages_open_files_below_the_media_root_only(
    files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Messages may be somebody else's data: what they name is not read unless its folder is allowed."""
    outside = tmp_path_factory.mktemp("outside")
    grey(9).save(outside / "secret.png")
    (files / "link.png").symlink_to(outside / "secret.png")
    (files / "inner").symlink_to(outside)
    os.mkfifo(files / "pipe.png")
    monkeypatch.chdir(files)
    for kind, value in [
        ("image", "a.png"),
        ("image", str(files / "a.png")),
        ("dna", "a.fa"),
        ("dots", "dots.json"),
    ]:
        for part in ({"type": kind, kind: value}, {"type": kind, "path": value}):
            with pytest.raises(RequestError, match=r"strings in messages open no files.*media_root"):
                PROCESSOR.messages([{"role": "user", "content": [part]}])
    for path in ("/etc/passwd", "a.txt"):
        with pytest.raises(RequestError, match="open no files"):
            PROCESSOR.messages([{"role": "user", "content": [{"type": "text", "path": path}]}])
    monkeypatch.setattr(PROCESSOR, "media_root", files)
    for part, wanted in [
        ({"type": "image", "image": "a.png"}, grey(7)),
        ({"type": "image", "path": str(files / "a.png")}, grey(7)),
        ({"type": "text", "path": "a.txt"}, APPLE),
        ({"type": "dots", "dots": "dots.json"}, DOTS),
    ]:
        assert contents_of(part) == [wanted]
    for value in ("link.png", "inner/secret.png", "../outside/secret.png", str(outside / "secret.png"), "/dev/zero",
                  "a\0.png", ""):  # fmt: skip
        with pytest.raises(RequestError, match="outside of media_root"):
            contents_of({"type": "image", "image": value})
    for value in ("missing.png", "pipe.png"):
        with pytest.raises(RequestError, match="no regular file"):
            contents_of({"type": "image", "image": value})


def test_letters_are_dna_and_no_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    GENE.save("ACGT.fa").rename("ACGT")
    assert contents_of({"type": "dna", "dna": "ACGT"}) == [DNA("ACGT")]
    assert contents_of({"type": "dna", "dna": Path("ACGT")}) == [DNA(GENE.bases, "sequence")]


def test_neighbouring_texts_are_one_text() -> None:
    split = PROCESSOR.encode_chat(
        ["red", " app", Text("le"), DOTS, "", {"type": "text", "text": "red"}, " apple"]
    )
    assert split == PROCESSOR.encode_chat(["red apple", DOTS, "red apple"])
    apart = [*PROCESSOR.segment_ids(Text("red")), *PROCESSOR.segment_ids(Text(" app"))]
    assert len(apart) + len(TEXT.encode("le")) > len(
        TEXT.encode("red apple")
    )  # or the test would show nothing


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [DOTS, "What is this?"]},
    {"role": "assistant", "content": ["red", " apple", GENE]},
    {"role": "user", "content": "green?"},
    {"role": "assistant", "content": [{"type": "text", "text": "pear"}]},
]


def test_a_conversation_in_ids() -> None:
    space, ids_of = SPACE, PROCESSOR.segment_ids
    assert PROCESSOR.encode_chat(CONVERSATION) == [
        space.bos,
        space.system, *ids_of(Text("Be brief.")), space.end,
        space.user, *ids_of(DOTS), *ids_of(Text("What is this?")), space.end,
        space.assistant, *ids_of(APPLE), *ids_of(GENE), space.end,
        space.user, *ids_of(Text("green?")), space.end,
        space.assistant, *ids_of(Text("pear")), space.end,
        space.assistant,
    ]  # fmt: skip


def test_only_what_the_assistant_says_is_learnt() -> None:
    ids, learn = PROCESSOR.encode_training(CONVERSATION)
    assert ids == PROCESSOR.encode_chat(CONVERSATION, add_generation_prompt=False)
    learnt = [token for token, one in zip(ids, learn, strict=True) if one]
    assert learnt == [
        *PROCESSOR.segment_ids(APPLE), *PROCESSOR.segment_ids(GENE), SPACE.end,
        *PROCESSOR.segment_ids(Text("pear")), SPACE.end,
    ]  # fmt: skip
    assert not any(one for token, one in zip(ids, learn, strict=True) if token == SPACE.assistant)
    assert PROCESSOR.encode_training("red apple")[1] == [False] * (len(TEXT.encode("red apple")) + 3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "The prompt is empty.*text, image, dots, dna"),
        ([], "The prompt is empty"),
        (["", Text(""), {"type": "text", "text": ""}], "The prompt is empty"),
        ([{"role": "user", "content": ""}], r"Message 0 \(user\) is empty"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": []}],
            r"Message 1 \(assistant\) is empty",
        ),
        (None, r"The prompt holds None \(NoneType\); allowed: a string, a segment, a path"),
        (["a", 3], r"The prompt holds 3 \(int\)"),
        ([["a"]], r"The prompt holds \['a'\] \(list\)"),
        ([{"role": "user", "content": None}], r"Message 0 \(user\) holds None"),
        (
            [{"role": "judge", "content": "a"}],
            "Message 0 has the role 'judge'; allowed: system, user, assistant",
        ),
        ([{"role": "asistant", "content": "a"}], r"'asistant' \(did you mean 'assistant'\?\)"),
        ([{"role": None, "content": "a"}], "role None"),
        ([{"role": ["user"], "content": "a"}], r"role \['user'\]"),
        ([{"role": "user"}], 'Message 0 .*needs "role" and "content"'),
        ([{"role": "user", "content": "a"}, "b"], r"Message 1 .*received 'b'.*only messages, or none"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "Message 1"),
        ([{"type": "smell", "smell": "rose"}], "type 'smell'; allowed: text, image, dots, dna"),
        ([{"type": "imgae", "imgae": "a.png"}], r"type 'imgae' \(did you mean 'image'\?\)"),
        ([{"type": ["image"]}], r"type \['image'\]"),
        ([{"text": "a"}], "type None"),
        ([{"type": "speech", "speech": "a.wav"}], "type 'speech'; allowed"),
        ([{"type": "image"}], 'type image holds its content under "image"; received the keys type'),
        ([{"type": "image", "url": "a.png"}], 'under "image"; received the keys type, url'),
        ([{"type": "text", "text": None}], 'under "text"'),
        ([{"type": "text", "text": 5}], "5 cannot be opened as text"),
        ([{"type": "image", "image": 5}], "5 cannot be opened as image.*path, a segment"),
        ([{"type": "image", "image": [1, 2]}], "cannot be opened as image"),
        ([{"type": "image", "image": grey(1).pixels, "colour": 1}], "with colour cannot be opened as image"),
        (
            [{"type": "dots", "dots": Path("missing.json")}],
            r"missing\.json'\) cannot be opened as dots.*No such file",
        ),
        ([{"type": "image", "image": GENE}], "type image holds a segment of kind 'dna'"),
        ([Speech([0.0])], "no tokenizer for 'speech'; allowed: text, image, dots, dna"),
        (
            [{"role": "user", "content": [DOTS, Speech([0.0])]}],
            r"Message 0 \(user\): no tokenizer for 'speech'",
        ),
    ],
)
def test_wrong_prompts_say_where_and_what_is_allowed(prompt: Any, message: str) -> None:
    for call in (PROCESSOR.messages, PROCESSOR.encode_chat, PROCESSOR.encode_training):
        with pytest.raises(RequestError, match=message):
            call(prompt)


def test_files_that_do_not_open_are_named(files: Path) -> None:
    (files / "broken.png").write_bytes(b"no picture")
    cut = (files / "a.png").read_bytes()[:40]
    for prompt, message in [
        (files / "missing.png", "missing.png"),
        (files / "dots.json", r"dots\.json has no suffix.*known"),
        (files / "broken.png", r"broken\.png is not a readable image"),
        ({"type": "image", "image": files / "a.wav"}, r"a\.wav is not a readable image"),
        ({"type": "image", "image": cut}, "the given bytes"),
        ({"type": "dna", "dna": "ACGTX"}, "'X' at position 5"),
        (np.zeros((2, 2)), "uint8"),
    ]:
        with pytest.raises(SegmentError, match=message):
            PROCESSOR.messages(prompt)
    with pytest.raises(RequestError, match="'speech'; allowed"):
        PROCESSOR.encode_chat(files / "a.wav")


def test_nothing_is_opened_before_the_whole_prompt_is_known_to_be_sound(files: Path) -> None:
    with pytest.raises(RequestError, match="Message 1 has the role 'judge'"):
        PROCESSOR.messages(
            [{"role": "user", "content": files / "missing.png"}, {"role": "judge", "content": "a"}]
        )


# ---- checkpoints ----


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_processor(DotsTokenizer()).save_pretrained(tmp_path / "checkpoint")


def test_a_saved_processor_gives_the_same_ids(saved: Path) -> None:
    before, after = make_processor(DotsTokenizer()), Processor.from_pretrained(saved)
    assert after.token_space == before.token_space and list(after.kinds) == ["text", "dots"]
    for prompt in ("ein schöner Apfel", [DOTS, "What is this?"]):
        assert after.encode_chat(prompt) == before.encode_chat(prompt)
    assert after.detokenize(after.encode_chat([DOTS, "a"])) == [DOTS, Text("a")]
    files = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    assert files == [
        "fingerprints.json", "prompts.json", "text_tokenizer/tokenizer.json", "token_space.json",
        "tokenizers/dots/config.json", "tokenizers/dots/model.safetensors",
    ]  # fmt: skip


FILES = [
    "token_space.json", "text_tokenizer/tokenizer.json", "tokenizers/dots/config.json",
    "tokenizers/dots/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_damaged_is_named(saved: Path, name: str) -> None:
    data = (saved / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"\xff\xfe\x00"):
        (saved / name).write_bytes(damaged)
        with pytest.raises((TokenSpaceError, TokenizerError), match=name):
            Processor.from_pretrained(saved)
    (saved / name).unlink()
    with pytest.raises((TokenSpaceError, TokenizerError), match=f"{name} is missing"):
        Processor.from_pretrained(saved)
    (saved / name).write_bytes(data)
    assert Processor.from_pretrained(saved).token_space == TokenSpace.load(saved / "token_space.json")


def test_no_folder(tmp_path: Path, saved: Path) -> None:
    for path in (tmp_path / "nowhere", saved / "token_space.json"):
        with pytest.raises(TokenSpaceError, match=r"is not a folder.*token_space\.json"):
            Processor.from_pretrained(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenSpaceError, match=r"token_space\.json is missing"):
        Processor.from_pretrained(tmp_path / "empty")


def test_files_of_another_checkpoint(saved: Path, tmp_path: Path) -> None:
    other = Processor(TokenSpace(256, 3), TextTokenizer.train(["a"], 256), {})
    other.token_space.append_modality("dots", [SHADES], DotsTokenizer(2).shape, SHADES)
    other = Processor(other.token_space, other.text_tokenizer, {"dots": DotsTokenizer(2)})
    elsewhere = other.save_pretrained(tmp_path / "other")
    for name, message in [
        ("text_tokenizer", f"mixes files.*text tokenizer has 256 ids.*keeps {TEXT.vocab_size}"),
        ("tokenizers/dots", r"mixes files.*dots with CodeGrid.*max_size=\(3, 3\).*max_size=\(2, 2\)"),
        ("token_space.json", "mixes files.*keeps 256 for text"),
    ]:
        mixed = shutil.copytree(saved, tmp_path / name.replace("/", "-"))
        if (mixed / name).is_dir():
            shutil.rmtree(mixed / name)
            shutil.copytree(elsewhere / name, mixed / name)
        else:
            shutil.copyfile(elsewhere / name, mixed / name)
        with pytest.raises(TokenSpaceError, match=message):
            Processor.from_pretrained(mixed)


def test_a_tokenizer_of_the_same_shape_with_other_weights_is_noticed(tmp_path: Path) -> None:
    folders, found = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        image = ImageTokenizer(
            width=8, encoder_depth=1, decoder_depth=1, refine_width=4, refine_depth=1, side_px=16
        )
        space = TokenSpace(TEXT.vocab_size)
        space.append_modality("image", image.codebook_sizes, image.shape)
        processor = Processor(space, TEXT, {"image": image.eval()})
        folders.append(processor.save_pretrained(tmp_path / str(seed), torch.bfloat16))
        found.append(Processor.from_pretrained(folders[-1]).tokenizers["image"].fingerprint())
        assert found[-1] == image.fingerprint(torch.bfloat16) != image.fingerprint()
    shutil.copy(folders[1] / "tokenizers/image/model.safetensors", folders[0] / "tokenizers/image")
    with pytest.raises(TokenSpaceError, match=f"mixes files.*{found[1][:12]}.*{found[0][:12]}"):
        Processor.from_pretrained(folders[0])
    (folders[0] / "fingerprints.json").write_text("[")
    with pytest.raises(TokenSpaceError, match=r"fingerprints\.json is damaged"):
        Processor.from_pretrained(folders[0])
    (folders[0] / "fingerprints.json").unlink()
    Processor.from_pretrained(folders[0])  # saved before there were fingerprints


def test_a_folder_cannot_name_code_to_load(saved: Path) -> None:
    path = saved / "tokenizers" / "dots" / "config.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "kind": "smell", "class": "os:system"}))
    with pytest.raises(TokenizerError, match=r"'smell'.*not registered.*dots"):
        Processor.from_pretrained(saved)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda space: Processor(space, TEXT, {}), r"has \['dots'\], but there are tokenizers for \[\]"),
        (
            lambda space: Processor(space, TEXT, {"dots": DotsTokenizer(), "dna": LetterTokenizer()}),
            r"tokenizers for \['dots', 'dna'\]",
        ),
        (lambda space: Processor(space, TEXT, {"dots": DotsTokenizer(2)}), "dots with CodeGrid"),
        (
            lambda space: Processor(space, TEXT, {"dots": LetterTokenizer()}),
            "its tokenizer is dna with CodeSequence",
        ),
        (
            lambda space: Processor(space, TextTokenizer.train(["a"], 256), {"dots": DotsTokenizer()}),
            "256 ids",
        ),
    ],
)
def test_parts_that_do_not_fit_together(build: Callable[[TokenSpace], Processor], message: str) -> None:
    with pytest.raises(TokenSpaceError, match=message):
        build(make_processor(DotsTokenizer()).token_space)


def test_a_save_that_fails_is_no_checkpoint(tmp_path: Path) -> None:
    tokenizer = DotsTokenizer()
    tokenizer.config["side"] = object()  # not JSON
    with pytest.raises(TypeError):
        make_processor(tokenizer).save_pretrained(tmp_path / "a")
    left = sorted(path.name for path in (tmp_path / "a").rglob("*"))
    assert left == ["text_tokenizer", "tokenizer.json", "tokenizers"]
    with pytest.raises(TokenSpaceError, match=r"token_space\.json is missing"):
        Processor.from_pretrained(tmp_path / "a")
