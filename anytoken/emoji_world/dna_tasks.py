"""Small sets for tasks on DNA, cut from the genes of the DNA set (`dna.py`) or made up; the same ones every time.

The kinds of tasks are those of Omni-DNA (arXiv 2502.03499): functions of genes, a motif in a haystack that becomes an
image, regulatory sites, effects of variants. Bacteria have no splicing; gene starts, against the same codon inside a
gene, take the place of splice sites. Splits follow those of the genes and stretches that windows are cut from.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from anytoken.data.dataset_card import read_lines, write_card, write_lines
from anytoken.emoji_world.dna import RESIDUES, reverse_complement
from anytoken.segments import Image
from anytoken.utils.errors import DataError

Line = dict[str, Any]
UPSTREAM_NT, SITE_NT = 80, 30
VARIANT_CODONS = 16
HAYSTACK_NT = 60
MOTIFS = {"-10 box": "TATAAT", "-35 box": "TTGACA", "ribosome binding site": "AGGAGG", "EcoRI site": "GAATTC"}
COUNTS = {"train": 2_000, "test": 200}  # of each made-up set
SIDE_PX = 64


def build_dna_tasks(dna: Path, out: Path, limit: int | None = None) -> Path:
    """Build OUT/dna_tasks from the built DNA set; returns the folder. DataError if that set is not there.

    promoters.jsonl, starts.jsonl: windows with a label. variants.jsonl: pieces of genes with one base changed, 1 if
    that changes the protein. needles.jsonl: random DNA with one motif, and its digit as an image. limit: lines of a
    split.
    """
    for name in ("genes.jsonl", "intergenic.jsonl"):
        if not (dna / name).is_file():
            raise DataError(f"{dna / name} is missing: build the DNA set with `anytoken data dna` first.")
    genes, gaps = read_lines(dna / "genes.jsonl"), read_lines(dna / "intergenic.jsonl")
    folder = Path(out) / "dna_tasks"
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    for digit in range(len(MOTIFS)):
        draw_digit(digit).save(folder / "digits" / f"{digit}.png")
    sets = {
        "promoters": promoters(genes, gaps), "starts": starts(genes, gaps), "variants": variants(genes),
        "needles": needles(),
    }  # fmt: skip
    for name, lines in sets.items():
        write_lines(folder / f"{name}.jsonl", _limited(lines, limit))
    about = (
        "Tasks on DNA, cut from the genes of E. coli K-12 MG1655 (promoters, starts, variants) or random (needles). "
        'A "promoter" is the stretch before a gene, where its promoter usually lies; none was verified.'
    )
    write_card(folder, "Tasks on DNA", about, {"sources": []})
    return folder


def _limited(lines: Iterator[Line], limit: int | None) -> Iterator[Line]:
    seen = {"train": 0, "test": 0}
    for line in lines:
        seen[line["split"]] += 1
        if limit is None or seen[line["split"]] <= limit:
            yield line


def upstream(genes: Sequence[Line], gaps: Sequence[Line], length: int) -> Iterator[tuple[str, Line, str]]:
    """Bases before genes, on the gene's own strand, with the gene and the split of the stretch they lie in."""
    starting = {one["start"]: one for one in genes if one["strand"] == 1}
    ending = {one["start"] + len(one["dna"]): one for one in genes if one["strand"] == -1}
    for gap in gaps:
        bases, start = gap["dna"], gap["start"]
        if len(bases) < length:
            continue
        if gene := starting.get(start + len(bases)):
            yield bases[-length:], gene, gap["split"]
        if gene := ending.get(start):
            yield reverse_complement(bases[:length]), gene, gap["split"]


def promoters(genes: Sequence[Line], gaps: Sequence[Line]) -> Iterator[Line]:
    """Stretches before genes ("promoter") and as many windows from inside genes ("gene"), on either strand."""
    rng = random.Random(0)
    inside = {split: [one["dna"] for one in genes if one["split"] == split and len(one["dna"]) > UPSTREAM_NT]
              for split in COUNTS}  # fmt: skip
    for bases, _, split in upstream(genes, gaps, UPSTREAM_NT):
        if not inside[split]:
            continue
        gene = rng.choice(inside[split])
        start = rng.randrange(len(gene) - UPSTREAM_NT + 1)
        other = gene[start : start + UPSTREAM_NT]
        other = other if rng.random() < 0.5 else reverse_complement(other)
        yield {"dna": bases, "label": "promoter", "split": split}
        yield {"dna": other, "label": "gene", "split": split}


def starts(genes: Sequence[Line], gaps: Sequence[Line]) -> Iterator[Line]:
    """Windows around ATG: where a gene starts ("start"), and in frame inside a gene ("inside"); as many of each."""
    rng = random.Random(1)
    decoys: dict[str, list[str]] = {split: [] for split in COUNTS}
    for gene in genes:
        bases = gene["dna"]
        places = [
            place for place in range(SITE_NT, len(bases) - SITE_NT, 3) if bases[place : place + 3] == "ATG"
        ]
        if places:
            place = rng.choice(places)
            decoys[gene["split"]].append(bases[place - SITE_NT : place + SITE_NT])
    for before, gene, _ in upstream(genes, gaps, SITE_NT):
        split = gene["split"]
        if gene["dna"].startswith("ATG") and len(gene["dna"]) >= SITE_NT and decoys[split]:
            yield {"dna": before + gene["dna"][:SITE_NT], "label": "start", "split": split}
            yield {"dna": rng.choice(decoys[split]), "label": "inside", "split": split}


def variants(genes: Sequence[Line]) -> Iterator[Line]:
    """In-frame pieces of genes and the same with one base changed: label 0 keeps the protein, 1 changes a residue.

    One of each kind by turns; a change to a stop codon is not made.
    """
    rng = random.Random(2)
    for split, count in COUNTS.items():
        mine = [
            one["dna"]
            for one in genes
            if one["split"] == split and len(one["dna"]) > 3 * (VARIANT_CODONS + 2)
        ]
        number = 0
        while mine and number < count:
            gene = rng.choice(mine)
            first = rng.randint(1, len(gene) // 3 - VARIANT_CODONS - 1)  # no start and no stop codon
            piece = gene[3 * first : 3 * (first + VARIANT_CODONS)]
            changed = _change(rng, piece, synonymous=number % 2 == 0)
            if changed is not None:
                yield {"reference": piece, "variant": changed, "label": number % 2, "split": split}
                number += 1


def _change(rng: random.Random, piece: str, synonymous: bool) -> str | None:
    """A piece with one base changed; None if the drawn codon has no such change."""
    codon = 3 * rng.randrange(len(piece) // 3)
    before = piece[codon : codon + 3]
    options = []
    for place in range(3):
        for base in "ACGT":
            after = before[:place] + base + before[place + 1 :]
            residue = RESIDUES.get(after, "*")
            if after != before and residue != "*" and (residue == RESIDUES.get(before)) == synonymous:
                options.append(after)
    return piece[:codon] + rng.choice(options) + piece[codon + 3 :] if options else None


def needles() -> Iterator[Line]:
    """Random bases with exactly one motif, on the forward strand; its name is the text, its number the image."""
    rng = random.Random(3)
    names = list(MOTIFS)
    for split, count in COUNTS.items():
        for number in range(count):
            name = names[number % len(names)]
            motif = MOTIFS[name]
            while True:
                bases = "".join(rng.choices("ACGT", k=HAYSTACK_NT - len(motif)))
                place = rng.randint(0, len(bases))
                whole = bases[:place] + motif + bases[place:]
                if sum(whole.count(one) for one in MOTIFS.values()) == 1:
                    break
            digit = names.index(name)
            yield {"dna": whole, "image": f"digits/{digit}.png", "text": name, "digit": digit, "split": split}


def draw_digit(digit: int) -> Image:
    """A black digit on white, 64x64."""
    canvas = PILImage.new("RGB", (SIDE_PX, SIDE_PX), "white")
    font = ImageFont.load_default(size=48)
    ImageDraw.Draw(canvas).text((SIDE_PX / 2, SIDE_PX / 2), str(digit), fill="black", font=font, anchor="mm")
    return Image(np.array(canvas))
