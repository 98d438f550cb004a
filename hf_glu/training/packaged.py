"""The YAML files that come with hf_glu: of fine-tuning, and of ``accelerate launch``."""

from __future__ import annotations

from pathlib import Path

from hf_glu.checkpoint.writing import user_path
from hf_glu.errors import UnknownNameError, nearest

# what a file is for -> its folder
FOLDERS = {kind: Path(__file__).with_name(kind) for kind in ("configs", "accelerate")}


def packaged(kind: str) -> dict[str, Path]:
    """Return the files of a kind of `FOLDERS` by name."""
    return {path.stem: path for path in sorted(FOLDERS[kind].glob("*.yaml"))}


def find_config(given: Path) -> Path:
    """Return the file that ``--config`` means: one of the user's, else one of the names that come with hf_glu.

    Raises:
        UnknownNameError: a name, no path, of which there is no file.
    """
    if given.suffix or given != Path(given.name) or user_path(given).exists():
        return given
    known = packaged("configs")
    if given.name not in known:
        raise UnknownNameError(f"no file and no config {given.name!r}; {nearest(given.name, known)}")
    return known[given.name]
