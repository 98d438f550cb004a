"""Showing a model to others: its card, reports, the Hub, other runtimes."""
