"""Evaluation: metrics beside baselines, recognisers of speech, and how good tokenizers are.

Nothing is imported here: a command that needs one part does not pay for the others.
"""
