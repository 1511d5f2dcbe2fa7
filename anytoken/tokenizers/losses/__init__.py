"""Training losses of tokenizers."""
