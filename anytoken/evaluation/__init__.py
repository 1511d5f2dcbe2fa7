"""Evaluation: held-out cases of every direction, judges, scores beside baselines, and the demo page.

Nothing is imported here: a command that needs one part does not pay for the others.
"""
