"""Plain data as JSON: the same text for the same data, and no NaN, which is no JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def to_json(data: Any) -> str:
    """Return ``data`` as indented JSON; infinities and NaN become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as JSON."""
    path.write_text(to_json(data) + "\n", encoding="utf-8")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
