"""How tokenizers are trained: one resumable loop, and their batches."""
