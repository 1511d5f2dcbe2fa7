"""DNA metrics: exact reconstruction is checked letter by letter, on genes and on whole genomes.

The genomes are of genera outside the training data: those next to the training genome in the package the set was
built from, or the million bases that the set holds.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anytoken.segments import DNA, Segment
from anytoken.tokenizers.dna.base import DNATokenizerBase, read_fasta, to_bases, to_symbols
from anytoken.tokenizers.dna.context import DNAContextTokenizer
from anytoken.tokenizers.dna.vq import DNATokenizer

TRAINED_ON = "E.Coli"  # the folder of the training genus
EXAMPLES = "usr/share/doc/ragout/examples"
REFERENCES = "*/references/*.fasta.gz"


def untrained_genomes(data: Path) -> list[Path]:
    """Genomes of other genera than the training genes', from the package that the set in `data` was built from where
    it is still next to the set; else the piece of one that the set holds, or none.
    """
    found = [
        path
        for path in sorted(data.glob(f"packages/*/{EXAMPLES}/{REFERENCES}"))
        if TRAINED_ON not in path.parts
    ]
    return found or [path for path in [data / "dna" / "genome_test.fa.gz"] if path.is_file()]


def exact(segments: Sequence[Segment], outputs: Sequence[Segment]) -> float:
    """Share of items that are reconstructed exactly."""
    pairs = zip(segments, outputs, strict=True)
    return float(
        np.mean([isinstance(a, DNA) and isinstance(b, DNA) and a.bases == b.bases for a, b in pairs])
    )


def other_letters(tokenizer: DNATokenizerBase, segments: Sequence[Segment]) -> dict[str, float]:
    """Shares of items that are decoded as documented after some of their letters are changed.

    with_n_exact: a tenth of the letters made N; they stay N. lower_case_as_upper: the lower-case sequence is
    decoded in upper case. other_iupac_as_n: A written as R is decoded as N.
    """
    bases = [one.bases for one in segments if isinstance(one, DNA)]

    def share(change: Callable[[str], str], expected: Callable[[str], str]) -> float:
        # Streamed, since N may take more codes than a segment holds.
        back = ["".join(tokenizer.decode_stream(tokenizer.encode_stream([change(one)]))) for one in bases]
        return float(np.mean([expected(one) == other for one, other in zip(bases, back, strict=True)]))

    def with_n(one: str) -> str:
        return "".join("N" if i % 10 == 9 else base for i, base in enumerate(one))

    own: dict[str, float] = {}
    if isinstance(tokenizer, DNATokenizer):
        own = {"windows_lost": len(tokenizer.verify().wrong)}
    elif isinstance(tokenizer, DNAContextTokenizer):
        own = tokenizer.context_bits(segments)
    return own | {
        "with_n_exact": share(with_n, with_n),
        "lower_case_exact": share(str.lower, str.lower),
        "lower_case_as_upper": share(str.lower, str),
        "other_iupac_as_n": share(lambda one: one.replace("A", "R"), lambda one: one.replace("A", "N")),
    }


def stream_genomes(tokenizer: DNATokenizerBase, paths: Sequence[Path]) -> dict[str, Any]:
    """Genomes through the streaming interface, in constant memory: exactness, number of codes, speed.

    Exact: the letters, upper case, U as T and what is none of A C G T as N, have one sha256 before and after.
    genome_counts: how often each code stands in them, int64 [K], for `usage`.
    """
    bases = 0
    counts = np.zeros(tokenizer.codebook_sizes[0], dtype=np.int64)
    exact, encoding, decoding = True, 0.0, 0.0
    for path in paths:
        wanted, found = hashlib.sha256(), hashlib.sha256()
        for _, _, piece in read_fasta(path):
            wanted.update(to_bases(to_symbols(piece)).encode())
            bases += len(piece)
        clock = time.perf_counter()
        for _, stream in tokenizer.encode_fasta(path):
            for codes in stream:
                middle = time.perf_counter()
                (letters,) = tokenizer.decode_stream([codes])
                found.update(letters.encode())
                encoding, decoding = encoding + middle - clock, decoding + time.perf_counter() - middle
                counts += np.bincount(codes, minlength=len(counts))
                clock = time.perf_counter()
        exact = exact and wanted.digest() == found.digest()
    return {
        "genome_bases": bases,
        "genome_exact": exact,
        "genome_files": [path.name for path in paths],
        "genome_tokens_per_base": counts.sum() / bases,
        "genome_bits_per_base": counts.sum() / bases * math.log2(len(counts)),
        "genome_counts": counts,
        "stream_encode_bases_per_second": bases / encoding,
        "stream_decode_bases_per_second": bases / decoding,
    }
