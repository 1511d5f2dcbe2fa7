"""K-mers, byte-pair encoding and the learned codes of DNA behind one interface: exact, streamed, in constant memory."""

import gzip
import json
import re
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from batteries import TokenizerBattery
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.segments import DNA
from anytoken.tokenizers.base import Codes, TokenizerError, load_tokenizer
from anytoken.tokenizers.dna_letters import read_fasta, to_symbols
from anytoken.tokenizers.dna_variants import PIECE, DNABPETokenizer, DNAKmerTokenizer
from anytoken.tokenizers.trainer import train_tokenizer

MERGES = ["A C", "G T", "AC GT", "T T"]


def bases(length: int, seed: int = 0, letters: str = "ACGT") -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters), length))


class VariantBattery(TokenizerBattery):
    """The battery without training: nothing in these has a gradient, or weights."""

    test_the_training_loss_reaches_every_parameter = None
    test_a_few_steps_lower_the_training_loss = None
    test_the_fingerprint_tells_other_weights = None

    def segment(self, seed):
        return DNA(bases(61, seed))

    def odd(self):
        return {
            "one base": DNA("A"),
            "only N": DNA("N" * 50),
            "N in between": DNA("ACGNTTTTTN"),
            "soft-masked RNA": DNA("acguACGU"),
            "one letter": DNA("T" * 300),
        }

    def check_same_shape(self, segment, back):
        assert back.bases == segment.bases

    def check_close(self, one, other):
        assert one == other

    def test_a_configuration_of_something_else_is_named(self, saved):
        path = saved / "config.json"
        header = json.loads(path.read_text())
        for wrong in ({"no_such_setting": 1}, dict.fromkeys(self.settings, 0)):
            path.write_text(json.dumps({**header, "config": {**header["config"], **wrong}}))
            with pytest.raises(TokenizerError, match=r"config\.json"):
                load_tokenizer(saved)

    @pytest.mark.parametrize(
        ("given", "back"), [("acgu", "ACGT"), ("RYSWKMBDHV", "N" * 10), ("aRnU", "ANNT")]
    )
    def test_letters_come_back_as_documented(self, tokenizer, given, back):
        assert tokenizer.autoencode(DNA(given)).bases == back

    def test_more_than_a_segment_takes_is_an_error(self, tokenizer):
        with pytest.raises(TokenizerError, match=r"at most 400 codes; 9000 bases are .*encode_fasta"):
            tokenizer.encode(DNA(bases(9_000)))


class TestKmer(VariantBattery):
    tokenizer_class = DNAKmerTokenizer
    settings = {"k": 4}

    def test_codes_are_numbers_to_the_base_of_four(self, tokenizer):
        codes = tokenizer.encode(DNA("AAAACAAATTTTACGTGN")).values[:, 0].tolist()
        assert codes == [0, 64, 255, 0b00011011, 256 + 2, 256 + 4]

    def test_windows_begin_anew_after_an_n(self, tokenizer):
        assert len(tokenizer.encode(DNA("ACNACGTN"))) == 2 + 1 + 1 + 1


class TestBPE(VariantBattery):
    tokenizer_class = DNABPETokenizer
    settings = {"vocab_size": 16, "merges": MERGES}

    def test_merges_are_applied_in_their_order(self, tokenizer):
        pieces = [tokenizer._spell(code) for code in tokenizer.encode(DNA("ACGTTTACC")).values]
        assert pieces == ["ACGT", "TT", "AC", "C"]

    def test_codes_that_stand_for_no_piece_decode(self, tokenizer):
        assert tokenizer.decode(Codes(np.array([[15], [0]]))) == DNA("NA")


TOKENIZERS = [DNAKmerTokenizer(1), DNAKmerTokenizer(3), DNAKmerTokenizer(6), DNABPETokenizer(16, MERGES)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda one: f"{one.kind}-{one.codebook_sizes[0]}")
@given(letters=st.text("ACGTN", min_size=1, max_size=400), cuts=st.lists(st.integers(1, 90), max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_stream_in_any_chunks_has_the_codes_of_the_whole(tokenizer, letters, cuts):
    whole = tokenizer.encode(DNA(letters)).values[:, 0]
    assert tokenizer.decode(Codes(whole[:, None])).bases == letters
    edges = [0, *(edge for edge in np.cumsum(cuts).tolist() if edge < len(letters)), len(letters)]
    chunks = [letters[a:b] for a, b in pairwise(edges)]
    parts = list(tokenizer.encode_stream(chunks))
    assert np.array_equal(np.concatenate(parts), whole)
    assert "".join(tokenizer.decode_stream(parts)) == letters


def test_bpe_of_a_long_sequence_is_that_of_its_pieces():
    tokenizer, letters = TOKENIZERS[-1], bases(3 * PIECE + 5, 4)
    cut = (letters[i : i + 997] for i in range(0, len(letters), 997))
    parts = np.concatenate(list(tokenizer.encode_stream(cut)))
    alone = [tokenizer._lookup(to_symbols(letters[i : i + PIECE])) for i in range(0, len(letters), PIECE)]
    assert np.array_equal(parts, np.concatenate(alone))
    assert "".join(tokenizer.decode_stream([parts])) == letters


@pytest.mark.parametrize("suffix", ["fa", "fa.gz"])
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_fasta_of_several_sequences_in_blocks_of_any_size(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr("anytoken.tokenizers.dna_letters.BLOCK", block)
    text = ">one first\nACGT\nacgt\n;a comment\n>two\nNNNN\n\n>empty\n>three\n" + "GT" * 40
    path = tmp_path / f"some.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    found: dict[str, str] = {}
    for _, name, piece in read_fasta(path):
        found[name] = found.get(name, "") + piece
    assert found == {"one first": "ACGTacgt", "two": "NNNN", "three": "GT" * 40}
    tokenizer = DNAKmerTokenizer(3)
    back = {name: "".join(tokenizer.decode_stream(codes)) for name, codes in tokenizer.encode_fasta(path)}
    assert back == {name: letters.upper() for name, letters in found.items()}


def test_a_file_that_is_missing_or_cut_short_is_an_error(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere\.fa cannot be read as FASTA"):
        list(read_fasta(tmp_path / "nowhere.fa"))
    (tmp_path / "cut.fa.gz").write_bytes(gzip.compress(b">a\n" + b"ACGT" * 999)[:-20])
    with pytest.raises(TokenizerError, match=r"cut\.fa\.gz cannot be read"):
        list(read_fasta(tmp_path / "cut.fa.gz"))


@pytest.mark.parametrize("line", [70, 0], ids=["lines", "one line"])
def test_a_genome_of_five_million_bases_streams_in_constant_memory(tmp_path, line):
    block = bases(100_000)
    with (tmp_path / "genome.fa").open("w") as file:
        file.write(">genome\n")
        for _ in range(50):
            pieces = [block[i : i + line] for i in range(0, len(block), line)] if line else [block]
            file.write("".join(piece + ("\n" if line else "") for piece in pieces))
    tokenizer = DNAKmerTokenizer(4)
    list(tokenizer.encode_stream(["ACGT"]))
    tracemalloc.start()
    codes = count = 0
    for _, stream in tokenizer.encode_fasta(tmp_path / "genome.fa"):
        for part in stream:
            codes += len(part)
            count += sum(len(letters) for letters in tokenizer.decode_stream([part]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (codes, count) == (1_250_000, 5_000_000)
    assert peak < 8e6, "the file is 5 MB, and its codes as int64 are 10"


@pytest.mark.slow
def test_real_genomes_come_back_exactly(dna_folder):
    """Genomes of other genera than that of the training genes, where Debian's ragout-examples is installed."""
    root = Path("/usr/share/doc/ragout/examples")
    paths = [path for path in sorted(root.rglob("references/*.fasta.gz")) if "E.Coli" not in path.parts]
    if not paths:
        pytest.skip("ragout-examples is not installed")
    for tokenizer in (load_tokenizer(dna_folder), *TOKENIZERS[1:]):
        for path in paths[:4]:
            letters = re.sub("[^ACGT]", "N", "".join(piece.upper() for _, _, piece in read_fasta(path)))
            back = (
                text for _, codes in tokenizer.encode_fasta(path) for text in tokenizer.decode_stream(codes)
            )
            assert "".join(back) == letters, (tokenizer.kind, path.name)


def test_merges_are_learnt_from_training_genes_by_a_recipe(sets, tmp_path):
    recipe = tmp_path / "bpe.yaml"
    recipe.write_text(
        yaml.safe_dump({"kind": "dna_bpe", "config": {"vocab_size": 24}, "data": "dna/genes.jsonl"})
    )
    out = train_tokenizer(recipe, sets, tmp_path / "out")
    loaded = load_tokenizer(out)
    assert loaded.codebook_sizes == (24,) and len(loaded.config["merges"]) == 24 - 5
    letters = bases(900, 8)
    assert loaded.autoencode(DNA(letters[:300])).bases == letters[:300]
    assert len(loaded.encode(DNA(letters[:300]))) < 220
    assert json.loads((out / "training.json").read_text())["steps"] == 0
    assert train_tokenizer(recipe, sets, tmp_path / "out") == out, "finished: left as it is"
    kmer = tmp_path / "kmer.yaml"
    kmer.write_text(yaml.safe_dump({"kind": "dna_kmer", "config": {"k": 3}}))
    assert load_tokenizer(train_tokenizer(kmer, sets, tmp_path / "kmer")).codebook_sizes == (69,)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: DNAKmerTokenizer(0), "k is 1 to 8"),
        (lambda: DNAKmerTokenizer(9), "received 9"),
        (lambda: DNABPETokenizer(5), "the 5 letters and more; received 5"),
    ],
)
def test_sizes_that_cannot_be_are_errors(build, says):
    with pytest.raises(TokenizerError, match=says):
        build()
