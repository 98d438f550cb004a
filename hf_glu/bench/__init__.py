"""Measurements behind every claim about speed and memory, each made by one command: ``hf-glu bench NAME``."""

from hf_glu.bench.running import BENCHES, run
from hf_glu.bench.timing import interleave, saved_bytes

__all__ = ["BENCHES", "interleave", "run", "saved_bytes"]
