"""Training of tokenizers: a resumable loop, and its batches."""
