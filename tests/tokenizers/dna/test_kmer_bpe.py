"""K-mers, byte-pair encoding and the learned codes of DNA behind one interface: exact, streamed, in constant memory."""

import gzip
import json
import re
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from batteries import TokenizerBattery, dna_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.segments import DNA
from anytoken.tokenizers.base import Codes, TokenizerError, load_tokenizer
from anytoken.tokenizers.dna.base import read_fasta, to_symbols
from anytoken.tokenizers.dna.context import DNAContextTokenizer
from anytoken.tokenizers.dna.kmer_bpe import PIECE, DNABPETokenizer, DNAKmerTokenizer
from anytoken.training.tokenizer.trainer import train_tokenizer


def bases(length: int, seed: int = 0, letters: str = "ACGT") -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters), length))


class VariantBattery(TokenizerBattery):
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
        assert tokenizer.decode(tokenizer.encode(DNA(given))).bases == back

    def test_more_than_a_segment_takes_is_an_error(self, tokenizer):
        with pytest.raises(TokenizerError, match=r"at most 400 codes; 9000 bases are .*encode_fasta"):
            tokenizer.encode(DNA(bases(9_000)))


class FixedBattery(VariantBattery):
    """The battery without training: nothing in these has a gradient, or weights."""

    test_the_training_loss_reaches_every_parameter = None
    test_a_few_steps_lower_the_training_loss = None
    test_the_fingerprint_tells_other_weights = None


class TestKmer(FixedBattery):
    tokenizer_class = DNAKmerTokenizer
    settings = {"k": 4}

    def test_codes_are_numbers_to_the_base_of_four(self, tokenizer):
        codes = tokenizer.encode(DNA("AAAACAAATTTTACGTGN")).values[:, 0].tolist()
        assert codes == [0, 64, 255, 0b00011011, 256 + 2, 256 + 4]

    def test_windows_begin_anew_after_an_n(self, tokenizer):
        assert len(tokenizer.encode(DNA("ACNACGTN"))) == 2 + 1 + 1 + 1


class TestBPE(FixedBattery):
    tokenizer_class = DNABPETokenizer
    settings = {"vocab_size": 16, "merges": ["A C", "G T", "AC GT", "T T"]}

    def test_merges_are_applied_in_their_order(self, tokenizer):
        pieces = [tokenizer._spell(code) for code in tokenizer.encode(DNA("ACGTTTACC")).values]
        assert pieces == ["ACGT", "TT", "AC", "C"]

    def test_codes_that_stand_for_no_piece_decode(self, tokenizer):
        assert tokenizer.decode(Codes(np.array([[15], [0]]))) == DNA("NA")


class TestContext(VariantBattery):
    tokenizer_class = DNAContextTokenizer
    settings: ClassVar = {"k": 4, "classes": 3, "reach": 6, "width": 16, "code_dim": 4}

    def batch(self):
        """With letters that are missing at the ends, and one that is none, around windows that are whole."""
        batch = torch.randint(0, 4, (600, 6 + 4 + 6), generator=torch.Generator().manual_seed(0))
        batch[:50, :3], batch[50:90, -2:], batch[90:99, 12] = 5, 5, 4
        return batch

    def test_a_code_is_a_window_and_a_class_of_what_is_around_it(self, tokenizer):
        kmers = DNAKmerTokenizer(4)
        letters = DNA(bases(400, 3, "ACGTN"))
        codes, plain = (one.encode(letters).values[:, 0] for one in (tokenizer, kmers))
        is_window = plain < 256
        assert np.array_equal(codes[is_window] // 3, plain[is_window])
        assert np.array_equal(codes[~is_window] - 512, plain[~is_window])
        assert tokenizer.codebook_sizes == (3 * 256 + 5,)
        middles = {
            tokenizer.encode(DNA(bases(40, s) + "ACGT" + bases(40, 99 + s))).values[10, 0] for s in range(60)
        }
        window = kmers.encode(DNA("ACGT")).values[0, 0]
        assert middles == {window * 3, window * 3 + 1, window * 3 + 2}, "one window, every class"

    def test_letters_beyond_its_reach_have_no_part_in_a_code(self, tokenizer):
        middle = bases(6, 1) + "GATC" + bases(6, 2)
        one, other = (bases(10, s) + middle + bases(30, s) for s in (3, 4))
        assert one[:10] != other[:10]
        a, b = (tokenizer.encode(DNA(letters)).values[4, 0] for letters in (one, other))
        assert a == b

    def test_rows_begin_with_the_window_and_end_with_the_class(self, tokenizer):
        rows = tokenizer.codebook_vectors()
        assert rows.shape == (3 * 256 + 5, 8)
        assert torch.equal(rows[3, :4], rows[5, :4]) and not torch.equal(rows[3, 4:], rows[5, 4:])
        assert torch.equal(rows[3, 4:], rows[6, 4:]) and not torch.equal(rows[3, :4], rows[6, :4])
        assert not rows[-5:, 4:].any()

    def test_a_class_says_something_of_the_letters_around(self, tmp_path):
        """Genes are made of one of two kinds of letters, which a window of the letters they share does not tell."""
        rng = np.random.default_rng(0)
        genes = ["".join(rng.choice(list("ATACG" if i % 2 else "GCACG"), 300)) for i in range(60)]
        source = tmp_path / "genes.jsonl"
        source.write_text("".join(json.dumps({"dna": g, "split": "train"}) + "\n" for g in genes[:50]))
        recipe = tmp_path / "context.yaml"
        config = {"k": 2, "classes": 2, "reach": 8, "width": 32, "code_dim": 8}
        plan = {
            "kind": "dna_context",
            "config": config,
            "data": "genes.jsonl",
            "steps": 200,
            "batch_size": 256,
        }
        recipe.write_text(yaml.safe_dump({**plan, "lr": 3e-3, "warmup_steps": 10, "threads": 1}))
        trained = load_tokenizer(train_tokenizer(recipe, tmp_path, tmp_path / "out"))
        held_out = [DNA(gene) for gene in genes[50:]]
        bits = trained.context_bits(held_out)
        assert bits["context_bits_with_class"] < bits["context_bits_without"] - 0.04
        assert [trained.decode(trained.encode(gene)) for gene in held_out] == held_out

    def test_training_sees_both_strands_and_only_whole_windows(self, tokenizer, tmp_path):
        source = tmp_path / "genes.jsonl"
        source.write_text(json.dumps({"dna": "AACCAACCNAACAACCC", "split": "train"}) + "\n")
        batch = tokenizer.training_batches(source, 64, 0)
        windows = batch(0)[:, 6:10]
        assert (
            batch(0).shape == (64, 16)
            and torch.equal(batch(0), batch(0))
            and not torch.equal(batch(0), batch(1))
        )
        assert windows.max() < 4 and set(windows.flatten().tolist()) == {0, 1, 2, 3}
        source.write_text(json.dumps({"dna": "ACNNG", "split": "train"}) + "\n")
        with pytest.raises(TokenizerError, match="no training gene with 4 letters"):
            tokenizer.training_batches(source, 64, 0)


TOKENIZERS = dna_tokenizers()


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
    tokenizer, letters = next(one for one in TOKENIZERS if one.kind == "dna_bpe"), bases(3 * PIECE + 5, 4)
    cut = (letters[i : i + 997] for i in range(0, len(letters), 997))
    parts = np.concatenate(list(tokenizer.encode_stream(cut)))
    alone = [
        tokenizer._lookup_all([to_symbols(letters[i : i + PIECE])])[0] for i in range(0, len(letters), PIECE)
    ]
    assert np.array_equal(parts, np.concatenate(alone))
    assert "".join(tokenizer.decode_stream([parts])) == letters


@pytest.mark.parametrize("suffix", ["fa", "fa.gz"])
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_fasta_of_several_sequences_in_blocks_of_any_size(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr("anytoken.tokenizers.dna.base.BLOCK", block)
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
@pytest.mark.timeout(1200)
def test_ten_million_bases_of_real_genomes_come_back_exactly(dna_folder):
    """Genomes of other genera than that of the training genes, where Debian's ragout-examples is installed."""
    root = Path("/usr/share/doc/ragout/examples")
    paths = [path for path in sorted(root.rglob("references/*.fasta.gz")) if "E.Coli" not in path.parts][:8]
    if not paths:
        pytest.skip("ragout-examples is not installed")
    for tokenizer in (load_tokenizer(dna_folder), *TOKENIZERS):
        count = 0
        for path in paths:
            letters = re.sub("[^ACGT]", "N", "".join(piece.upper() for _, _, piece in read_fasta(path)))
            back = (
                text for _, codes in tokenizer.encode_fasta(path) for text in tokenizer.decode_stream(codes)
            )
            assert "".join(back) == letters, (tokenizer.kind, path.name)
            count += len(letters)
        assert count >= 10_000_000


def test_merges_are_learnt_from_training_genes_by_a_recipe(sets, tmp_path):
    recipe = tmp_path / "bpe.yaml"
    recipe.write_text(
        yaml.safe_dump({"kind": "dna_bpe", "config": {"vocab_size": 24}, "data": "dna/genes.jsonl"})
    )
    out = train_tokenizer(recipe, sets, tmp_path / "out")
    loaded = load_tokenizer(out)
    assert loaded.codebook_sizes == (24,) and len(loaded.config["merges"]) == 24 - 5
    letters = bases(900, 8)
    assert loaded.decode(loaded.encode(DNA(letters[:300]))).bases == letters[:300]
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
        (lambda: DNAContextTokenizer(classes=1), "classes is 2 or more.*received 1"),
        (lambda: DNABPETokenizer(5), "the 5 letters and more; received 5"),
    ],
)
def test_sizes_that_cannot_be_are_errors(build, says):
    with pytest.raises(TokenizerError, match=says):
        build()
