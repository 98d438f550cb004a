"""The words of the code: each file's name is written once, and no two classes have one name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_glu.checkpoint import files

PACKAGE = Path(__file__).resolve().parents[2] / "hf_glu"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {
    name
    for key, value in vars(files).items()
    if key.endswith(("_FILE", "_FILES", "_PREFIX", "_SHARDS"))
    for name in (value if isinstance(value, tuple) else [value])
}
# modules that still write a name of their own: none is added here
OLD_NAMES = {"publishing/hub/flat.py"}
# first words of functions' docstrings that are no plain verb, or say little: who has, tells or gives what?
VAGUE = {"What", "Whether", "How", "The", "A", "An", "All", "Nothing", "Inside", "Within", "Have", "Tell", "Say"}


def literals(code: str) -> Iterator[tuple[str, int]]:
    """Yield each string of a module, parts of f-strings among them, with its line; docstrings aren't code."""
    tree = ast.parse(code)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value, node.lineno


def written_names(code: str) -> list[tuple[str, int]]:
    """Return the names of files that a module writes out, alone or at the end of a path, with their lines."""
    return [(text, line) for text, line in literals(code) if text.rpartition("/")[2] in NAMES]


def test_how_extras_are_installed_is_written_once():
    found = {path.name for path in MODULES for text, _ in literals(path.read_text()) if "hf_glu[" in text}
    assert found == {"extras.py"}, "ask config.extras.need, whose line is the same everywhere"


def class_places(codes: dict[str, str]) -> dict[str, list[str]]:
    """Return the modules in which a class of each name is defined."""
    places: dict[str, list[str]] = {}
    for module, code in codes.items():
        for node in ast.parse(code).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    return places


def vague(code: str) -> list[str]:
    """Return the functions (properties apart, which are nouns) whose docstrings begin with no plain verb."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            noun = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            word = text.split()[0].rstrip(",;:.")
            if not noun and (word in VAGUE or not word.replace("-", "").isalpha() or not word[0].isupper()):
                found.append(node.name)
    return found


def codes() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in MODULES}


def test_the_names_of_files_are_written_once():
    assert {"config.json", "results.json", "run.json", "log.jsonl", "hf_glu_report.json", "checkpoint-"} <= NAMES
    assert len(NAMES) > 20
    found = {module: written_names(code) for module, code in codes().items() if module != "checkpoint/files.py"}
    assert not {module: names for module, names in found.items() if names and module not in OLD_NAMES}


@pytest.mark.parametrize("code", ['a = folder / "run.json"', 'b = f"{folder}/config.json"', 'c = f"checkpoint-{step}"'])
def test_the_check_of_names_can_fail(code: str):
    assert written_names(code)
    assert not written_names(f'"""Reads config.json."""\n{code.partition("=")[0]} = RUN_FILE')


def test_no_two_classes_have_one_name():
    found = class_places(codes())
    assert len(found) > 100
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def test_the_check_of_classes_can_fail():
    assert class_places({"a.py": "class Row: ...", "b.py": "x = 1\nclass Row: ..."}) == {"Row": ["a.py", "b.py"]}


def test_docstrings_begin_with_a_plain_verb():
    found = {module: vague(code) for module, code in codes().items()}
    assert len(found) > 80
    assert not {module: names for module, names in found.items() if names}


@pytest.mark.parametrize("text", ["Have one do so.", "Tell so of it.", "``a`` of b.", "sum of x"])
def test_the_check_of_docstrings_can_fail(text: str):
    code = f'def f():\n    """{text}"""\n'
    assert vague(code) == ["f"]
    assert not vague(code.replace(text, "Return the sum of x."))
    assert not vague(f"@property\n{code}")
