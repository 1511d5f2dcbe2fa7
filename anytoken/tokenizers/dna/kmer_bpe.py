"""K-mers and byte-pair encoding of DNA, the baselines of the learned tokenizer, with its interface.

    dna_kmer   windows of k letters of A C G T, one code each (DNABERT, bioRxiv 2020.09.17.301879, in the form of the
               Nucleotide Transformer, whose windows do not overlap), single letters where a window does not fit
    dna_bpe    frequent pieces of the training genes (DNABERT-2, arXiv 2306.15006)

Both are lossless on A C G T N by construction: the single letters are codes too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, trainers

from anytoken.tokenizers.base import CodeSequence, TokenizerError, register_modality
from anytoken.tokenizers.dna.base import (
    LETTERS,
    MAX_TOKENS,
    DNATokenizerBase,
    N,
    to_bases,
    to_symbols,
    training_genes,
)

PIECE = 1_200  # letters that are merged together; a longer sequence is cut into pieces of these
LONGEST = 32  # letters of a BPE code at most: repeats would else become codes of their own


@register_modality
class DNAKmerTokenizer(DNATokenizerBase):
    """4^k codes for windows of k letters, then one for each of A C G T N."""

    kind = "dna_kmer"

    def __init__(self, k: int = 4) -> None:
        if not 1 <= k <= 8:
            raise TokenizerError(f"k is 1 to 8, for 4 to 65,536 windows; received {k}.")
        super().__init__(
            shape=CodeSequence(1, MAX_TOKENS), codebook_sizes=[4**k + len(LETTERS)], config={"k": k}
        )
        self.k = k
        self._places = 4 ** np.arange(k - 1, -1, -1)

    def fit(self, source: Path, seed: int) -> None:
        """Nothing to learn: all windows have codes."""

    def _windows(self, symbols: np.ndarray) -> np.ndarray:
        """Where windows begin: each at the first letter after the last window, if k letters without N follow."""
        edges = np.concatenate([[-1], np.flatnonzero(symbols == N), [len(symbols)]])
        counts = (np.diff(edges) - 1) // self.k
        runs = [
            start + 1 + self.k * np.arange(count)
            for start, count in zip(edges, counts, strict=False)
            if count
        ]
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)

    def _lookup_all(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        # An N between two keeps windows apart.
        joined = np.concatenate([part for one in sequences for part in (one, [N])]).astype(np.uint8)
        starts = self._windows(joined)
        codes = 4**self.k + joined.astype(np.int64)
        inside = starts[:, None] + np.arange(self.k)
        codes[starts] = joined[inside] @ self._places
        keep = np.ones(len(joined), dtype=bool)
        keep[inside[:, 1:]] = False
        ends = keep.cumsum()[np.cumsum([len(one) + 1 for one in sequences]) - 1].tolist()
        found = codes[keep]
        return [found[start : stop - 1] for start, stop in pairwise([0, *ends])]

    def _spelled(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        letters = (codes[:, None] // self._places) % 4
        single = codes >= 4**self.k
        letters[single, 0] = codes[single] - 4**self.k
        keep = np.ones(letters.shape, dtype=bool)
        keep[single, 1:] = False
        return letters, keep

    def _whole(self, symbols: np.ndarray) -> int:
        after_n = int(np.flatnonzero(symbols == N)[-1]) + 1 if (symbols == N).any() else 0
        return after_n + (len(symbols) - after_n) // self.k * self.k


@register_modality
class DNABPETokenizer(DNATokenizerBase):
    """Frequent pieces of the training genes, at most 32 letters long; the merges are in `config`."""

    kind = "dna_bpe"

    def __init__(self, vocab_size: int = 256, merges: Sequence[str] = ()) -> None:
        if vocab_size < len(LETTERS) + 1:
            raise TokenizerError(
                f"A vocabulary has the {len(LETTERS)} letters and more; received {vocab_size}."
            )
        config = {"vocab_size": vocab_size, "merges": []}
        super().__init__(shape=CodeSequence(1, MAX_TOKENS), codebook_sizes=[vocab_size], config=config)
        self._set_merges(list(merges))

    def _set_merges(self, merges: list[str]) -> None:
        pieces = [*LETTERS, *(merge.replace(" ", "") for merge in merges)]
        missing = self.config["vocab_size"] - len(pieces)
        if missing < 0:
            raise TokenizerError(f"{len(merges)} merges do not fit into {self.config['vocab_size']} codes.")
        vocabulary = {piece: code for code, piece in reversed(list(enumerate(pieces)))}
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        self.config["merges"] = merges
        self._bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        pieces += ["N"] * missing  # codes without a learned merge: every code decodes
        self._lengths = np.array([len(piece) for piece in pieces])
        self._symbols = np.full((len(pieces), self._lengths.max()), N, dtype=np.uint8)
        for row, piece in zip(self._symbols, pieces, strict=True):
            row[: len(piece)] = to_symbols(piece)

    def fit(self, source: Path, seed: int) -> None:
        """Learn merges from the training genes of a JSON lines file with `dna` and `split`."""
        genes = [to_bases(gene) for gene in training_genes(source)]
        pieces = [gene[i : i + PIECE] for gene in genes for i in range(0, len(gene), PIECE)]
        trainer = trainers.BpeTrainer(
            vocab_size=self.config["vocab_size"], initial_alphabet=list(LETTERS), show_progress=False,
            max_token_length=LONGEST,
        )  # fmt: skip
        learner = Tokenizer(models.BPE())
        learner.train_from_iterator(pieces, trainer)
        self._set_merges([" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]])

    def _lookup_all(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        texts = [to_bases(one) for one in sequences]
        starts = [range(0, len(text), PIECE) for text in texts]
        pieces = [text[i : i + PIECE] for text, each in zip(texts, starts, strict=True) for i in each]
        codes = iter([np.array(one.ids, dtype=np.int64) for one in self._bpe.encode_batch(pieces)])
        return [np.concatenate([next(codes) for _ in each]) for each in starts]

    def _spelled(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._symbols[codes], np.arange(self._symbols.shape[1]) < self._lengths[codes, None]

    def _whole(self, symbols: np.ndarray) -> int:
        return len(symbols) // PIECE * PIECE
