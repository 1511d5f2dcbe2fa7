"""Several tokenizers of one modality side by side, measured on the same held-out items in one run.

`anytoken tokenizer compare runs/tokenizers/dna runs/tokenizers/dna_bpe --data data/sets` prints the table. Two rates
are given: with every code at its full width, and at the entropy of the codes that were found, which is what a model
that knew only how frequent each code is would need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anytoken.evaluation.tokenizers.card import learnability_rows, metric_rows, shown_bar
from anytoken.evaluation.tokenizers.card_samples import Row, number, share, table
from anytoken.evaluation.tokenizers.evaluate import measure
from anytoken.tokenizers.base import TokenizerError


def compare(
    folders: Sequence[str | Path],
    data: str | Path,
    count: int | None = None,
    seed: int = 0,
    genomes: Sequence[Path] = (),
    image: Path | None = None,
    files: str | None = None,
    learnable: bool = False,
) -> dict[str, Any]:
    """The figures of each folder by its name, in order; TokenizerError for tokenizers of different modalities."""
    found = {
        Path(folder).name: measure(folder, data, count, seed, genomes, image, files, learnable).figures
        for folder in folders
    }
    kinds = {figures["kind"] for figures in found.values()}
    if len(found) < len(folders) or len(kinds) != 1:
        raise TokenizerError(
            f"Compare tokenizers of one modality, in folders of different names; received those of "
            f"{', '.join(sorted(kinds))} in {', '.join(map(str, folders))}."
        )
    return found


def comparison(found: dict[str, Any]) -> str:
    """The figures of `compare` as a Markdown table: a line a measure, a column a tokenizer."""
    rows = [[(title, value) for title, *value in _rows(figures)] for figures in found.values()]
    titles = dict.fromkeys(title for column in rows for title, _ in column)
    columns = [dict(column) for column in rows]
    body: list[Row] = [(title, *(column.get(title, [""])[0] for column in columns)) for title in titles]
    return table([("", *found), *body])


def summary(figures: dict[str, Any]) -> list[Row]:
    """One tokenizer's figures as rows of a table, the head first: what comes back beside its baselines, and rates."""
    head, *kept = metric_rows(figures)
    values = {title: columns for title, *columns in kept}
    return [head, *((title, *values.get(title, value)) for title, *value in _rows(figures))]


def _rows(figures: dict[str, Any]) -> list[Row]:
    unit, tokens = figures["unit"], figures["tokens_per_unit"]
    rows: list[Row] = [
        ("tokenizer", figures.get("tokenizer", figures["kind"])),
        ("codebooks", " + ".join(f"{size:,}" for size in figures["codebook_sizes"])),
        (f"codes a {unit}", number(tokens)),
        (f"bits a {unit}", number(figures["bits_per_unit"])),
        (f"bits a {unit} at the codes' entropy", number(tokens * math.log2(figures["code_perplexity"]))),
        *((title, kept) for title, kept, *_ in metric_rows(figures)[1:]),
        *learnability_rows(figures),
        ("codebook usage", share(figures["codebook_usage"])),
        ("perplexity of the codes", number(figures["code_perplexity"])),
    ]
    if "genome_tokens_per_base" in figures:
        rows.append(("codes a base of the genomes", f"{figures['genome_tokens_per_base']:.4f}"))
        rows.append(("bits a base of the genomes", f"{figures['genome_bits_per_base']:.4f}"))
    for verb in ("encode", "decode"):
        rows.append((f"{unit}s a second to {verb}", number(figures[f"{verb}_units_per_second"])))
    for bar in figures.get("bars", []):
        rows.append((f"bar: {bar['what']}", shown_bar(bar)))
    return rows
