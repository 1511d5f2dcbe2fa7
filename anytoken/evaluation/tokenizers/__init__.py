"""Evaluation of tokenizers: rate, distortion, learnability, thresholds, the card."""
