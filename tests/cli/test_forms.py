"""Where people look for the commands: ``--format`` beside ``--json``, ``hf glu``, lm-eval's ``--model hf-glu``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from command_reference import commands, flags

import hf_glu
from hf_glu import cli
from hf_glu.plugin import lm_eval_names
from hf_glu.plugin.patching import Patches

ROOT = Path(__file__).resolve().parents[2]


def printed(capsys, *arguments):
    assert cli.run(["activations", *arguments]) == 0
    return capsys.readouterr().out


def test_the_form_of_what_is_printed(capsys):
    table = printed(capsys)
    assert "geglu" in table
    assert printed(capsys, "--format", "human") == printed(capsys, "--format", "auto") == table
    assert json.loads(printed(capsys, "--format", "json")) == json.loads(printed(capsys, "--json"))
    assert printed(capsys, "--format=quiet") == ""
    assert printed(capsys) == table, "quiet is of one command"
    assert cli.run(["activations", "--json", "--format", "quiet"]) == 2
    assert capsys.readouterr().err == "hf-glu: one form at a time, got --json and --format quiet\n"
    assert cli.run(["activations", "--format", "jsn"]) == 2


def test_every_command_that_has_json_has_the_forms():
    for name, command in commands().items():
        assert ("--json" in flags(command)) == ("--format" in flags(command)), name


class Registry(dict):
    def register(self, name, *, target):
        self[name] = target


def test_lm_eval_finds_the_model(monkeypatch):
    """In a stand-in for lm-eval's registry, by its hook and by the entry point."""
    parts = {name: ModuleType(name) for name in (
        "lm_eval", "lm_eval.api", "lm_eval.api.registry", "lm_eval.models", "lm_eval.models.huggingface"
    )}  # fmt: skip
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    parts["lm_eval.api"].registry = parts["lm_eval.api.registry"]
    parts["lm_eval.api.registry"].model_registry = known = Registry()
    parts["lm_eval.models.huggingface"].HFLM = type("HFLM", (), {})
    monkeypatch.delitem(sys.modules, "hf_glu.plugin.lm_eval", raising=False)
    lm_eval_names.install(parts["lm_eval.models"], Patches())
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert known == entry == {"hf-glu": "hf_glu.plugin.lm_eval:GatedLM"}
    from hf_glu.plugin.lm_eval import GatedLM

    assert GatedLM.__bases__ == (parts["lm_eval.models.huggingface"].HFLM,)
    monkeypatch.delitem(sys.modules, "hf_glu.plugin.lm_eval")


@pytest.mark.slow
def test_hf_runs_it_as_an_extension(tmp_path):
    """As huggingface_hub installs a repository called hf-glu: a folder with a manifest and the executable."""
    program = Path(sys.executable).with_name("hf")
    if not program.is_file():
        pytest.skip("huggingface_hub has no command hf here")
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-glu"
    folder.mkdir(parents=True)
    executable = folder / "hf-glu"
    executable.write_text(f"#!{sys.executable}\nfrom hf_glu.cli import main\n\nmain()\n")
    executable.chmod(0o755)
    manifest = {
        "owner": "me", "repo": "hf-glu", "repo_id": "me/hf-glu", "short_name": "glu", "type": "python",
        "executable_path": str(executable), "installed_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([program, "glu", "--version"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hf_glu.__version__]
