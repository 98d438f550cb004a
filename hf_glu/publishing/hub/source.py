"""The package's own source as definitions."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = "hf_glu"
HOME = Path(__file__).parents[2]
Place = tuple[str, str]  # a module and a name in it
Edit = tuple[int, int, bytes]  # of a module's source: from, to, what is to stand there


def file_of(module: str) -> Path | None:
    """Return the file of a module of the package, None where there is none."""
    path = HOME.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def is_ours(module: str) -> bool:
    """Return whether a module is the package's."""
    return module.partition(".")[0] == PACKAGE


class ModuleSource:
    """A module of the package.

    Attributes:
        module: its name.
        raw: its source.
        definitions: its statements that give names a value, by name.
        effects: its other statements.
        imports: names -> where they come from; ``(module, "")`` is a module.
    """

    def __init__(self, module: str) -> None:
        file = file_of(module)
        assert file is not None, module
        self.module, self.raw = module, file.read_bytes()
        self.tree = ast.parse(self.raw)
        self.offsets = [0]
        for line in self.raw.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.definitions: dict[str, ast.stmt] = {}
        self.effects: list[ast.stmt] = []
        self.imports: dict[str, Place] = {}
        for node in self.tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.imports |= imported(node)
            elif names := defined(node):
                self.definitions |= dict.fromkeys(names, node)
            elif not is_text(node) and not _is_for_types(node):
                self.effects.append(node)

    def line(self, number: int) -> bytes:
        """Return a line, counted from 1."""
        return self.raw[self.offsets[number - 1] : self.offsets[number]]

    def span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        """Return where an expression stands, or the whole lines of a statement, with the comments above it."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        if isinstance(node, ast.expr):
            ends = ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
            first, last = (self.offsets[line - 1] + column for line, column in ends)
            return first, last
        line = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", ()))])
        while line > 1 and self.line(line - 1).strip().startswith(b"#"):
            line -= 1
        return self.offsets[line - 1], self.offsets[node.end_lineno]

    def text(self, node: ast.stmt, edits: list[Edit]) -> str:
        """Return a statement as it is after ``edits``; of two edits of one place, the outer one counts."""
        start, end = self.span(node)
        parts, done = [], start
        for first, last, new in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
            if first >= done:
                parts += [self.raw[done:first], new]
                done = last
        return b"".join([*parts, self.raw[done:end]]).decode().rstrip("\n")


read_source = cache(ModuleSource)


def imported(node: ast.Import | ast.ImportFrom) -> dict[str, Place]:
    """Return the names that an import gives, with where they come from."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in node.names}
    home, found = node.module or "", {}
    for alias in node.names:
        inside = f"{home}.{alias.name}"
        is_module = is_ours(home) and file_of(inside) is not None
        found[alias.asname or alias.name] = (inside, "") if is_module else (home, alias.name)
    return found


def defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if not all(isinstance(target, (ast.Name, ast.Tuple)) for target in targets):
        return []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def is_text(node: ast.stmt) -> bool:
    """Return whether a statement is a text by itself, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
