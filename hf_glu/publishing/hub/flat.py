"""The code that a checkpoint carries, so that ``trust_remote_code=True`` loads it where hf_glu isn't installed.

Transformers' dynamic modules are files in one folder that import each other by ``from .x import y`` and in no other
way. So `plugin.standalone` and all that it imports become flat files, made from the package's own source, and
``modeling_hf_glu.py`` has a class for each stock class that the Auto classes have for the checkpoint's config.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any

import hf_glu
from hf_glu.activation import OwnedModule
from hf_glu.checkpoint.convert import load_skeleton
from hf_glu.compat.of_models import MODEL_CLASS, MODEL_MAPPING
from hf_glu.errors import CheckpointError
from hf_glu.inplace import InPlace
from hf_glu.plugin import scoped
from hf_glu.plugin.configs import REMOTE_CODE, is_remote_code

ROOT = "hf_glu.plugin.standalone"
_PACKAGE = Path(hf_glu.__file__).parent
_HEADER = f"# Generated from hf_glu {hf_glu.__version__} (Apache-2.0) by hf_glu.publishing.hub.flat: change it there.\n"
OURS: tuple[type[Any], ...] = (OwnedModule, InPlace)

# torch's operators are known by name in the whole process, where each copy of the code must have its own
_OPERATORS = "hf_glu_operators"
_OPERATORS_SOURCE = '''"""The namespace of the operators that this copy of the code adds to torch's."""

from hashlib import sha256

NAMESPACE = "hf_glu_" + sha256(__name__.encode()).hexdigest()[:12]
'''
_RENAMED = (
    (re.compile(r'"hf_glu::(\w+)"'), r'f"{NAMESPACE}::\1"'),
    (re.compile(r"\btorch\.ops\.hf_glu\."), "getattr(torch.ops, NAMESPACE)."),
)

_MODELING = '''"""Transformers' own classes with the activations of hf_glu."""

from __future__ import annotations

import transformers

from .hf_glu_standalone import GluModel
'''
_CLASS = '''

class {name}(GluModel, transformers.{name}):
    """``transformers.{name}`` with the FFNs that its config names."""
'''


def write_code(folder: str | os.PathLike[str]) -> list[str]:
    """Write the code into the folder of a checkpoint, and who uses it into its ``config.json``, last.

    Returns:
        The names of the files; none where stock Transformers loads the checkpoint as it is.

    Raises:
        CheckpointError: there is no checkpoint that can be built, it has an activation that isn't hf_glu's own, or the
            folder can't be written.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json")
    with scoped():
        model = load_skeleton(path)
    if not any(isinstance(module, OURS) for module in model.modules()):
        return []
    check_own(model, path)
    served = served_classes(model.config)
    if not served:
        raise CheckpointError(
            f"no Auto class loads {type(model.config).__name__}, with code or without: publish no code"
        )
    files = {**flat_code(), f"{REMOTE_CODE}.py": modeling_code(served)}
    try:
        for name, source in files.items():
            (path / name).write_text(source, encoding="utf-8")
        _name_classes(path / "config.json", served)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} can't be written: {error}") from error
    return sorted(files)


def check_own(model: Any, path: Path) -> None:
    """Raise CheckpointError where a part of our modules is of a class that neither the code nor Transformers has."""
    for module in model.modules():
        for part in module.modules() if isinstance(module, OURS) else ():
            for made in (type(part), getattr(part, "formula", None)):
                home = getattr(made, "__module__", "torch")
                if home.partition(".")[0] not in ("hf_glu", "transformers", "torch"):
                    raise CheckpointError(
                        f"{path}: the code would lack {home}.{getattr(made, '__name__', made)}, which isn't hf_glu's: "
                        "publish without code, for environments that register it"
                    )


def served_classes(config: Any) -> dict[str, str]:
    """Return the names of the Auto classes that know a config, with the stock class that each takes for it."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {}
    for name in modeling_auto.__all__:
        mapping = MODEL_MAPPING.of(getattr(modeling_auto, name), None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            stock = MODEL_CLASS.find()(config, mapping).__name__
            if hasattr(transformers, stock):
                found[name] = stock
    return found


def modeling_code(served: dict[str, str]) -> str:
    """Return the source of the module that has the classes ``served``."""
    return _HEADER + _MODELING + "".join(_CLASS.format(name=name) for name in sorted(set(served.values())))


def _name_classes(config_file: Path, served: dict[str, str]) -> None:
    """Write the classes into a ``config.json``, all of it or nothing."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    others = {key: value for key, value in (config.get("auto_map") or {}).items() if not is_remote_code(value)}
    config["auto_map"] = others | {auto: f"{REMOTE_CODE}.{stock}" for auto, stock in served.items()}
    partial = config_file.with_name(f".{config_file.name}.partial")
    try:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(config_file)
    finally:
        partial.unlink(missing_ok=True)


@cache
def flat_code() -> dict[str, str]:
    """Return `ROOT` and all modules that it needs as flat files: name -> source."""
    files: dict[str, str] = {f"{_OPERATORS}.py": _HEADER + _OPERATORS_SOURCE}
    wanted = [ROOT]
    while wanted:
        module = wanted.pop()
        name = f"{_flat(module)}.py"
        if name not in files:
            source, needed = _flatten(module)
            files[name] = _HEADER + source
            wanted += needed
    return dict(sorted(files.items()))


def _flatten(module: str) -> tuple[str, list[str]]:
    """Return a module's source with its imports of the package rewritten, and the modules that these name."""
    source, needed = _source(module), []
    lines = source.splitlines()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(imports, key=lambda node: -node.lineno):  # from the end, so that the numbers stay right
        if found := list(_flat_imports(node)):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            written = indent("\n".join(text for _, text in found), lines[first][: node.col_offset])
            lines[first:last] = [written + lines[last - 1][node.end_col_offset :]]
            needed += [name for name, _ in found]
    return _own_operators("\n".join(lines) + "\n"), needed


def _flat_imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yield the modules of the package that an import names, each with the import that takes its place."""
    if isinstance(node, ast.Import):
        assert not any(alias.name.partition(".")[0] == "hf_glu" for alias in node.names), ast.unparse(node)
        return
    home = node.module or ""
    if home.partition(".")[0] != "hf_glu":
        return
    names = []
    for alias in node.names:
        inside, known_as = f"{home}.{alias.name}", alias.asname or alias.name
        if _file(inside):  # a module: there is no package to import it from, but it knows its own name
            lines = f"from .{_flat(inside)} import __name__ as {known_as}", f"{known_as} = sys.modules[{known_as}]"
            yield inside, "import sys\n" + "\n".join(lines)
        else:
            names.append(ast.unparse(alias))
    if names:
        yield home, f"from .{_flat(home)} import {', '.join(names)}"


def _own_operators(source: str) -> str:
    """Give a module that defines or calls operators of torch this copy's own names for them."""
    renamed = source
    for pattern, replacement in _RENAMED:
        renamed = pattern.sub(replacement, renamed)
    if renamed == source:
        return source
    future = "from __future__ import annotations\n"
    assert future in renamed
    return renamed.replace(future, f"{future}\nfrom .{_OPERATORS} import NAMESPACE\n", 1)


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _file(module: str) -> Path | None:
    """Return the file of a module of the package, None where there is none."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _source(module: str) -> str:
    file = _file(module)
    assert file is not None, module
    assert module != "hf_glu", "the package itself, which registers the plugin"
    return file.read_text(encoding="utf-8")
