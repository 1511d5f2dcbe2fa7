"""The text tokenizer: exact for any Unicode, the same from the same texts, whole in its folder."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.text import TextTokenizer

CORPUS = [
    "a red apple, 3d",
    "a red car, flat",
    "what is this? a red apple!",
    "M K L V",
    "naïve café – 日本語 🍎",
] * 3
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all but surrogates, which are no characters


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(CORPUS, 320, always=[" M", " K"])


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids) and len(ids) <= len(text.encode())


@pytest.mark.parametrize(
    "text", ["", " ", "  a  ", "\n\t\r\n", "\x00", "é", "é", "👩‍👩‍👧", "\U0010ffff", "<|image|>", "Ġ"]
)
def test_what_tokenizers_like_to_change_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_has_an_id(tokenizer):
    single = [
        tokenizer.id_bytes(id_) for id_ in range(tokenizer.vocab_size) if len(tokenizer.id_bytes(id_)) == 1
    ]
    assert sorted(single) == [bytes([byte]) for byte in range(256)]


def test_training_learns_words(tokenizer):
    assert tokenizer.vocab_size > 256
    assert len(tokenizer.encode("a red apple")) < len("a red apple") / 2


def test_what_must_be_one_id_is(tokenizer):
    ids = tokenizer.encode("K M K M")
    assert len(ids) == 4 and ids[1] == ids[3] and tokenizer.id_bytes(ids[1]) == b" M"


def test_training_twice_gives_the_same_file(tokenizer, tmp_path):
    again = TextTokenizer.train(CORPUS, 320, always=[" M", " K"])
    files = [
        one.save_pretrained(tmp_path / name) / "tokenizer.json"
        for name, one in (("a", tokenizer), ("b", again))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert again.fingerprint() == tokenizer.fingerprint() != TextTokenizer.train(CORPUS, 300).fingerprint()


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer, tmp_path):
    loaded = TextTokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / "text"))
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.vocab_size == tokenizer.vocab_size
    for text in CORPUS:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["tokenizer.json"]


def test_a_damaged_folder_names_its_file(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        TextTokenizer.from_pretrained(tmp_path)
    path = tokenizer.save_pretrained(tmp_path) / "tokenizer.json"
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff\xfe", b'{"a": 1}'):
        path.write_bytes(damaged)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
            TextTokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_without_all_bytes_is_refused(tokenizer, tmp_path):
    path = tokenizer.save_pretrained(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {"a": 0, "b": 1}
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="lacks single bytes"):
        TextTokenizer.from_pretrained(tmp_path)


def test_ids_that_are_no_utf8_become_a_replacement(tokenizer):
    (first, *_) = tokenizer.encode("é")
    single = next(i for i in range(tokenizer.vocab_size) if tokenizer.id_bytes(i) == b"\xc3")
    assert tokenizer.decode([single]) == "\ufffd" and tokenizer.id_bytes(first)[:1] == b"\xc3"


@pytest.mark.parametrize("id_", [-1, 320, 10**9])
def test_an_id_out_of_range_is_an_error(tokenizer, id_):
    with pytest.raises(TokenizerError, match=rf"0 to {tokenizer.vocab_size - 1}; received {id_}"):
        tokenizer.decode([0, id_])


def test_what_is_no_text_is_an_error(tokenizer):
    with pytest.raises(TokenizerError, match="received bytes"):
        tokenizer.encode(b"a red apple")
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_impossible_vocabularies_are_errors():
    with pytest.raises(TokenizerError, match="at least 256 ids; received 255"):
        TextTokenizer.train(CORPUS, 255)
    with pytest.raises(TokenizerError, match="cannot be one id each"):
        TextTokenizer.train(CORPUS, 256, always=[" M"])
    with pytest.raises(TokenizerError, match="cannot be one id each"):
        TextTokenizer.train(CORPUS, 400, always=["two words"])
