"""Training: recipes as data, one loop, modality-aware losses, LoRA."""
