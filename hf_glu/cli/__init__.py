"""The command line ``hf-glu``: commands, each beside its own table."""

from hf_glu.cli.running import main, run

__all__ = ["main", "run"]
