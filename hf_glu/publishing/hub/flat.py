"""The code that a checkpoint carries, so that ``trust_remote_code=True`` loads it where hf_glu isn't installed.

Transformers' dynamic modules are files in one folder that import each other by ``from .x import y`` and in no other
way. So `plugin.standalone` and all that it needs for this very model, made from the package's own source, become one
file (`needed`, `program`), and ``modeling_hf_glu.py`` has a class for each stock class that the Auto classes have for
the checkpoint's config.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import hf_glu
from hf_glu.activation.module import OwnedModule
from hf_glu.checkpoint.loading import load_skeleton
from hf_glu.errors import CheckpointError
from hf_glu.ffn.sparse_linear import SparseLinear
from hf_glu.inplace import InPlace
from hf_glu.plugin import scoped
from hf_glu.plugin.configs import REMOTE_CODE, is_remote_code
from hf_glu.publishing.hub.needed import program_for
from hf_glu.publishing.hub.stock import Stock, served_classes

_HEADER = f"# Generated from hf_glu {hf_glu.__version__} (Apache-2.0) by hf_glu.publishing.hub.flat: change it there.\n"
OURS: tuple[type[Any], ...] = (OwnedModule, InPlace)

# torch's operators are known by name in the whole process, where each copy of the code must have its own
_NAMESPACE = """
# of the operators that this copy of the code adds to torch's
NAMESPACE = "hf_glu_" + sha256(__name__.encode()).hexdigest()[:12]
"""
_RENAMED = (
    (re.compile(r'"hf_glu::(\w+)"'), r'f"{NAMESPACE}::\1"'),
    (re.compile(r"\btorch\.ops\.hf_glu\."), "getattr(torch.ops, NAMESPACE)."),
)

_DOC = '''"""Transformers' own classes with the activations of hf_glu, whose source says more of each definition."""

from __future__ import annotations

import transformers
'''
_CLASS = '''
class {name}(GluModel, transformers.{name}):
    """``transformers.{name}`` with the FFNs that its config names."""
'''


def write_code(folder: str | os.PathLike[str]) -> list[str]:
    """Write the code into the folder of a checkpoint, and who uses it into its ``config.json``, last.

    Returns:
        The names of the files; none where stock Transformers loads the checkpoint as it is, or with dense FFNs where
        they leave small entries out.

    Raises:
        CheckpointError: there is no checkpoint that can be built, it has an activation that isn't hf_glu's own, or FFNs
            that leave small entries out, or the folder can't be written.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json")
    with scoped():
        model = load_skeleton(path)
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if not any(isinstance(module, OURS) and module not in sparse for module in model.modules()):
        return []
    if sparse:
        raise CheckpointError(
            f"{path}: the code for use without hf_glu doesn't leave small entries out (hf_glu.sparsify): publish "
            "without code (--no-code)"
        )
    check_own(model, path)
    served = served_classes(model.config)
    if not served:
        raise CheckpointError(
            f"no Auto class loads {type(model.config).__name__}, with code or without: publish no code"
        )
    files = {f"{REMOTE_CODE}.py": flat_code(model)}
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


def flat_code(model: Any) -> str:
    """Return the classes for a model's config, and what they need of the package, as one file.

    Args:
        model: with its FFNs.
    """
    source = program_for(model, Stock.of(model.config))
    renamed = source
    for pattern, replacement in _RENAMED:
        renamed = pattern.sub(replacement, renamed)
    if renamed != source:
        imports, _, rest = renamed.partition("\n\n")
        renamed = f"from hashlib import sha256\n{imports}\n{_NAMESPACE}\n{rest}"
    classes = sorted(set(served_classes(model.config).values()))
    return _HEADER + _DOC + renamed + "".join(_CLASS.format(name=name) for name in classes)
