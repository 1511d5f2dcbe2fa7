"""DNA to codes and back, letter for letter: learned windows, windows with their context, k-mers, BPE."""

from anytoken.tokenizers.dna.vq import DNATokenizer

__all__ = ["DNATokenizer"]
