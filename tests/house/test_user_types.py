"""Who uses the package has its types: a script that calls the API is checked, and what is wrong in it is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hf_glu

SCRIPT = """
from pathlib import Path

from torch import nn

import hf_glu
from hf_glu.errors import HfGluError

hf_glu.register()
registered: bool = hf_glu.is_registered()
options = hf_glu.GluConfig(layers="every 2", width="iso")
width: int | str | None = options.width


def work(model: nn.Module, folder: Path) -> float | None:
    promise: str = hf_glu.plan(model, "geglu", layers="2-3").promise
    report = hf_glu.convert(model, "geglu")
    names: list[str] = [site.name for site in hf_glu.find_sites(model)]
    fused: int = hf_glu.fuse(model)
    same: bool = hf_glu.verify(folder, folder / "out").same
    try:
        with hf_glu.scoped():
            hf_glu.revert(model)
    except HfGluError as error:
        print(promise, names, fused, same, error)
    return report.max_abs_difference
"""
# a part of the script, what it is replaced by, and what mypy then says
MISTAKES = [
    ("registered: bool", "registered: str", "assignment"),
    ("width: int | str | None", "width: list[int]", "assignment"),
    ("promise: str", "promise: int", "assignment"),
    ("-> float | None", "-> str", "return-value"),
    ("hf_glu.fuse(model)", "hf_glu.fuse(model, 3)", "arg-type"),
    ("site.name", "site.nothing", "attr-defined"),
    ('folder / "out").same', 'folder / "out").nothing', "attr-defined"),
]
# whose types take minutes
OTHERS = "\n".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "transformers"))


@pytest.mark.slow
def test_scripts_are_checked(tmp_path):
    mypy = pytest.importorskip("mypy.api")
    package = Path(hf_glu.__file__).parent
    assert (package / "py.typed").is_file()
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {package.parent}\nfollow_imports = silent\n{OTHERS}")
    (tmp_path / "right.py").write_text(SCRIPT)
    for number, (old, new, _) in enumerate(MISTAKES):
        assert SCRIPT.count(old) == 1
        (tmp_path / f"wrong{number}.py").write_text(SCRIPT.replace(old, new))
    files = [str(path) for path in sorted(tmp_path.glob("*.py"))]
    said, failed, _ = mypy.run(["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path), *files])
    assert not failed
    found = dict(re.findall(r"(\w+)\.py:\d+: error: .*\[([\w-]+)\]", said))
    assert found == {f"wrong{number}": kind for number, (*_, kind) in enumerate(MISTAKES)}, said
