"""Sets for tasks on DNA: windows lie where they should, variants do what their label says, motifs are there once."""

import random

import pytest

from anytoken.data.dataset_card import read_lines, write_lines
from anytoken.emoji_world.dna import (
    reverse_complement,
    translate,
)
from anytoken.emoji_world.dna_tasks import MOTIFS, build_dna_tasks, upstream
from anytoken.evaluation.suite.samples import TaskSet
from anytoken.evaluation.suite.schema import load_tasks
from anytoken.segments import Image
from anytoken.utils.errors import DataError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A genome with a gene on each strand, turned away from a stretch of 200 bases between them, many times over."""
    root, rng = tmp_path_factory.mktemp("sets"), random.Random(0)
    codons = [
        a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT" if a + b + c not in ("TAA", "TAG", "TGA")
    ]
    genes, gaps, genome = [], [], ""
    for number in range(40):
        split = "test" if number % 4 == 0 else "train"
        stretch = "".join(rng.choices("ACGT", k=200))
        for strand in (-1, 1):
            bases = (
                "ATG"
                + "".join(rng.choices(codons, k=30))
                + "ATG"
                + "".join(rng.choices(codons, k=30))
                + "TAA"
            )
            if strand == 1:
                gaps.append({"dna": stretch, "start": len(genome), "split": split})
                genome += stretch
            line = {
                "dna": bases,
                "protein": translate(bases)[:-1],
                "product": f"product {number}",
                "short": True,
            }
            genes.append({**line, "start": len(genome), "strand": strand, "split": split})
            genome += bases if strand == 1 else reverse_complement(bases)
    (root / "dna").mkdir()
    write_lines(root / "dna/genes.jsonl", genes)
    write_lines(root / "dna/intergenic.jsonl", gaps)
    build_dna_tasks(root / "dna", root)
    return root, genes, gaps, genome


def test_upstream_bases_end_where_a_gene_starts_on_its_own_strand(built):
    _, genes, gaps, genome = built
    strands = {1: genome, -1: reverse_complement(genome)}
    found = list(upstream(genes, gaps, 50))
    assert len(found) == 80 and {gene["strand"] for _, gene, _ in found} == {1, -1}
    for bases, gene, split in found:
        assert bases + gene["dna"] in strands[gene["strand"]] and split == gene["split"]


def test_windows_are_balanced_and_hold_what_their_label_says(built):
    root, genes, *_ = built
    lines = read_lines(root / "dna_tasks/promoters.jsonl")
    assert [one["label"] for one in lines] == ["promoter", "gene"] * 80
    both = [gene["dna"] for gene in genes] + [reverse_complement(gene["dna"]) for gene in genes]
    assert all(len(one["dna"]) == 80 for one in lines)
    assert all(any(one["dna"] in gene for gene in both) == (one["label"] == "gene") for one in lines)
    for one in read_lines(root / "dna_tasks/starts.jsonl"):
        assert one["dna"][30:33] == "ATG" and len(one["dna"]) == 60
        assert any(one["dna"] in gene["dna"] for gene in genes) == (one["label"] == "inside")


def test_a_variant_differs_in_one_base_and_its_label_says_whether_the_protein_does(built):
    lines = read_lines(built[0] / "dna_tasks/variants.jsonl")
    assert {one["label"] for one in lines} == {0, 1}
    for one in lines:
        before, after = one["reference"], one["variant"]
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert (translate(before) != translate(after)) == bool(one["label"]) and "*" not in translate(after)
        assert any(before in gene["dna"] for gene in built[1] if gene["split"] == one["split"])


def test_a_needle_is_in_its_haystack_once_and_has_its_digit(built):
    folder = built[0] / "dna_tasks"
    lines = read_lines(folder / "needles.jsonl")
    names = list(MOTIFS)
    for one in lines:
        assert [one["dna"].count(motif) for motif in MOTIFS.values()] == [
            int(one["text"] == name) for name in MOTIFS
        ]
        assert one["image"] == f"digits/{names.index(one['text'])}.png" and len(one["dna"]) == 60
    images = [Image.open(folder / f"digits/{digit}.png") for digit in range(4)]
    assert len(set(images)) == 4 and images[0].pixels.min() == 0
    assert len({one["dna"] for one in lines}) == len(lines)


def test_the_same_set_comes_out_again_and_limits_count_per_split(built, tmp_path):
    root = built[0]
    again = build_dna_tasks(root / "dna", tmp_path)
    for path in again.glob("*.jsonl"):
        assert path.read_bytes() == (root / "dna_tasks" / path.name).read_bytes()
    short = read_lines(build_dna_tasks(root / "dna", tmp_path / "short", 3) / "needles.jsonl")
    assert [one["split"] for one in short] == ["train"] * 3 + ["test"] * 3
    with pytest.raises(DataError, match="anytoken data dna"):
        build_dna_tasks(tmp_path, tmp_path)


def test_every_bundled_task_on_dna_finds_its_records(built):
    tasks = load_tasks(["dna"])
    assert len(tasks) == 7
    for task in tasks:
        samples = TaskSet(task, built[0]).samples()
        assert samples and all(one.record["split"] == "test" for one in samples)
        if task.decoding.how == "classify":
            assert {one.truth_label for one in samples} == {0, 1}
