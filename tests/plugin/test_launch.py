"""``hf-glu run --modulation``: what the child is told, and what is wrong before there is one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import steered

from hf_glu.plugin.launch import run_with_plugin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save two modulations."""
    root, model = tmp_path_factory.mktemp("named"), steered.make("llama")
    steered.fit(model).save(root / "glad")
    steered.fit(model, layers=[0]).save(root / "formal.safetensors")
    return root


CHILD = """
import json, sys
from hf_glu import plugin
from hf_glu.plugin.modulations import named
from transformers.generation import GenerationMixin
found = [named(), bool(getattr(GenerationMixin.generate, "hf_glu_steers", False))]
open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_run_hands_names_on_to_the_child(folder, tmp_path, monkeypatch, run_cli):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(folder)
    child = ("--", sys.executable, tmp_path / "child.py", tmp_path / "found.json")
    code, _, err = run_cli("run", "--modulation", "glad=glad", "--modulation", "f.1-x=formal.safetensors", *child)
    assert code == 0, err
    expected = {"glad": str(folder / "glad"), "f.1-x": str(folder / "formal.safetensors")}
    assert json.loads((tmp_path / "found.json").read_text()) == [expected, True]
    assert run_with_plugin([str(each) for each in child[1:]]) == 0
    assert json.loads((tmp_path / "found.json").read_text()) == [{}, False]


def test_run_says_what_is_wrong_with_a_modulation_before_it_starts(folder, tmp_path, run_cli):
    (tmp_path / "broken").mkdir()
    glad = f"glad={folder / 'glad'}"
    cases = {
        ("glad",): "NAME=FOLDER",
        ("=x",): "NAME=FOLDER",
        ("glad=",): "NAME=FOLDER",
        (f"a b={folder / 'glad'}",): "letters, digits",
        (glad, glad): "two modulations are called glad",
        (f"glad={tmp_path}/nothing",): "there is no folder",
        (f"glad={tmp_path}/nothing.safetensors",): "there is no file",
        (f"glad={tmp_path}/broken",): "is no modulation",
    }
    child = ("--", sys.executable, "-c", f"open({str(tmp_path / 'started')!r}, 'w')")
    for given, line in cases.items():
        code, out, err = run_cli("run", *(part for each in given for part in ("--modulation", each)), *child)
        assert (code, out, err.count("\n")) == (2, "", 1), given
        assert line in err, (given, err)
    assert not (tmp_path / "started").exists()


def test_the_hooks_import_no_models_while_transformers_imports_its_own():
    code = "import sys, hf_glu.plugin.generation, hf_glu.plugin.serving; print('hf_glu.ffn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    code = code.replace("hf_glu.plugin.serving", "hf_glu.plugin.modulations")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
