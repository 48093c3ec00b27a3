"""Collect adapters into zoos, train generators on them, evaluate what they make."""
