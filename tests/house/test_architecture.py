"""The shape of the code: imports go down, files stay small, documents are true."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import hf_glu

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
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """Yield (module, line) of every import of hf_glu's own modules, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("hf_glu."):
                yield name, node.lineno


def violations(path, imports):
    room = room_of(path)
    rooms = [(module.split(".")[1], line) for module, line in imports]
    return [
        f"{path.name}:{line} {room} imports {other}"
        for other, line in rooms
        if other in LEVEL and other != room and LEVEL[other] >= LEVEL[room]
    ]


def circles(graph):
    """Return the modules that reach themselves, each with those on its circles."""
    found = {}
    for start in graph:
        seen, ahead = set(), list(graph[start])
        while ahead:
            if (module := ahead.pop()) not in seen:
                seen.add(module)
                ahead += graph.get(module, ())
        if start in seen:
            found[start] = sorted(other for other in seen if start in graph.get(other, ()))
    return found


def test_imports_go_down_only():
    checked = [path for path in FILES if room_of(path) != "__init__"]
    assert len(checked) > 30
    assert {room_of(path) for path in checked} == set(LEVEL), "a room without a level"
    assert not [found for path in checked for found in violations(path, imported_modules(path))]


def test_no_file_imports_itself_round_a_circle():
    graph = {module: {other for other, _ in imported_modules(path)} for module, path in MODULES.items()}
    graph.pop("hf_glu")  # the public names, which no room imports from
    assert not circles(graph)


def test_the_checks_of_imports_can_fail():
    below = [("hf_glu.ffn.sites", 3)]
    assert violations(PACKAGE / "config" / "registry.py", below) == ["registry.py:3 config imports ffn"]
    assert violations(PACKAGE / "plugin" / "names.py", [("hf_glu.training.job", 1)])
    assert list(imported_modules(PACKAGE / "plugin" / "__init__.py"))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b": ["c"], "c": ["b"]}


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


def _python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    blocks = [block for block in _python_blocks() if "# needs the Hub" not in block]
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_no_machine_paths_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in listed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            text = (ROOT / name).read_text(errors="ignore")
            assert not re.search("/" + "work/|/" + "root/|/" + "home/[a-z]", text), name
