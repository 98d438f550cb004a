"""The shape of the code: imports go down, files stay small, documents are true."""

import ast
import re
import subprocess

import pytest
from source import (
    FILES,
    LEVEL,
    PACKAGE,
    ROOT,
    circles,
    imported_modules,
    imported_rooms,
    module_of,
    room_of,
)

import hf_glu


def violations(path, imports):
    room = room_of(path)
    return [
        f"{path.name}:{line} {room} imports {other}"
        for other, line in imports
        if other in LEVEL and other != room and LEVEL[other] >= LEVEL[room]
    ]


def test_imports_go_down_only():
    checked = [path for path in FILES if room_of(path) != "__init__"]
    assert len(checked) > 30
    assert {room_of(path) for path in checked} == set(LEVEL), "a room without a level"
    assert not [found for path in checked for found in violations(path, imported_rooms(path))]


def test_the_check_of_imports_can_fail():
    assert violations(PACKAGE / "ffn" / "build.py", [("conversion", 3)]) == ["build.py:3 ffn imports conversion"]
    assert violations(PACKAGE / "plugin" / "names.py", [("tasks", 1)])
    assert list(imported_rooms(PACKAGE / "plugin" / "__init__.py"))


def test_no_files_import_each_other():
    imports = {module_of(path): {name for name, _ in imported_modules(path)} for path in FILES}
    del imports["hf_glu"]  # the package names what is public, and is imported for it
    assert not circles(imports)


def test_the_check_of_circles_can_fail():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    inner = "if TYPE_CHECKING:\n    from hf_glu.ffn import sites\n\ndef late():\n    import hf_glu.errors\n"
    assert list(imported_modules(FILES[0], inner)) == [("hf_glu.ffn.sites", 2), ("hf_glu.errors", 5)]


OTHER_TEST = re.compile(r"^ *(from|import) test_\w+", re.MULTILINE)


def test_the_tests_mirror_the_rooms():
    rooms = {path.parent.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} == {*rooms, "house", "recipes"}


def test_no_test_imports_another_test():
    found = {path.name for path in (ROOT / "tests").rglob("*.py") if OTHER_TEST.search(path.read_text())}
    assert not found, "what tests share lies in tests/helpers/"
    assert OTHER_TEST.search("from " + "test_stateful import awake")


CHANGES_GLOBALS = re.compile(
    r"ACT2FN\[[^\]]+\] *=[^=]|(?<!item\.)__class__ *=[^=]|"
    r"PreTrained\w+\.\w+ *=[^=]|setattr\(PreTrained"
)


def test_only_the_plugin_changes_transformers():
    found = [path.name for path in FILES if room_of(path) != "plugin" and CHANGES_GLOBALS.search(path.read_text())]
    assert not found
    assert CHANGES_GLOBALS.search((PACKAGE / "plugin" / "names.py").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small_and_public_things_documented(path):
    code = path.read_text()
    assert code.count("\n") <= 300
    tree = ast.parse(code)
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_public_names_exist():
    for name in hf_glu.__all__:
        assert getattr(hf_glu, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        hf_glu.nothing_like_it  # noqa: B018


def test_the_functions_are_not_shadowed_by_modules():
    import hf_glu.checkpoint.convert
    import hf_glu.checkpoint.verification
    import hf_glu.cli.commands

    for name in ("activations", "convert", "plan", "verify", "find_sites"):
        assert callable(getattr(hf_glu, name)), name


def test_the_readmes_table_is_the_registrys():
    assert hf_glu.activations().markdown() in (ROOT / "README.md").read_text()


def test_no_machine_paths_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in listed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            text = (ROOT / name).read_text(errors="ignore")
            assert not re.search("/" + "work/|/" + "root/|/" + "home/[a-z]", text), name
