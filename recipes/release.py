"""Check a release as a stranger meets it: ``make release-check``.

python recipes/release.py [--torch torch==2.13.0] [--folder dist]

Builds the wheel and the source distribution, has twine check both, renders both READMEs, and installs the wheel,
with no extras, into an environment of its own: there it is imported, does a small job by its commands, and says in a
line which extra is missing. 0.3 GB to download (a CPU build of torch), a few minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")
MAKE_MODEL = """
import transformers, torch
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained("dense")
"""
IMPORT = """
import hf_glu, importlib.util, pathlib
assert "site-packages" in hf_glu.__file__, hf_glu.__file__
extras = [name for name in ("datasets", "evaluate", "peft", "matplotlib", "onnx") if importlib.util.find_spec(name)]
assert not extras, extras
assert "geglu" in __import__("transformers").activations.ACT2FN
print(hf_glu.__version__)
"""


def run(*command: str | Path, where: Path | None = None) -> str:
    """Run a command; end with what it has said where it fails.

    Raises:
        SystemExit: it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=where, text=True, capture_output=True, check=False,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def render_readmes() -> None:
    """Render both READMEs as a package index does.

    Raises:
        SystemExit: one can't be rendered, or lacks its title or tables.
    """
    from readme_renderer.markdown import render

    for name in READMES:
        page = render((ROOT / name).read_text(encoding="utf-8"))
        if page is None or "hf_glu" not in page or "<table" not in page:
            raise SystemExit(f"{name} isn't rendered as it should be")


def job(python: Path, folder: Path) -> None:
    """Do a small job by the installed commands: convert, verify, and what has no extra.

    Raises:
        SystemExit: something else comes out than promised.
    """
    tool = python.with_name("hf-glu")
    run(python, "-c", MAKE_MODEL, where=folder)
    run(tool, "convert", "dense", "gated", "--to", "geglu", where=folder)
    found = json.loads(run(tool, "verify", "dense", "gated", "--json", where=folder))
    if not found["same"]:
        raise SystemExit(f"a converted model isn't the same: {found}")
    asked = [str(tool), "finetune", "--model", "gated", "--task", "mrpc", "--output", "run"]
    refused = subprocess.run(asked, cwd=folder, text=True, capture_output=True, check=False)
    if refused.returncode != 2 or 'pip install "hf_glu[train]"' not in refused.stderr:
        raise SystemExit(f"a missing extra isn't said in one line: {refused.stderr}")


def main(
    torch: Annotated[str, typer.Option(help="What to install as torch.")] = "torch==2.13.0",
    folder: Annotated[Path, typer.Option(help="Of the wheel and the source distribution.")] = ROOT / "dist",
) -> None:
    """Build and check."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    files = sorted(path for path in folder.iterdir() if path.name.startswith("hf_glu-"))
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    say(f"twine passes {', '.join(path.name for path in files)}")
    render_readmes()
    say("both READMEs render")
    wheel = max((path for path in files if path.suffix == ".whl"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as place:
        run(sys.executable, "-m", "venv", Path(place, "venv"))
        python = Path(place, "venv", "bin", "python")
        known = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("torch==")]
        Path(place, "constraints.txt").write_text("\n".join(known))
        install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*install, torch)
        run(*install, "-c", Path(place, "constraints.txt"), wheel)
        say("the wheel is installed without extras")
        say(f"imported: version {run(python, '-c', IMPORT, where=Path(place)).strip()}")
        job(python, Path(place))
        say("converted, verified, and a missing extra named")


if __name__ == "__main__":
    typer.run(main)
