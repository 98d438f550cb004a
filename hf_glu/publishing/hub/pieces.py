"""What each definition uses, and how it is written without what isn't there."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from hf_glu.compat.private import Private
from hf_glu.publishing.hub.source import PACKAGE, Edit, ModuleSource, Place, is_ours, is_text

FINDER = ("hf_glu.compat.private", "find_name")
PLAINLY = {"of": "getattr", "put": "setattr", "find": FINDER[1]}  # what a private name's methods are without it


@dataclass
class Piece:
    """What a statement uses, and how it is written.

    Attributes:
        uses: global names, and ``name.attribute`` of those.
        places: definitions that the edits name.
        attributes: names of attributes.
        spots: where global names stand.
        edits: of the source.
    """

    uses: set[str] = field(default_factory=set)
    places: set[Place] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    spots: list[tuple[int, int, str]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)


class PieceReader(ast.NodeVisitor):
    """Read one statement of a module into a `Piece`.

    Left out: statements that only call what is absent; conditions that never hold, with what hangs on them; docstrings
    of functions, and all but the first line of a class's; what there is to say of private names.

    Args:
        source: the module.
        absent: names in it that aren't there.
        private: names in it of other libraries' private names.
        off: attributes that are always false, and conditions, such as ``kind == 'mixer'`` (of whatever object).
    """

    def __init__(self, source: ModuleSource, absent: Set[str], private: Mapping[str, Private], off: Set[str]) -> None:
        self.source, self.absent, self.private, self.off = source, absent, private, off
        self.piece, self.local = Piece(), frozenset[str]()

    def visit_Name(self, node: ast.Name) -> None:
        self._use(node, node.id)

    def _use(self, node: ast.expr, name: str) -> None:
        if name.partition(".")[0] not in self.local:
            self.piece.uses.add(name)
            self.piece.spots.append((*self.source.span(node), name))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "name" and (row := self._row(node)):
            self.piece.edits.append((*self.source.span(node), f'"{row.name}"'.encode()))
            return
        self.piece.attributes.add(node.attr)
        if isinstance(node.value, ast.Name) and self.source.imports.get(node.value.id, ("", "-"))[1] == "":
            self._use(node, f"{node.value.id}.{node.attr}")
        self.visit(node.value)

    def _row(self, node: ast.expr) -> Private | None:
        """Return the private name of which ``node`` is an attribute."""
        owner = node.value if isinstance(node, ast.Attribute) else None
        return self.private.get(owner.id) if isinstance(owner, ast.Name) else None

    def _plainly(self, node: ast.Call, row: Private, method: str) -> None:
        """Write ``ROW.of(x)`` as ``getattr(x, "_name")``, and so on."""
        start, end = self.source.span(node)
        call = f"{PLAINLY[method]}("
        if node.args:
            first, last = self.source.span(node.args[0])
            self.piece.edits += [(start, first, call.encode()), (last, last, f', "{row.name}"'.encode())]
        else:
            self.piece.edits.append((start, end, f'{call}"{row.where}", "{row.name}")'.encode()))
            self.piece.places.add(FINDER)
        for arg in node.args:
            self.visit(arg)

    def visit_Call(self, node: ast.Call) -> None:
        method = getattr(node.func, "attr", "")
        if method in PLAINLY and (row := self._row(node.func)):
            self._plainly(node, row, method)
            return
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            self.piece.attributes |= {str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self._annotation(node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self._is_off(node.target):
            self._leave_out(node)
            return
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
        self._block([part for part in node.body if not isinstance(part, ast.FunctionDef)])  # methods: one by one

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
            while not self.source.raw[end : self.source.raw.index(b"\n", end)].strip():
                end = self.source.raw.index(b"\n", end) + 1
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
        (start, end), (first, last) = self.source.span(node), self.source.span(kept)
        self.piece.edits += [(start, first, b""), (last, end, b"")]
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
        return any(is_called(test, each) for each in self.off)


def is_called(test: ast.expr, name: str) -> bool:
    """Return whether a condition is ``name``, of whatever object, or what a function of this name returns."""
    written = ast.unparse(test.func if isinstance(test, ast.Call) else test)
    return written == name or written.endswith(f".{name}")


def _bound(node: ast.FunctionDef) -> frozenset[str]:
    """Return the names that a function binds itself."""
    parts = [part for child in node.body for part in ast.walk(child)]
    stored = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    inner = {part.name for part in parts if isinstance(part, ast.FunctionDef)}
    given = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
    return frozenset(stored | inner | given)
