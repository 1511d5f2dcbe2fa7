"""Lossless DNA tokenizers: learned windows, windows with context, k-mers, BPE."""

from anytoken.tokenizers.dna.vq import DNATokenizer

__all__ = ["DNATokenizer"]
