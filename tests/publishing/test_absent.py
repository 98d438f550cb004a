"""What published code goes without is named by module and name: each of these is there to go without."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import fields

import pytest
from source import FILES

from hf_glu.config.kinds import Kind
from hf_glu.publishing.hub import absent
from hf_glu.publishing.hub.entries import UNSAID
from hf_glu.publishing.hub.needed import conditions_of
from hf_glu.publishing.hub.pieces import is_called
from hf_glu.publishing.hub.source import Place, file_of, read_source

TABLES = [table for name, table in vars(absent).items() if name == "ALWAYS" or name.startswith("WITHOUT_")]


def definition(place: Place) -> ast.stmt | None:
    """Return what the package has at a place: a definition, or a method as ``Class.method``."""
    (module, name), found = place, None
    if file_of(module) is not None:
        name, _, method = name.partition(".")
        found = read_source(module).definitions.get(name)
        if method:
            methods = [part for part in getattr(found, "body", ()) if isinstance(part, ast.FunctionDef)]
            found = next((part for part in methods if part.name == method), None)
    return found


def parameters(node: ast.FunctionDef) -> list[str]:
    return [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def unmatched(stubs: Mapping[Place, str]) -> list[Place]:
    """Return the places at which there is nothing, or a function with other parameters than what stands in for it."""
    bad = []
    for place, stub in stubs.items():
        there, standing = definition(place), ast.parse(stub).body[:1]
        both = [node for node in (there, *standing) if isinstance(node, ast.FunctionDef)]
        if there is None or (len(both) == 2 and parameters(both[0]) != parameters(both[1])):
            bad.append(place)
    return bad


def unseen(off: Iterable[str]) -> list[str]:
    """Return the conditions, said never to hold, on which nothing in the package hangs."""
    parts = [part for path in FILES for part in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    tests = [part.test for part in parts if isinstance(part, (ast.If, ast.IfExp))]
    tests += [value for test in tests if isinstance(test, ast.BoolOp) for value in test.values]
    return [each for each in off if not any(is_called(test, each) for test in tests)]


def test_all_that_is_absent_is_in_the_package():
    assert len(TABLES) > 10
    for table in TABLES:
        assert not unmatched(table)


def test_each_condition_that_never_holds_is_in_the_package():
    assert not unseen(absent.OFF | conditions_of((), set()))


def test_code_says_of_a_kind_what_isnt_left_unsaid():
    stub = ast.parse(absent.ALWAYS["hf_glu.config.kinds", "Kind"]).body[0]
    assert isinstance(stub, ast.ClassDef)
    said = {
        part.target.id for part in stub.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    assert said | set(UNSAID) == {field.name for field in fields(Kind)}
    assert not said & set(UNSAID)


@pytest.mark.parametrize(
    ("place", "stub"),
    [
        (("hf_glu.ffn.nowhere", "build_ffns"), ""),
        (("hf_glu.ffn.build", "build_ffn"), ""),
        (("hf_glu.ffn.sites", "Site.to_dicts"), ""),
        (("hf_glu.ffn.build", "gated_width"), "def gated_width(width): ..."),
    ],
)
def test_what_is_absent_by_a_wrong_name_is_seen(place, stub):
    assert unmatched({place: stub}) == [place]


def test_a_condition_that_is_nowhere_is_seen():
    assert unseen(["kind == 'denser'", "saves_memory"]) == ["kind == 'denser'"]
