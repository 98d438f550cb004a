"""What a program needs of the package, and that as one file: definitions, not whole modules.

From its roots on, a definition that is named by one that is needed is needed, too. A method of a needed class is needed
where a class of torch's or Transformers' above it has one of that name (they call it), where needed code mentions its
name, and where it is one of Python's own.
"""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from hf_glu.compat.private import Private
from hf_glu.publishing.hub.imports import Imports, tidy
from hf_glu.publishing.hub.pieces import Piece, PieceReader
from hf_glu.publishing.hub.source import Edit, ModuleSource, Place, defined, is_ours, read_source


@dataclass
class Program:
    """What is needed of the package.

    Attributes:
        absent: definitions, or methods as ``Class.method``, that aren't there, with what stands in their place: "",
            where that is left out which names them.
        off: names of attributes and methods that are always false, see `source.PieceReader`.
        quiet: modules of which only the definitions are there.
        missing: modules of which nothing is there: a class of theirs is one that nothing is an instance of.
        needed: the definitions, by module.
        names: what each is called in the file, once that is written.
    """

    absent: Mapping[Place, str]
    off: Set[str]
    missing: Set[str] = frozenset()
    quiet: Set[str] = frozenset()
    needed: dict[str, set[str]] = field(default_factory=dict)
    names: dict[Place, str] = field(default_factory=dict)
    _mentioned: set[str] = field(default_factory=set)
    _classes: dict[Place, ast.ClassDef] = field(default_factory=dict)
    _foreign: dict[Place, set[str]] = field(default_factory=dict)
    _left_out: dict[str, set[str]] = field(default_factory=dict)
    _pieces: dict[int, Piece] = field(default_factory=dict)

    def source(self, module: str) -> ModuleSource:
        """Return a module's source."""
        return read_source(module)

    def resolve(self, module: str, name: str) -> Place | None:
        """Return where a global name of a module is defined, in the package or elsewhere; None: it is a builtin."""
        name, _, attribute = name.partition(".")
        while is_ours(module):
            source = self.source(module)
            if name in source.definitions:
                return None if attribute else (module, name)
            if name not in source.imports:
                return None
            module, name = source.imports[name]
            if not name:
                return self.resolve(module, attribute) if is_ours(module) and attribute else (module, "")
        return module, name

    def stub(self, place: Place) -> str | None:
        """Return what stands in a definition's place, None where it is there itself."""
        return f"{place[1]} = ()" if place[0] in self.missing else self.absent.get(place)

    def piece(self, module: str, node: ast.AST) -> Piece:
        """Return what a statement of a module uses and how it is written."""
        if id(node) not in self._pieces:
            reader = PieceReader(self.source(module), self._absent_in(module), self._private_in(module), self.off)
            reader.visit(node)
            self._pieces[id(node)] = reader.piece
        return self._pieces[id(node)]

    def _absent_in(self, module: str) -> set[str]:
        if module not in self._left_out:
            source = self.source(module)
            names = {*source.definitions, *source.imports}
            self._left_out[module] = {
                name for name in names if (place := self.resolve(module, name)) and self.stub(place) == ""
            }
        return self._left_out[module]

    def _private_in(self, module: str) -> dict[str, Private]:
        """Return the rows of `hf_glu.compat` that a module names."""
        source, rows = self.source(module), dict[str, Private]()
        for name in (*source.definitions, *source.imports):
            home, key = self.resolve(module, name) or ("", "")
            row = getattr(importlib.import_module(home), key, None) if home.startswith("hf_glu.compat.") else None
            rows |= {name: row} if isinstance(row, Private) else {}
        return rows

    def need(self, roots: list[Place]) -> None:
        """Find all that ``roots`` need; one without a name is a module's statements that define nothing."""
        todo = list(roots)
        while todo:
            module, name = todo.pop()
            if module not in self.needed:
                self.needed[module] = set()
                todo += self._effects(module)
            if name and name not in self.needed[module]:
                self.needed[module].add(name)
                todo += self._define(module, name)
            if not todo:
                todo += self._methods()

    def effects(self, module: str) -> list[ast.stmt]:
        """Return the needed statements of a module that define nothing."""
        return [] if module in self.missing | self.quiet else self.source(module).effects

    def _effects(self, module: str) -> Iterator[Place]:
        for node in self.effects(module):
            yield from self._used(module, node)

    def _define(self, module: str, name: str) -> Iterator[Place]:
        stub = self.stub((module, name))
        if stub is not None:
            for part in ast.walk(ast.parse(stub)):
                if isinstance(part, ast.Name):
                    yield from self._place(module, part.id)
            return
        node = self.source(module).definitions[name]
        if isinstance(node, ast.ClassDef):
            self._classes[module, name] = node
        yield from self._used(module, node)

    def _used(self, module: str, node: ast.AST) -> Iterator[Place]:
        piece = self.piece(module, node)
        self._mentioned |= piece.attributes
        yield from piece.places
        for name in piece.uses:
            yield from self._place(module, name)

    def _place(self, module: str, name: str) -> Iterator[Place]:
        place = self.resolve(module, name)
        if place and place[1] and is_ours(place[0]) and self.stub(place) != "":
            yield place

    def _methods(self) -> Iterator[Place]:
        """Yield what the methods use that have become needed."""
        for (module, name), node in list(self._classes.items()):
            for method in self.wanted(module, name, node):
                if id(method) not in self._pieces:
                    yield from self._used(module, method)

    def wanted(self, module: str, name: str, node: ast.ClassDef) -> list[ast.FunctionDef]:
        """Return the methods of a class that are needed."""
        if (module, name) not in self._foreign:
            above = getattr(importlib.import_module(module), name).__mro__
            keys = {key for kind in above if not is_ours(kind.__module__) for key in vars(kind)}
            if any(kind.__name__ == "InPlace" for kind in above):  # what it is mixed into has them
                keys |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            self._foreign[module, name] = keys
        called = self._foreign[module, name] | self._mentioned
        return [
            part
            for part in node.body
            if isinstance(part, ast.FunctionDef)
            and (part.name in called or part.name.startswith("__"))
            and (module, f"{name}.{part.name}") not in self.absent
        ]

    def write(self) -> str:
        """Return the definitions as one file, after the imports of what isn't the package's."""
        order, imports = self._ordered(), Imports()
        self.names = names = self._names(order, imports)
        parts = [text for module in order for text in self._written(module, names, imports)]
        body = last = ""
        for part in parts:  # what takes one line stands close to such
            body += ("\n" if "\n" not in part + last else "\n\n") + part if body else part
            last = part
        return f"{imports.write()}\n\n{body}\n"

    def _ordered(self) -> list[str]:
        """Return the needed modules, each after those that it imports."""
        found: dict[str, None] = {}

        def visit(module: str) -> None:
            if module not in found:
                found[module] = None
                for home, _ in self.source(module).imports.values():
                    if is_ours(home):
                        visit(home)
                found[module] = found.pop(module)  # now after them

        for module in sorted(self.needed):
            visit(module)
        return [module for module in found if module in self.needed]

    def _names(self, order: list[str], imports: Imports) -> dict[Place, str]:
        """Return what each definition is called: as in its module, unless two modules call something the same."""
        for module in order:
            for node in self._nodes(module):
                for name in self.piece(module, node).uses:
                    place = self.resolve(module, name)
                    if place and not is_ours(place[0]):
                        imports.add(name.partition(".")[0], place)
        taken, found = defaultdict[str, list[str]](list), {}
        for module in order:
            for name in self.needed[module]:
                for part in ast.walk(ast.parse(self.stub((module, name)) or "")):
                    place = self.resolve(module, part.id) if isinstance(part, ast.Name) else None
                    if place and not is_ours(place[0]):
                        imports.add(part.id, place)  # type: ignore[attr-defined]
        for module in order:
            for name in self.needed[module]:
                taken[name].append(module)
        for name, modules in taken.items():
            for module in modules:
                alone = len(modules) == 1 and name not in imports.names
                found[module, name] = name if alone else f"_{module.rpartition('.')[2]}_{name.lstrip('_')}"
        return found

    def _nodes(self, module: str) -> Iterator[ast.AST]:
        """Yield the needed statements and methods of a module."""
        for node in self.source(module).tree.body:
            names = self.needed[module].intersection(defined(node))
            if any(self.stub((module, name)) is None for name in names):
                yield node
                if isinstance(node, ast.ClassDef):
                    yield from self.wanted(module, node.name, node)
            elif node in self.effects(module):
                yield node

    def _written(self, module: str, names: dict[Place, str], imports: Imports) -> Iterator[str]:
        source, needed = self.source(module), set(self._nodes(module))
        for node in source.tree.body:
            for name in self.needed[module].intersection(defined(node)) if node not in needed else ():
                yield self._renamed(module, self.stub((module, name)) or "", names)
            if node not in needed:
                continue
            edits = [*self._edits(module, node, names)]
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if part in needed:
                    edits += self._edits(module, part, names)
                elif isinstance(part, ast.FunctionDef):
                    edits.append((*source.span(part), b""))
            yield tidy(source.text(node, edits))

    def _renamed(self, module: str, stub: str, names: dict[Place, str]) -> str:
        """Return what stands in a definition's place, with the new names of what it uses."""
        lines = stub.split("\n")
        parts = [part for part in ast.walk(ast.parse(stub)) if isinstance(part, ast.Name)]
        for part in sorted(parts, key=lambda part: (part.lineno, -part.col_offset)):
            place = self.resolve(module, part.id)
            new, line = names.get(place or ("", ""), part.id), lines[part.lineno - 1]
            lines[part.lineno - 1] = line[: part.col_offset] + new + line[part.col_offset + len(part.id) :]
        return "\n".join(lines)

    def _edits(self, module: str, node: ast.AST, names: dict[Place, str]) -> Iterator[Edit]:
        """Yield the edits of a statement, those by which it calls all by their new names among them."""
        piece, source = self.piece(module, node), self.source(module)
        yield from piece.edits
        for first, last, name in piece.spots:
            place = self.resolve(module, name)
            new = names.get(place) if place else None
            if new is not None and new != name:
                yield first, last, new.encode()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (new := names.get((module, node.name), node.name)):
            start = source.raw.index(node.name.encode(), source.offsets[node.lineno - 1])
            if new != node.name and node in source.tree.body:
                yield start, start + len(node.name), new.encode()
