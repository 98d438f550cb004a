"""Measurements behind every claim about speed and memory, each made by one command: ``hf-glu bench NAME``."""
