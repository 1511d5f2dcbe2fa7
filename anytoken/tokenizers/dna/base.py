"""The common part of all DNA tokenizers: the alphabet, sequences of any length as streams, and FASTA files.

Lower case (soft-masked) is read as upper case, U (RNA) as T, every other IUPAC letter (R, Y, S, W, K, M, B, D, H, V)
as N. A subclass only defines how symbols become codes, how codes become letters, and where a stream may be cut. Single
segments, batches, streams, and whole genomes in constant memory follow from that.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np

from anytoken.segments import DNA, Segment
from anytoken.tokenizers.base import Codes, ModalityTokenizer, TokenizerError
from anytoken.utils.json_lines import read_json_lines

LETTERS = "ACGTN"
N = LETTERS.index("N")
MAX_TOKENS = 400
BLOCK = 1 << 16  # letters of a file that are in memory at once


def _symbol_of_byte() -> np.ndarray:
    table = np.full(256, 255, dtype=np.uint8)
    for letter in "ACGTUNRYSWKMBDHV":
        symbol = LETTERS.find("T" if letter == "U" else letter)
        table[[ord(letter), ord(letter.lower())]] = symbol if symbol >= 0 else N
    return table


_SYMBOLS = _symbol_of_byte()
_BASES = np.frombuffer(LETTERS.encode(), dtype=np.uint8)


def to_symbols(bases: str) -> np.ndarray:
    """IUPAC letters as uint8 [T] indices into A C G T N; TokenizerError names the first invalid letter."""
    symbols = _SYMBOLS[np.frombuffer(bases.encode("latin-1", errors="replace"), dtype=np.uint8)]
    if symbols.size and symbols.max() > N:
        position = int(symbols.argmax())
        raise TokenizerError(
            f"DNA has IUPAC letters (ACGT, U, N, RYSWKMBDHV, either case); received {bases[position]!r} "
            f"at position {position + 1}."
        )
    return symbols


def to_bases(symbols: np.ndarray) -> str:
    """Indices [T] as letters of ACGTN."""
    return _BASES[symbols].tobytes().decode("ascii")


def pieces(array: np.ndarray, lengths: Iterable[int]) -> list[np.ndarray]:
    """Split an array [T, ...] into pieces of these lengths, which add up to T; much faster than np.split."""
    return [array[stop - length : stop] for stop, length in zip(accumulate(lengths), lengths, strict=True)]


def read_fasta(path: str | Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, name and pieces of every sequence of a FASTA or plain file (also .gz), in constant memory.

    Lines may be of any length. TokenizerError for a file that cannot be read.
    """
    path = Path(path)
    number, name, part, at_start = 0, "", "bases", True
    pieces: list[str] = []
    try:
        with gzip.open(path, "rt") if path.suffix.lower() == ".gz" else open(path) as handle:
            while text := handle.read(BLOCK):
                for line in text.splitlines(keepends=True):
                    if at_start and line.startswith(">"):
                        if any(pieces):
                            yield number, name.strip(), "".join(pieces)
                        number, name, pieces, line = number + 1, "", [], line[1:]
                        part = "name"
                    elif at_start:
                        part = "comment" if line.startswith(";") else "bases"
                    if part == "name":
                        name += line
                    elif part == "bases":
                        pieces.append("".join(line.split()))
                    at_start = line.endswith("\n")
                if any(pieces):
                    yield number, name.strip(), "".join(pieces)
                    pieces = []
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TokenizerError(f"{path} cannot be read as FASTA: {error}.") from error


def training_genes(source: Path) -> list[np.ndarray]:
    """Symbols uint8 [T] of each training gene in JSON lines with `dna` and `split`; TokenizerError without the file."""
    if not source.is_file():
        raise TokenizerError(f"{source} is missing: build the set with `anytoken data dna` first.")
    return [to_symbols(line["dna"]) for line in read_json_lines(source) if line["split"] == "train"]


class DNATokenizerBase(ModalityTokenizer):
    """A tokenizer of DNA segments; a subclass implements `_lookup_all`, `_spelled` and `_whole`."""

    segment_type = DNA
    reach = 0  # letters to either side of its own that a code depends on

    def _lookup_all(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes int64 [n] of each sequence of symbols uint8 [T], T at least 1."""
        raise NotImplementedError

    def _lookup_within(self, before: np.ndarray, symbols: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Codes int64 [n] of symbols that end a sequence or stop where `_whole` said; with a `reach`, given the letters
        before and after, at least that many or all there are.
        """
        return self._lookup_all([symbols])[0]

    def _spelled(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Symbols uint8 [n, W] of codes [n], all in range, and which of them are letters of the code, bool [n, W]."""
        raise NotImplementedError

    def _whole(self, symbols: np.ndarray) -> int:
        """How many of the first symbols of a stream already have their final codes."""
        raise NotImplementedError

    def _spell(self, codes: np.ndarray) -> str:
        symbols, are_letters = self._spelled(codes)
        return to_bases(symbols[are_letters])

    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """DNA to codes int64 [n, 1], in one lookup; TokenizerError for another kind, or more than 400 codes."""
        try:
            return self._encode_all(segments)
        except TokenizerError:
            if len(segments) > 1:
                for one in segments:
                    self.encode(one)  # raises the error of the first invalid one
            raise

    def _encode_all(self, segments: Sequence[Segment]) -> list[Codes]:
        for one in segments:
            self.check_segment(one)
        texts = [one.bases for one in segments if isinstance(one, DNA)]
        symbols = to_symbols("".join(texts))
        found = self._lookup_all(pieces(symbols, [len(text) for text in texts])) if texts else []
        for text, codes in zip(texts, found, strict=True):
            if len(codes) > MAX_TOKENS:
                raise TokenizerError(
                    f"A DNA segment has at most {MAX_TOKENS} codes; {len(text)} bases are {len(codes)}. "
                    "Cut it into pieces, or use encode_stream or encode_fasta, which take any length."
                )
        return [Codes(codes[:, None]) for codes in found]

    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to upper-case A C G T N, in one lookup; every code in range decodes."""
        lengths = [len(one) for one in codes]
        same = {(one.values.shape[1], len(one.header)) for one in codes} == {(1, 0)}
        values = np.concatenate([one.values for one in codes])[:, 0] if same else np.full(1, -1)
        if not (min(lengths, default=0) >= 1 and max(lengths) <= MAX_TOKENS and self._in_range(values)):
            for one in codes:
                self.check_codes(one)
            return []
        symbols, are_letters = self._spelled(values)
        bases = to_bases(symbols[are_letters])
        ends = accumulate(int(np.count_nonzero(one)) for one in pieces(are_letters, lengths))
        return [DNA(bases[start:stop]) for start, stop in pairwise([0, *ends])]

    def _in_range(self, values: np.ndarray) -> bool:
        return bool(values.min() >= 0 and values.max() < self.codebook_sizes[0])

    @property
    def lookahead(self) -> int:
        """0: a code decodes to the same letters in any context."""
        return 0

    def decode_span(self, codes: Codes, start: int, stop: int) -> DNA:
        """The letters of codes `start` to `stop`."""
        return DNA(self._spell(codes.values[start:stop, 0]))

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield codes int64 [n] for chunks of a sequence of any length, in the memory of one chunk.

        Chunks may be cut anywhere and white space is skipped, so they can be the lines of a file.
        """
        none = np.empty(0, dtype=np.uint8)
        before, rest = none, none
        for chunk in chunks:
            symbols = np.concatenate([rest, to_symbols("".join(chunk.split()))])
            whole = self._whole(symbols[: max(0, len(symbols) - self.reach)])
            known, rest = symbols[:whole], symbols[whole:]
            if whole:
                yield self._lookup_within(before, known, rest[: self.reach])
                before = np.concatenate([before, known])[-self.reach :] if self.reach else none
        if rest.size:
            yield self._lookup_within(before, rest, none)

    def decode_stream(self, chunks: Iterable[np.ndarray]) -> Iterator[str]:
        """Yield the bases of chunks of codes int [n]: the inverse of `encode_stream`."""
        for chunk in chunks:
            if chunk.size and not self._in_range(chunk):
                raise TokenizerError(
                    f"dna codes run from 0 to {self.codebook_sizes[0] - 1}; "
                    f"received values from {chunk.min()} to {chunk.max()}."
                )
            yield self._spell(chunk)

    def encode_fasta(self, path: str | Path) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """Yield the name and the codes, as from `encode_stream`, of each sequence of a file, in constant memory.

        As with itertools.groupby, consume the codes of a sequence before the next one.
        """
        for (_, name), pieces in groupby(read_fasta(path), itemgetter(0, 1)):
            yield name, self.encode_stream(map(itemgetter(2), pieces))
