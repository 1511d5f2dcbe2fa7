"""Losses that tokenizers are trained by."""
