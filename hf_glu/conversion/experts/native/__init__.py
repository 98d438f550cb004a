"""Families' own banks: other activations, no inner gate."""
