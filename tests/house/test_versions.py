"""The versions that the project takes, and was seen beside, are the same wherever they are said."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from hf_glu.compat.table import rows

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FLOORS = dict(
    re.match(r"([\w-]+)>=([\d.]+)", each).groups()
    for each in (*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["quantize"])
)
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
READMES = ("README.md", "README.zh.md")
INSTALL = "docs/start/install.md"


def ends(row):
    first, _, last = row.seen.partition(" to ")
    return Version(first), Version(last or first)


def newest(package):
    return max(ends(row)[1] for row in rows() if row.package == package)


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate", "peft", "evaluate"])
def test_names_were_looked_for_from_the_floor_to_beyond_what_is_pinned(package):
    found = [ends(row) for row in rows() if row.package == package]
    assert found
    assert min(first for first, _ in found) == Version(FLOORS[package])
    assert {last for _, last in found} == {newest(package)}, "a row wasn't looked at beside the newest version"
    assert newest(package) >= Version(".".join(PINNED[package].split(".")[: len(newest(package).release)]))


@pytest.mark.parametrize("document", [*READMES, INSTALL])
def test_the_documents_name_the_range(document):
    text = (ROOT / document).read_text()
    # the last paragraph, or the section
    said = (
        text.rpartition("\n\n")[2] if document in READMES else text.partition("\n## Versions")[2].partition("\n## ")[0]
    )
    said = " ".join(said.split())
    section = said.replace(" from ", " ")
    for package, name in (("torch", "torch"), ("transformers", "Transformers")):
        assert re.search(rf"{name} {FLOORS[package]}\b", section), name
        assert f"{newest(package)}" in section, name
    for package in ("accelerate", "peft", "datasets", "evaluate", "torchao"):
        assert re.search(rf"{package} {FLOORS[package]}\b", section), package
    assert "`make matrix`" in section


def test_the_classifiers_are_the_pythons_that_are_tested():
    pythons = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    for document in (*READMES, INSTALL):
        assert f"Python {pythons[0]}" in " ".join((ROOT / document).read_text().split()), document


def test_every_extra_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / INSTALL).read_text(), flags=re.MULTILINE)
    assert {*rows} | {"dev"} == EXTRAS.keys()


def test_the_newest_pinned_versions_are_within_the_bounds():
    for name, floor in FLOORS.items():
        assert Version(PINNED[name]) >= Version(floor), name
