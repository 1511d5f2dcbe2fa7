"""How good tokenizers are: rate, distortion, learnability, thresholds, the card."""
