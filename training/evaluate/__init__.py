"""Evaluation of a generator beside its baselines."""
