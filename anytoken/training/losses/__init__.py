"""Losses of the language model."""
