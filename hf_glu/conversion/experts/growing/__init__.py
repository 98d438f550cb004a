"""Experts made of experts: ours, families' own, by utility."""
