"""The package's own source as definitions: what each uses, and how it is written without what isn't there."""

from __future__ import annotations

import ast
from collections.abc import Set
from dataclasses import dataclass, field
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


@dataclass
class Piece:
    """What a statement uses, and how it is written.

    Attributes:
        uses: global names, and ``name.attribute`` of those.
        attributes: names of attributes.
        spots: where global names stand.
        edits: of the source.
    """

    uses: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    spots: list[tuple[int, int, str]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)


class PieceReader(ast.NodeVisitor):
    """Read one statement of a module into a `Piece`.

    Left out: statements that only call what is absent; conditions that never hold, with what hangs on them; docstrings
    of functions, and all but the first line of a class's.

    Args:
        source: the module.
        absent: names in it that aren't there.
        off: attributes that are always false, and conditions, such as ``kind == 'mixer'`` (of whatever object).
    """

    def __init__(self, source: ModuleSource, absent: Set[str], off: Set[str]) -> None:
        self.source, self.absent, self.off = source, absent, off
        self.piece, self.local = Piece(), frozenset[str]()

    def visit_Name(self, node: ast.Name) -> None:
        self._use(node, node.id)

    def _use(self, node: ast.expr, name: str) -> None:
        if name.partition(".")[0] not in self.local:
            self.piece.uses.add(name)
            self.piece.spots.append((*self.source.span(node), name))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.piece.attributes.add(node.attr)
        if isinstance(node.value, ast.Name) and self.source.imports.get(node.value.id, ("", "-"))[1] == "":
            self._use(node, f"{node.value.id}.{node.attr}")
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            self.piece.attributes |= {str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self._annotation(node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        self._annotation(node.annotation)
        if node.value is not None:
            self.visit(node.value)

    def _annotation(self, node: ast.expr | None) -> None:
        """Read an annotation: what comes from elsewhere is imported, ours (never evaluated) need not be there."""
        for part in ast.walk(node) if node is not None else ():
            if isinstance(part, ast.Name) and not is_ours(self.source.imports.get(part.id, (PACKAGE, ""))[0]):
                self.visit_Name(part)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._shorten(node)
        for part in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if part is not None:
                self.visit(part)
        outer = self.local
        self.local = outer | _bound(node)
        for arg in ast.walk(node.args):
            if isinstance(arg, ast.arg):
                self.visit(arg)
        self._annotation(node.returns)
        self._block(node.body)
        self.local = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._shorten(node)
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        for statement in node.body:
            if not isinstance(statement, ast.FunctionDef):  # methods are read one by one
                self.visit(statement)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        outer = self.local
        self.local = outer | {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        self.generic_visit(node)
        self.local = outer

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if is_ours(node.module or ""):
            self._leave_out(node)

    def _shorten(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        """Leave the first line of a class's docstring, and none of a function's."""
        first = node.body[0]
        if not is_text(first):
            return
        start, end = self.source.offsets[first.lineno - 1], self.source.offsets[first.end_lineno or 0]
        if len(node.body) > 1 and isinstance(node, ast.FunctionDef):
            self.piece.edits.append((start, end, b""))
        elif first.end_lineno != first.lineno:
            self.piece.edits.append((start, end, self.source.line(first.lineno).rstrip() + b'"""\n'))

    def visit_If(self, node: ast.If) -> None:
        other = node.orelse[0] if len(node.orelse) == 1 else None
        if self._is_off(node.test) and isinstance(other, ast.If) and other.col_offset == node.col_offset:
            start = self.source.span(node.test)[0] - len("if ")
            self.piece.edits.append((start, self.source.span(other.test)[0], b"if "))
            self.visit(other)
            return
        self.visit(node.test)
        self._block(node.body)
        self._block(node.orelse)

    def visit_For(self, node: ast.For) -> None:
        for part in (node.target, node.iter):
            self.visit(part)
        self._block(node.body)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item)
        self._block(node.body)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        if self._is_off(node.test) or self._calls_absent(node.body):
            kept = node.orelse
        elif self._calls_absent(node.orelse):
            kept = node.body
        else:
            self.generic_visit(node)
            return
        self.piece.edits.append((*self.source.span(node), self.source.raw[slice(*self.source.span(kept))]))
        self.visit(kept)

    def _block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if self._is_idle(statement):
                self._leave_out(statement)
            else:
                self.visit(statement)

    def _leave_out(self, statement: ast.stmt) -> None:
        self.piece.edits.append((*self.source.span(statement), b""))

    def _is_idle(self, node: ast.stmt) -> bool:
        """Return whether a statement does nothing without what is absent."""
        if isinstance(node, (ast.Expr, ast.Return)):
            return node.value is not None and self._calls_absent(node.value)
        if isinstance(node, ast.If):
            return not node.orelse and (self._is_off(node.test) or all(map(self._is_idle, node.body)))
        return isinstance(node, ast.For) and all(map(self._is_idle, node.body))

    def _calls_absent(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Call):
            return False
        called = node.func
        while isinstance(called, ast.Attribute):
            called = called.value
        return isinstance(called, ast.Name) and called.id in self.absent

    def _is_off(self, test: ast.expr) -> bool:
        """Return whether a condition never holds."""
        if isinstance(test, ast.BoolOp):
            return (any if isinstance(test.op, ast.And) else all)(map(self._is_off, test.values))
        test = test.func if isinstance(test, ast.Call) else test
        written = ast.unparse(test)
        return any(written == each or written.endswith(f".{each}") for each in self.off)


def _bound(node: ast.FunctionDef) -> frozenset[str]:
    """Return the names that a function binds itself."""
    parts = [part for child in node.body for part in ast.walk(child)]
    stored = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    inner = {part.name for part in parts if isinstance(part, ast.FunctionDef)}
    given = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
    return frozenset(stored | inner | given)
