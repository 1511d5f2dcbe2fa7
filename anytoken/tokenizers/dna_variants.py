"""K-mers and byte-pair encoding of DNA, with the interface of the learned tokenizer: what it is to be compared with.

    dna_kmer   windows of k letters of A C G T, one code each (DNABERT, bioRxiv 2020.09.17.301879, in the form of the
               Nucleotide Transformer, whose windows do not overlap), single letters where a window does not fit
    dna_bpe    frequent pieces of the training genes (DNABERT-2, arXiv 2306.15006)

Both are lossless on A C G T N by construction: the single letters are codes too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, trainers

from anytoken.tokenizers.base import Run, TokenizerError, register_modality
from anytoken.tokenizers.dna_letters import LETTERS, MAX_TOKENS, DNALetters, N, to_bases, to_symbols

PIECE = 1_200  # letters that are merged together; a longer sequence is cut into pieces of these
LONGEST = 32  # letters of a BPE code at most: repeats would else become codes of their own


@register_modality
class DNAKmerTokenizer(DNALetters):
    """4^k codes for windows of k letters, then one for each of A C G T N."""

    kind = "dna_kmer"

    def __init__(self, k: int = 4) -> None:
        if not 1 <= k <= 8:
            raise TokenizerError(f"k is 1 to 8, for 4 to 65,536 windows; received {k}.")
        super().__init__(shape=Run(1, MAX_TOKENS), codebook_sizes=[4**k + len(LETTERS)], config={"k": k})
        self.k = k
        self._places = 4 ** np.arange(k - 1, -1, -1)

    def fit(self, source: Path, seed: int) -> None:
        """Nothing is learnt: all windows are there."""

    def _windows(self, symbols: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Where windows begin: each at the first letter that is in none yet, if k letters without N follow."""
        unknown = np.flatnonzero(symbols == N)
        starts = np.sort(np.concatenate([[0], unknown + 1, ends[:-1]]))
        counts = (np.sort(np.concatenate([unknown, ends])) - starts) // self.k
        before = counts.cumsum() - counts
        return np.repeat(starts - self.k * before, counts) + self.k * np.arange(counts.sum())

    def _lookup_all(self, symbols: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = lengths.cumsum()
        starts = self._windows(symbols, ends)
        codes = 4**self.k + symbols.astype(np.int64)
        inside = starts[:, None] + np.arange(self.k)
        codes[starts] = symbols[inside] @ self._places
        keep = np.ones(len(symbols), dtype=bool)
        keep[inside[:, 1:]] = False
        kept = np.concatenate([[0], keep.cumsum()])
        return codes[keep], kept[ends] - kept[ends - lengths]

    def _spell(self, codes: np.ndarray) -> str:
        letters = (codes[:, None] // self._places) % 4
        single = codes >= 4**self.k
        letters[single, 0] = codes[single] - 4**self.k
        keep = np.ones(letters.shape, dtype=bool)
        keep[single, 1:] = False
        return to_bases(letters[keep])

    def _num_letters(self, codes: np.ndarray) -> np.ndarray:
        return np.where(codes < 4**self.k, self.k, 1)

    def _whole(self, symbols: np.ndarray) -> int:
        after_n = int(np.flatnonzero(symbols == N)[-1]) + 1 if (symbols == N).any() else 0
        return after_n + (len(symbols) - after_n) // self.k * self.k


@register_modality
class DNABPETokenizer(DNALetters):
    """Pieces of the genes that were learnt from, at most 32 letters long; the merges are in `config`."""

    kind = "dna_bpe"

    def __init__(self, vocab_size: int = 256, merges: Sequence[str] = ()) -> None:
        if vocab_size < len(LETTERS) + 1:
            raise TokenizerError(
                f"A vocabulary has the {len(LETTERS)} letters and more; received {vocab_size}."
            )
        config = {"vocab_size": vocab_size, "merges": []}
        super().__init__(shape=Run(1, MAX_TOKENS), codebook_sizes=[vocab_size], config=config)
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
        self._pieces = pieces + ["N"] * missing  # codes that no merge was learnt for: every code decodes
        self._lengths = np.array([len(piece) for piece in self._pieces])

    def fit(self, source: Path, seed: int) -> None:
        """Learn merges from the training genes of a JSON lines file with `dna` and `split`."""
        if not source.is_file():
            raise TokenizerError(f"{source} is missing: build the set with `anytoken data dna` first.")
        lines = (json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line)
        genes = [to_bases(to_symbols(line["dna"])) for line in lines if line["split"] == "train"]
        pieces = [gene[i : i + PIECE] for gene in genes for i in range(0, len(gene), PIECE)]
        trainer = trainers.BpeTrainer(
            vocab_size=self.config["vocab_size"], initial_alphabet=list(LETTERS), show_progress=False,
            max_token_length=LONGEST,
        )  # fmt: skip
        learner = Tokenizer(models.BPE())
        learner.train_from_iterator(pieces, trainer)
        self._set_merges([" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]])

    def _lookup_all(self, symbols: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bases, ends = to_bases(symbols), lengths.cumsum().tolist()
        pieces = [
            (number, bases[i : min(i + PIECE, end)])
            for number, (start, end) in enumerate(pairwise([0, *ends]))
            for i in range(start, end, PIECE)
        ]
        found = [one.ids for one in self._bpe.encode_batch_fast([piece for _, piece in pieces])]
        counts = np.bincount([n for n, _ in pieces], [len(ids) for ids in found], len(lengths))
        return np.array(list(chain.from_iterable(found)), dtype=np.int64), counts.astype(np.int64)

    def _spell(self, codes: np.ndarray) -> str:
        return "".join(map(self._pieces.__getitem__, codes.tolist()))

    def _num_letters(self, codes: np.ndarray) -> np.ndarray:
        return self._lengths[codes]

    def _whole(self, symbols: np.ndarray) -> int:
        return len(symbols) // PIECE * PIECE
