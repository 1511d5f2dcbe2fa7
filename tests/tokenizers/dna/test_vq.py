"""The DNA tokenizer: the battery on a short training, losslessness on all windows, letters, and streams."""

import json

import numpy as np
import pytest
import torch
import yaml
from batteries import TokenizerBattery
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.segments import DNA
from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.tokenizers.dna.base import to_symbols
from anytoken.tokenizers.dna.vq import DNATokenizer, all_windows
from anytoken.training.tokenizer.trainer import train_tokenizer


def bases(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


@pytest.fixture(scope="module")
def trained(dna_folder):
    return load_tokenizer(dna_folder)


class TestDNATokenizer(TokenizerBattery):
    tokenizer_class = DNATokenizer
    settings = {"width": 64, "code_dim": 16}

    @pytest.fixture(autouse=True)
    def _folder(self, dna_folder):
        self.folder = dna_folder

    def build(self, seed=0):
        return load_tokenizer(self.folder)

    def untrained(self):
        torch.manual_seed(0)
        return DNATokenizer(**self.settings)

    def segment(self, seed):
        return DNA(bases(61, seed))

    def odd(self):
        return {
            "one base": DNA("A"),
            "two bases": DNA("AC"),
            "only N": DNA("N" * 50),
            "one letter": DNA("T" * 1_000),
            "as long as may be": DNA(bases(1_200)),
        }

    def batch(self):
        return all_windows().repeat(8, 1)

    def check_same_shape(self, segment, back):
        assert back.bases == segment.bases

    def check_close(self, one, other):
        assert one == other


def test_all_windows_are_there_once():
    windows = all_windows()
    assert windows.shape == (125 + 25 + 5, 3) and len(windows.unique(dim=0)) == 155
    assert not (windows[:, 0] == 5).any(), "no window is padding alone"
    assert not ((windows[:, 1] == 5) & (windows[:, 2] != 5)).any(), "padding stands at the end"


def test_a_short_training_is_lossless_on_all_windows(trained, dna_folder):
    report = trained.verify()
    assert report and report.wrong == () and report.margin > 0.5
    for window in all_windows().tolist():
        letters = "".join("ACGTN"[i] for i in window if i < 5)
        codes = trained.encode(DNA(letters))
        assert len(codes) == 1 and trained.decode(codes).bases == letters
    said = json.loads((dna_folder / "training.json").read_text())
    assert said["windows_lost"] == 0 and said["steps"] % 100 == 0


@given(st.text("ACGTN", min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_any_sequence_comes_back(trained, letters):
    codes = trained.encode(DNA(letters))
    assert len(codes) == -(-len(letters) // 3) and trained.decode(codes).bases == letters


@pytest.mark.parametrize(
    ("given", "back"),
    [
        ("acgtn", "ACGTN"),
        ("ACGU", "ACGT"),
        ("acgu", "ACGT"),
        ("NNNN", "NNNN"),
        ("RYSWKMBDHV", "N" * 10),
        ("aRnU", "ANNT"),
    ],
)
def test_letters_come_back_as_documented(trained, given, back):
    assert trained.decode(trained.encode(DNA(given))).bases == back


def test_other_letters_are_named_with_their_place():
    with pytest.raises(TokenizerError, match="received 'X' at position 3"):
        to_symbols("ACX")
    with pytest.raises(TokenizerError, match="received '日' at position 2"):
        to_symbols("A日")


def test_more_than_a_segment_takes_is_an_error(trained):
    with pytest.raises(TokenizerError, match=r"at most 400 codes; 1201 bases are 401\..*encode_stream"):
        trained.encode(DNA("A" * 1201))


@given(st.lists(st.integers(0, 40), max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_stream_in_chunks_is_a_stream_in_one_piece(trained, cuts):
    letters, start, chunks = bases(sum(cuts) + 5, 3), 0, []
    for cut in cuts:
        chunks.append(letters[start : start + cut])
        start += cut
    chunks.append(letters[start:])
    whole = np.concatenate(list(trained.encode_stream([letters])))
    parts = list(trained.encode_stream(chunks))
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole, trained.encode(DNA(letters)).values[:, 0])
    assert "".join(trained.decode_stream(parts)) == letters


def test_a_stream_skips_white_space_and_takes_any_length(trained):
    letters = bases(30_000)
    lines = (letters[i : i + 70] + "\n" for i in range(0, len(letters), 70))
    assert "".join(trained.decode_stream(trained.encode_stream(lines))) == letters
    assert list(trained.encode_stream([" \n", ""])) == []


def test_a_stream_of_codes_out_of_range_is_an_error(trained):
    with pytest.raises(TokenizerError, match="0 to 255; received values from 3 to 256"):
        list(trained.decode_stream([np.array([3, 256])]))


def test_a_lossy_tokenizer_is_not_saved(tmp_path):
    torch.manual_seed(0)
    fresh = DNATokenizer(width=16, code_dim=4).eval()
    with pytest.raises(TokenizerError, match=r"of 155 DNA windows would be lost"):
        fresh.save_pretrained(tmp_path / "lossy")
    assert not (tmp_path / "lossy").exists()
    assert (fresh.save_pretrained(tmp_path / "lossy", allow_lossy=True) / "model.safetensors").is_file()


def test_stored_in_bfloat16_no_code_changes(trained, tmp_path):
    loaded = load_tokenizer(trained.save_pretrained(tmp_path / "small", dtype=torch.bfloat16))
    assert loaded.verify() and torch.equal(loaded.network_codes(), trained.network_codes())


def test_training_that_never_gets_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("anytoken.training.tokenizer.dna.MAX_ROUNDS", 2)
    recipe = {
        "kind": "dna",
        "config": {"width": 16, "code_dim": 4},
        "steps": 1,
        "batch_size": 155,
        "lr": 3e-3,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(TokenizerError, match=r"After 2 rounds of 1 steps, \d+ of 155 windows are still lost"):
        train_tokenizer(tmp_path / "recipe.yaml", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_small_a_codebook_is_an_error():
    with pytest.raises(TokenizerError, match="155 windows need a code each; codebook_size is 128"):
        DNATokenizer(codebook_size=128)


def test_codes_left_unused_decode_to_a_whole_window(trained):
    used = set(trained.network_codes().tolist())
    for code in sorted(set(range(256)) - used)[:10]:
        (text,) = trained.decode_stream([np.array([code])])
        assert 1 <= len(text) <= 3
