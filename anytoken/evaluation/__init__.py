"""Evaluation: metrics with baselines, speech recognizers, and the quality of tokenizers.

Nothing is imported here, so a command loads only the part that it needs.
"""
