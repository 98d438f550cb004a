"""The manifest of a push, by which the next push knows what it may replace or remove."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from hf_glu.checkpoint.carrying import is_code
from hf_glu.checkpoint.files import WEIGHTS_FILE, WEIGHTS_INDEX_FILE, WEIGHTS_SHARDS
from hf_glu.checkpoint.jsonio import JsonObject

# what Transformers loads by itself where it is there: none of these may stay in a repository from an earlier push
WEIGHTS = (WEIGHTS_FILE, WEIGHTS_INDEX_FILE, WEIGHTS_SHARDS)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return sha256(path.read_bytes()).hexdigest()


def read_manifest(path: Path) -> JsonObject:
    """Read the manifest of an earlier push; an empty one if it can't be read."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def stale_files(there: list[str], pushed: list[str], earlier: JsonObject) -> list[str]:
    """Return the files of a repository that a push removes: code of the push before, and other weights.

    Its other files (a tokenizer, images, what its owner has put there) stay.

    Args:
        there: the repository's files.
        pushed: those that are pushed now.
        earlier: the manifest of the push before.
    """
    named = earlier.get("code")
    gone, code = set(there) - set(pushed), named if isinstance(named, list) else ()
    return sorted(
        name for name in gone if (name in code and is_code(name)) or any(fnmatch(name, pattern) for pattern in WEIGHTS)
    )
