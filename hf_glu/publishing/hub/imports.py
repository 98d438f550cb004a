"""The imports of a file that is made of definitions."""

from __future__ import annotations

from collections import defaultdict

from hf_glu.publishing.hub.source import Place

WIDTH = 120  # characters of a line


class Imports:
    """The imports of a file, by the names that they give."""

    def __init__(self) -> None:
        self.names: dict[str, Place] = {}

    def add(self, name: str, place: Place) -> None:
        """Add one.

        Raises:
            AssertionError: the name stands for something else already.
        """
        assert self.names.setdefault(name, place) == place, (name, place)

    def write(self) -> str:
        """Return them as source."""
        plain = [f"import {home}" for name, (home, key) in self.names.items() if not key and home == name]
        homes = defaultdict[str, list[str]](list)
        for name, (home, key) in sorted(self.names.items()):
            if key or home != name:
                outer, _, inner = home.rpartition(".")
                home, key = (home, key) if key else (outer, inner)
                homes[home].append(key if key == name else f"{key} as {name}")
        lines = []
        for home, keys in sorted(homes.items()):
            line = f"from {home} import {', '.join(keys)}"
            lines.append(line if len(line) <= WIDTH else f"from {home} import (\n    {', '.join(keys)},\n)")
        return "\n".join([*sorted(plain), *lines])


def tidy(text: str) -> str:
    """Return a text with no more than one empty line on end."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text
