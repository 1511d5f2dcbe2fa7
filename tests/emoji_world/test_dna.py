"""Genes planted in a synthetic genome on both strands are found, all and only; what is cut from them is true."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytoken.data.dataset_card import checksums, read_lines
from anytoken.emoji_world import dna
from anytoken.emoji_world.dna import (
    Gene,
    build_dna,
    fragments,
    intergenic,
    locate,
    read_proteins,
    reverse_complement,
    translate,
    windows,
)
from anytoken.emoji_world.splits import gene_split, stretch_split
from anytoken.segments import DNA
from anytoken.utils.errors import DataError

CODONS = {  # genetic code 11, as textbooks group it
    "A": "GCT GCC GCA GCG",
    "C": "TGT TGC",
    "D": "GAT GAC",
    "E": "GAA GAG",
    "F": "TTT TTC",
    "G": "GGT GGC GGA GGG",
    "H": "CAT CAC",
    "I": "ATT ATC ATA",
    "K": "AAA AAG",
    "L": "TTA TTG CTT CTC CTA CTG",
    "M": "ATG",
    "N": "AAT AAC",
    "P": "CCT CCC CCA CCG",
    "Q": "CAA CAG",
    "R": "CGT CGC CGA CGG AGA AGG",
    "S": "TCT TCC TCA TCG AGT AGC",
    "T": "ACT ACC ACA ACG",
    "V": "GTT GTC GTA GTG",
    "W": "TGG",
    "Y": "TAT TAC",
    "*": "TAA TAG TGA",
}
STARTS = ("ATG", "GTG", "TTG", "CTG", "ATT", "ATC", "ATA")
PRODUCTS = [  # two of them are of the test split
    "elongation factor Tu",
    "aminopeptidase N",
    "RNase R",
    "fucose:H+ symporter",
    "DNA helicase IV",
    "putative ATPase",
]
bases = st.text("ACGT", max_size=120)


@dataclass
class World:
    """A genome, what stands in it, and the proteins to look for."""

    genome: str
    genes: list[Gene]
    proteins: dict[str, str]


def spell(rng: random.Random, residues: str) -> str:
    return "".join(rng.choice(CODONS[one].split()) for one in residues)


def make_world(seed: int = 0, count: int = 60) -> World:
    """Genes of 30 to 90 residues with every kind of start codon, on both strands, 20 to 400 random bases apart."""
    rng = random.Random(seed)
    genome, genes, proteins = "", [], {}
    for number in range(count):
        protein = "M" + "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(29, 89)))
        product = PRODUCTS[number % len(PRODUCTS)]
        gene = STARTS[number % 7] + spell(rng, protein[1:] + "*")
        strand = rng.choice((1, -1))
        if number:  # the first stands at the very start of the genome, the last at its very end
            genome += "".join(rng.choices("ACGT", k=rng.randint(20, 400)))
        genes.append(Gene(gene, protein, product, len(genome), strand))
        genome += gene if strand == 1 else reverse_complement(gene)
        proteins[protein] = product
    return World(genome, genes, proteins)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def gaps(world: World) -> list[dict[str, Any]]:
    return list(intergenic(world.genome, world.genes))


# ---- the code ----


def test_all_64_codons() -> None:
    known = {codon: residue for residue, codons in CODONS.items() for codon in codons.split()}
    assert len(known) == 64
    assert {codon: translate(codon) for codon in known} == known
    assert frozenset(STARTS) == dna.STARTS


def test_translate_reads_whole_codons_only() -> None:
    assert translate("ATGACCATGATTACGGATTCACTGGCCGTCGTTTTACAACGT") == "MTMITDSLAVVLQR"  # lacZ
    assert translate("ATGACCAT") == "MT" and translate("AT") == translate("") == ""
    assert translate("ATGANCTAA") == "MX*" and translate("augAAA") == "MK"
    assert translate("GTGTTGCTG") == "VLL"  # inside a gene these are no starts


def test_reverse_complement_of_known_strands() -> None:
    assert reverse_complement("ATGC") == "GCAT"
    assert reverse_complement("GAATTC") == "GAATTC"  # EcoRI's site is its own
    assert reverse_complement("AACNT") == "ANGTT"


@given(bases, bases)
def test_reverse_complement_turns_back(left: str, right: str) -> None:
    assert reverse_complement(reverse_complement(left)) == left
    assert reverse_complement(left + right) == reverse_complement(right) + reverse_complement(left)


# ---- locating ----


def test_the_planted_genes_are_found_and_no_other(world: World) -> None:
    absent = {"M" + "".join(reversed(protein[1:])): "not there" for protein in world.proteins}
    assert list(locate(world.genome, absent | world.proteins)) == world.genes
    assert {gene.strand for gene in world.genes} == {1, -1}
    assert {gene.dna[:3] for gene in world.genes} == set(STARTS)


def test_the_other_strand_holds_the_same_genes(world: World) -> None:
    turned = list(locate(reverse_complement(world.genome), world.proteins))
    assert [(one.dna, -one.strand, len(world.genome) - one.start - len(one.dna)) for one in turned] == [
        (one.dna, one.strand, one.start) for one in world.genes
    ]


def test_a_gene_that_stands_twice_is_found_twice(world: World) -> None:
    gene = world.genes[3]
    genome = world.genome + "TTTTT" + reverse_complement(gene.dna)
    found = [one for one in locate(genome, world.proteins) if one.protein == gene.protein]
    assert sorted((one.start, one.strand) for one in found) == [
        (gene.start, gene.strand),
        (len(world.genome) + 5, -1),
    ]


def test_genes_may_overlap() -> None:
    """As many operons have it: the stop codon of one shares bases with the start codon of the next."""
    first, second = "MKWVTFISLLFLFSSAYSK", "MTRNHDCCEEFFGGHHIIK"
    one = "ATG" + spell(random.Random(0), first[1:-1]) + "AAATGA"
    two = one[-4:] + "CA" + spell(random.Random(1), second[2:] + "*")
    genome = "CCCCC" + one + two[4:]
    proteins = {first: "a", second: "b"}
    found = list(locate(genome, proteins))
    assert [(gene.start, gene.protein) for gene in found] == [(5, first), (5 + len(one) - 4, second)]


@pytest.mark.parametrize(
    ("start", "stop", "protein", "places"),
    [
        ("ATG", "TAA", "MKWVTFISLLFLFSSA", 1),
        ("ATG", "TAA", "MKWVTFISLLFL", 0),  # as long as a key: too short to tell
        ("ACG", "TAA", "MKWVTFISLLFLFSSA", 0),  # no start codon stands there
        ("TAA", "TAA", "MKWVTFISLLFLFSSA", 0),  # the stretch begins too late
        ("ATG", "CAA", "MKWVTFISLLFLFSSA", 0),  # it goes on
        ("ATG", "", "MKWVTFISLLFLFSSA", 0),  # the genome ends before a stop codon
        ("ATG", "TAA", "AKWVTFISLLFLFSSA", 0),  # no protein as the database has them
    ],
)
def test_what_counts_as_a_gene(start: str, stop: str, protein: str, places: int) -> None:
    genome = "TAACC" + start + spell(random.Random(0), protein[1:]) + stop
    for text in (genome, reverse_complement(genome)):
        assert len(list(locate(text, {protein: "it"}))) == places


def test_a_start_before_the_genome_is_none() -> None:
    protein = "MKWVTFISLLFLFSSA"
    for cut in (1, 2, 3):
        genome = ("ATG" + spell(random.Random(0), protein[1:]) + "TAA")[cut:]
        assert list(locate(genome + "ATG", {protein: "it"})) == []


# ---- between the genes ----


def test_no_stretch_between_touches_a_gene(world: World, gaps: list[dict[str, Any]]) -> None:
    covered = np.zeros(len(world.genome), dtype=bool)
    for gene in world.genes:
        covered[gene.start : gene.start + len(gene.dna)] = True
    assert len(gaps) > 20
    for gap in gaps:
        place = slice(gap["start"], gap["start"] + len(gap["dna"]))
        assert world.genome[place] == gap["dna"] and not covered[place].any()
        assert covered[place.start - 1] and covered[place.stop]  # from gene to gene
        assert gap["split"] == stretch_split(gap["start"])


def test_stretches_of_60_to_1000_bases() -> None:
    lengths, genome, genes = (59, 60, 1000, 1001, 0), "", []
    for length in lengths:
        genome += "T" * length
        genes.append(Gene("ATGTAA", "M", "it", len(genome), 1))
        genome += "ATGTAA"
    nested = Gene("TGT", "", "inside another", genes[1].start + 1, -1)
    assert [len(one["dna"]) for one in intergenic(genome, [nested, *reversed(genes)])] == [60, 1000]


# ---- lines ----


def test_fragments_are_in_frame_and_translate_to_their_text(world: World) -> None:
    lines = list(fragments(world.genes, limit=300))
    splits_of: dict[str, str] = {}
    for line in lines:
        count = len(line["dna"]) // 3
        assert len(line["dna"]) % 3 == 0 and 6 <= count <= 16
        assert line["text"] == " ".join(translate(line["dna"]))
        homes = [gene for gene in world.genes if in_frame(line["dna"], gene)]
        assert homes and {gene.split for gene in homes} == {line["split"]}
        assert line["holdout"] == ("product" if line["split"] == "test" else None)
        splits_of.setdefault(line["dna"], line["split"])
    assert len(splits_of) == len(lines)  # no piece twice, so none in both splits
    assert [line["split"] for line in lines].count("train") == 300
    assert any(line["text"].endswith("*") for line in lines)


def in_frame(piece: str, gene: Gene) -> bool:
    return any(gene.dna[i : i + len(piece)] == piece for i in range(0, len(gene.dna), 3))


def test_a_start_codon_other_than_atg_is_in_no_fragment() -> None:
    """There it stands for M, which its text would not say."""
    genes = [Gene(start + "GCA" * 17 + "TAA", "M" + "A" * 17, PRODUCTS[0], 0, 1) for start in ("GTG", "ATG")]
    texts = {line["text"] for line in fragments(genes)}
    assert any(text.startswith("M A") for text in texts) and not any("V" in text for text in texts)


def test_a_piece_of_two_genes_stays_in_one_split() -> None:
    body = spell(random.Random(0), "MKWVTFISLLFLFSSAYSRGV*")
    genes = [Gene(body, "MKWVTFISLLFLFSSAYSRGV", product, 0, 1) for product in ("RNase R", "putative ATPase")]
    assert [gene.split for gene in genes] == ["test", "train"]
    pieces = [line["dna"] for line in fragments(genes, limit=60)]
    assert len(set(pieces)) == len(pieces)


def test_few_genes_give_few_fragments() -> None:
    """The one gene has 22 codons, so 17 + 16 + ... + 7 pieces; none is made up and the drawing ends."""
    body = spell(random.Random(0), "MKWVTFISLLFLFSSAYSRGV*")
    lines = list(fragments([Gene(body, translate(body)[:-1], "RNase R", 0, 1)]))
    assert len({line["dna"] for line in lines}) == len(lines) == sum(range(7, 18))


def test_windows_are_balanced_in_number_and_length(world: World, gaps: list[dict[str, Any]]) -> None:
    lines = list(windows(world.genes, gaps, limit=80))
    for split in ("train", "test"):
        mine = [line for line in lines if line["split"] == split]
        lengths = {
            text: [len(line["dna"]) for line in mine if line["text"] == text]
            for text in ("coding", "not coding")
        }
        assert lengths["coding"] == lengths["not coding"] and len(lengths["coding"]) == 40
        assert all(48 <= length <= 144 and length % 3 == 0 for length in lengths["coding"])
        assert len(set(lengths["coding"])) > 10


def test_windows_are_cut_from_their_own_split(world: World, gaps: list[dict[str, Any]]) -> None:
    turned = 0
    for line in windows(world.genes, gaps, limit=80):
        if line["text"] == "coding":
            assert {gene.split for gene in world.genes if in_frame(line["dna"], gene)} == {line["split"]}
            continue
        strands = (line["dna"], reverse_complement(line["dna"]))
        homes = {gap["split"] for gap in gaps for strand in strands if strand in gap["dna"]}
        assert homes == {line["split"]}
        turned += not any(line["dna"] in gap["dna"] for gap in gaps)
    assert 20 < turned < 60  # half of what is between is read on the other strand


# ---- packages and the whole build ----


def test_proteins_have_the_product_of_their_first_header(tmp_path: Path) -> None:
    (tmp_path / "db").write_text(
        ">A 1.1.1.1~~~abc~~~first product\nMKV\nLAA\n>B ~~~~~~second product\nMKVLAA\n>C ~~~c~~~\nMMM\n"
        ">D ~~~d~~~ putative ATPase \nMTT\n>E ~~~e~~~5'->3' exonuclease\nMEE\n"
    )
    found = {"MKVLAA": "first product", "MTT": "putative ATPase", "MEE": "5'->3' exonuclease"}
    assert read_proteins(tmp_path / "db") == found
    with pytest.raises(DataError, match="other is missing"):
        read_proteins(tmp_path / "other")


def make_packages(cache: Path, world: World) -> Path:
    """The two Debian packages in miniature, unpacked beside their archives."""
    genomes = cache / "ragout-examples_2.3-4_all.unpacked"
    prokka = cache / "prokka_1.14.6+dfsg-4_amd64.unpacked"
    for folder in (genomes, prokka):
        folder.mkdir(parents=True)
        folder.with_suffix(".deb").write_text(f"stands for {folder.stem}")
    for path, text in ((dna.TRAIN_GENOME, world.genome.lower()), (dna.TEST_GENOME, "ACGT" * 50)):
        (genomes / path).parent.mkdir(parents=True)
        DNA(text, "a chromosome").save(genomes / path)
    (prokka / dna.PROTEINS).parent.mkdir(parents=True)
    records = (
        f">ID ~~~gene~~~{product}\n{protein[:60]}\n{protein[60:]}\n"
        for protein, product in world.proteins.items()
    )
    (prokka / dna.PROTEINS).write_text("".join(records))
    return cache


def test_build(world: World, tmp_path: Path, gaps: list[dict[str, Any]]) -> None:
    cache = make_packages(tmp_path / "packages", world)
    folder = build_dna(tmp_path / "sets", cache=cache, limit=50, progress=False)
    assert folder == tmp_path / "sets" / "dna"
    genes = read_lines(folder / "genes.jsonl")
    assert len(genes) == 50
    for line, gene in zip(genes, world.genes, strict=False):
        assert (line["dna"], line["protein"], line["start"], line["strand"]) == (
            gene.dna,
            gene.protein,
            gene.start,
            gene.strand,
        )
        assert line["short"] and line["split"] == gene_split(line["product"])
    assert read_lines(folder / "intergenic.jsonl") == gaps[:50]
    counts = {
        name: [line["split"] for line in read_lines(folder / f"{name}.jsonl")]
        for name in ("translate", "coding")
    }
    assert all(found.count("train") == found.count("test") == 50 for found in counts.values())
    rows = gzip.decompress((folder / "genome_test.fa.gz").read_bytes()).decode().splitlines()
    assert rows[0] == ">V. cholerae O395" and [len(row) for row in rows[1:]] == [70, 70, 60]
    assert "".join(rows[1:]) == "ACGT" * 50
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["genes"] == 60 and manifest["intergenic"] == len(gaps)
    assert [one["name"] for one in manifest["sources"]] == ["ragout-examples", "prokka"]
    assert all(len(one["sha256"]) == 64 for one in manifest["sources"])
    assert manifest["files"]["translate.jsonl"] == {"lines": 100, "test": 50}


def test_the_same_packages_give_the_same_bytes(world: World, tmp_path: Path) -> None:
    cache = make_packages(tmp_path / "packages", world)
    first, second = (
        build_dna(tmp_path / name, cache=cache, limit=30, progress=False) for name in ("one", "two")
    )
    assert checksums(first) == checksums(second) and len(checksums(first)) == 5
    before = checksums(first)
    (first / "translate.jsonl").unlink()
    (first / "genes.jsonl").write_text("damaged")
    assert checksums(build_dna(tmp_path / "one", cache=cache, limit=30, progress=False)) == before


def test_packages_that_are_not_what_was_pinned_are_refused(world: World, tmp_path: Path) -> None:
    strangers = World(world.genome, [], {"M" + "W" * 40: "not there"})
    cache = make_packages(tmp_path / "packages", strangers)
    with pytest.raises(DataError, match="No protein was located"):
        build_dna(tmp_path / "sets", cache=cache, progress=False)
    (cache / "prokka_1.14.6+dfsg-4_amd64.unpacked" / dna.PROTEINS).unlink()
    with pytest.raises(DataError, match="Escherichia is missing"):
        build_dna(tmp_path / "sets", cache=cache, progress=False)
    assert not list((tmp_path / "sets").rglob("*.jsonl"))
