"""Run all pieces at length, one after the other: ``python -m recipes.fuzz [--scale S] [--seed N] [PIECE ...]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# piece -> cases: some 60,000 comparisons, 2,000 conversions, 20,000 mutated configs, 300 kills
COUNTS = {
    "activations": 6000,
    "oddities": 300,
    "networks": 1500,
    "conversions": 2000,
    "decoding": 600,
    "configs": 20000,
    "kills": 300,
}


def main() -> int:
    """Return how many pieces found something bad."""
    parser = argparse.ArgumentParser(prog="python -m recipes.fuzz", description=__doc__)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(COUNTS)}; all unless given")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many cases")
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    arguments = parser.parse_args()
    unknown = set(arguments.pieces) - set(COUNTS)
    if unknown:
        parser.error(f"no piece {sorted(unknown)[0]!r}; valid: {', '.join(COUNTS)}")
    here, bad = Path(__file__).parent, []
    for piece, count in COUNTS.items():
        if (arguments.pieces and piece not in arguments.pieces) or not (here / f"{piece}.py").is_file():
            continue
        command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.{piece}", "--seed", str(arguments.seed)]
        done = subprocess.run([*command, "--count", str(max(1, round(count * arguments.scale)))], check=False)
        bad += [piece] if done.returncode else []
    print(f"bad: {', '.join(bad)}" if bad else "0 bad", flush=True)
    return len(bad)


if __name__ == "__main__":
    raise SystemExit(bool(main()))
