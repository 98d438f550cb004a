"""The package's source as tests read it: its files, its rooms from the bottom up, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_glu"
FILES = sorted(PACKAGE.rglob("*.py"))

# from the bottom up; rooms of one level never import each other
LEVELS = (
    ("errors", "inplace", "version"),
    ("compat",),
    ("config",),
    ("activation",),
    ("ffn",),
    ("instruments",),
    ("conversion",),
    ("checkpoint",),
    ("tasks", "plugin"),
    ("training", "publishing"),
    ("bench",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def module_of(path: Path) -> str:
    """Return the dotted name of the module in a file."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = frozenset(map(module_of, FILES))


def room_of(path: Path) -> str:
    """Return the room that a file lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, code: str | None = None) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every import of hf_glu's own modules, wherever it stands in the file.

    ``from hf_glu import convert`` imports the package alone, which finds its public names when they are used.
    """
    for node in ast.walk(ast.parse(path.read_text() if code is None else code)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "hf_glu")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (room, line) of every import of a module in one of hf_glu's rooms."""
    for name, line in imported_modules(path):
        if "." in name:
            yield name.split(".")[1], line


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that import each other, at first or second hand."""
    reached = {name: {name} for name in imports}
    for name, seen in reached.items():
        open_ = [name]
        while open_:
            for other in imports.get(open_.pop(), set()) - seen:
                seen.add(other)
                open_.append(other)
    found = []
    for name in imports:
        circle = {other for other in reached[name] - {name} if name in reached.get(other, set())}
        if circle and not any(name in each for each in found):
            found.append({name, *circle})
    return found
