"""``make matrix``: the fast tests beside old and new versions of torch and Transformers, in environments of their own.

The environments lie under ``.nox`` and are used again. ``nox -s floor`` runs one of them, ``nox -s table`` writes
``docs/versions.md`` of what the last runs said.

HF_GLU_MATRIX  which tests: "fast" (all but the slow ones, the default) or "telling" (`TELLING`: some minutes)
HF_GLU_PYTHON  the interpreter's version, such as 3.12
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nox

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / ".nox" / "results", HERE / "docs" / "versions.md"
PYTHON = os.environ.get("HF_GLU_PYTHON")
# what tells soonest that a version lacks something
TELLING = (
    "tests/compat", "tests/activation/test_crop.py", "tests/activation/test_passes.py", "tests/activation/test_scan.py",
    "tests/checkpoint/test_loading.py", "tests/conversion/test_banks.py", "tests/conversion/test_native.py",
)  # fmt: skip
OTHERS = (
    "wrapt",
    "typer",
    "rich",
    "scikit-learn",
    "scipy",
    "seqeval",
    "rouge_score",
    "sacrebleu",
    "matplotlib",
    "jinja2",
    "pytest",
    "pytest-xdist",
    "hypothesis",
)
LIBRARIES = ("transformers", "accelerate", "peft", "datasets", "evaluate")
nox.options.sessions = ["floor", "middle", "pinned", "newest", "table"]
nox.options.reuse_existing_virtualenvs = True
nox.options.stop_on_first_error = False


@dataclass(frozen=True)
class Versions:
    """What one environment has; torch is installed first, so that nothing else chooses its build."""

    torch: str
    rest: tuple[str, ...]


VERSIONS = {
    "floor": Versions(
        "torch==2.6.0",
        ("transformers==5.6.2", "accelerate==1.12.0", "peft==0.20.0", "datasets==5.2.0", "evaluate==0.4.6"),
    ),
    "middle": Versions(
        "torch==2.9.1",
        ("transformers==5.14.1", "accelerate==1.13.0", "peft==0.20.0", "datasets==5.2.0", "evaluate==0.4.6"),
    ),
    "pinned": Versions("torch==2.13.0", ("-c", "constraints.txt", *LIBRARIES)),
    "newest": Versions("torch", ("transformers>=5.24,<6", *LIBRARIES)),
}


def run(session: nox.Session) -> None:
    """Install the versions of a session's name, run the tests, and keep what they said."""
    versions = VERSIONS[session.name.partition("-")[0]]
    session.install(versions.torch)
    session.install(*versions.rest, *OTHERS)
    session.install("--no-deps", "-e", ".")
    tests = TELLING if os.environ.get("HF_GLU_MATRIX") == "telling" else ("tests",)
    command = ("python", "-m", "pytest", "-m", "not slow", "-rs", *tests, *session.posargs)
    said = session.run(*command, silent=True, success_codes=[0, 1], env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    have = session.run("python", "-c", HAVE, silent=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    row = {**json.loads(str(have).strip().splitlines()[-1]), **counts(str(said)), "skips": reasons(str(said))}
    (RESULTS / f"{session.name}.json").write_text(json.dumps(row, indent=2) + "\n")
    session.log(f"{session.name}: {row}")
    if row["failed"]:
        session.error("\n".join(line for line in str(said).splitlines() if line.startswith(("FAILED", "ERROR"))))


HAVE = """
import json, platform
from importlib import metadata
names = ("torch", "transformers", "accelerate", "peft")
print(json.dumps({"python": platform.python_version(), **{name: metadata.version(name) for name in names}}))
"""


def counts(said: str) -> dict[str, int]:
    """Return how many tests passed, failed (errors, too) and were skipped, by pytest's last line."""
    found = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", said)}
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    return {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}


def reasons(said: str) -> list[str]:
    """Return why tests were skipped, each reason once, with how often."""
    found: dict[str, int] = {}
    for number, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", said, flags=re.MULTILINE):
        found[reason] = found.get(reason, 0) + int(number)
    return [f"{reason} ({number})" for reason, number in sorted(found.items())]


def table_of(rows: dict[str, dict[str, object]]) -> str:
    """Return the page of what the runs said."""
    columns = ("python", "torch", "transformers", "accelerate", "peft", "passed", "failed", "skipped")
    lines = [
        "# Versions", "", "What `make matrix` said, environment by environment; `hf-glu doctor` lists what an older",
        "version lacks, and the feature that needs it.", "", f"| | {' | '.join(columns)} |", "|---" * 9 + "|",
    ]  # fmt: skip
    lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]
    for name, row in rows.items():
        lines += ["", f"Skipped in {name}:", "", *[f"- {reason}" for reason in row["skips"]]] if row["skips"] else []
    return "\n".join(lines) + "\n"


for _name in VERSIONS:
    nox.session(run, name=_name, python=PYTHON)


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Print the table and write it into the documentation."""
    rows = {
        path.stem: json.loads(path.read_text()) for name in VERSIONS for path in sorted(RESULTS.glob(f"{name}*.json"))
    }
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table_of(rows))
    print(TABLE.read_text())
