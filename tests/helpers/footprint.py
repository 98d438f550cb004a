"""A test's memory: how far the process grows while it runs."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

# bytes in one unit of ru_maxrss
UNIT = 1 if sys.platform == "darwin" else 1024
LIMIT = 2 * 2**30
SLACK = 2**27  # what many tests add up to isn't one test's fault


def peak() -> int:
    """Return the most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


class Small:
    """Fails where the process comes to need more than ``limit`` bytes, and `SLACK` more than before, inside the block.

    The peak of a process only rises: whatever it was before, a block fails that takes it above the limit.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit

    def __enter__(self) -> Small:
        self._before = peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        after = peak()
        if after > max(self._limit, self._before + SLACK):
            raise AssertionError(
                f"the process came to need {after / 2**30:.1f} GB, of at most {self._limit / 2**30:.1f}"
            )
