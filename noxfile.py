"""``make matrix``: the fast tests beside old and new versions of torch and Transformers, in environments of their own.

The environments lie under ``.nox`` and are used again. ``nox -s floor`` runs one of them, ``nox -t between`` those of
the Transformers in between (laid over the packages that nox itself runs beside: 150 MB each), ``nox -s table`` writes
``docs/versions.md`` of what the last runs said. Options of pytest stand after ``--``.

HF_GLU_MATRIX  which tests: "fast" (all but the slow ones, the default) or "telling" (`TELLING`: some minutes)
HF_GLU_PYTHON  the interpreter's version, such as 3.12; ``python3.12`` has to be found on the PATH
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
import tomllib
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
    "tests/ffn/test_mixers.py",
)  # fmt: skip
LIBRARIES = ("transformers", "accelerate", "peft", "datasets", "evaluate")
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
)
TESTS = ("pytest", "pytest-xdist", "hypothesis")
nox.options.sessions = ["floor", "middle", "pinned", "newest", "table"]
nox.options.reuse_existing_virtualenvs = True
nox.options.stop_on_first_error = False


@dataclass(frozen=True)
class Versions:
    """What one environment has.

    Attributes:
        torch: is installed first, so that nothing else chooses its build; none: that of the environment nox runs in,
            over whose packages the rest is laid.
        rest: the other libraries.
    """

    torch: str
    rest: tuple[str, ...]


def floors() -> dict[str, str]:
    """Return the least version of each library that the project takes, such as ``torch==2.6.*``, by its name."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    found = [re.match(r"([\w-]+)>=([\d.]+)", each) for each in every]
    return {each[1]: f"{each[1]}=={each[2]}.*" for each in found if each}


_LEAST = floors()
VERSIONS = {
    "floor": Versions(_LEAST["torch"], tuple(_LEAST[name] for name in (*LIBRARIES, *OTHERS))),
    "middle": Versions(
        "torch==2.9.1",
        ("transformers==5.14.1", "accelerate==1.13.0", "peft==0.20.0", "datasets==5.2.0", "evaluate==0.4.6", *OTHERS),
    ),
    "pinned": Versions("torch==2.13.0", ("-c", "constraints.txt", *LIBRARIES, *OTHERS)),
    "newest": Versions("torch", ("transformers>=5.24,<6", *LIBRARIES, *OTHERS)),
}
BETWEEN = {
    f"transformers-{version.rpartition('.')[0]}": Versions("", (f"transformers=={version}",))
    for version in ("5.9.0", "5.15.1", "5.18.0", "5.20.2", "5.22.2", "5.24.0")
}


def run(session: nox.Session) -> None:
    """Install the versions of a session's name, run the tests, and keep what they said."""
    versions = {**VERSIONS, **BETWEEN}[session.name.removesuffix(f"-{PYTHON}")]
    if versions.torch:
        session.install(versions.torch)
        session.install(*versions.rest, *TESTS)
    else:
        lay_over(session, versions.rest)
    session.install("--no-deps", "-e", ".")
    telling = os.environ.get("HF_GLU_MATRIX") == "telling"
    options = session.posargs or ("-n", "2")
    command = ("python", "-m", "pytest", "-m", "not slow", "-rfEs", *options, *(TELLING if telling else ("tests",)))
    said = session.run(*command, silent=True, success_codes=[0, 1], env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if said is None:  # --install-only
        return
    have = json.loads(str(session.run("python", "-c", HAVE, silent=True)).strip().splitlines()[-1])
    RESULTS.mkdir(parents=True, exist_ok=True)
    tests = "telling" if telling else "fast"
    row = {**have, "tests": tests, **counts(str(said)), "skips": reasons(str(said))}
    (RESULTS / f"{session.name}.json").write_text(json.dumps(row, indent=2) + "\n")
    session.log(f"{session.name}: {row}")
    if row["failed"]:
        session.error("\n".join(line for line in str(said).splitlines() if line.startswith(("FAILED", "ERROR"))))


def lay_over(session: nox.Session, packages: tuple[str, ...]) -> None:
    """Have a session see the packages of the environment that nox runs in, behind some of its own."""
    own = session.run_install("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    Path(str(own).strip(), "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    session.install(*packages)


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
    columns = ("python", "torch", "transformers", "accelerate", "peft", "tests", "passed", "failed", "skipped")
    lines = [
        "# Versions", "",
        "What `make matrix` said, environment by environment; `nox -s table` has written this page of it. `fast` are",
        "all tests but the slow ones, `telling` those that tell soonest that a version lacks something. What an older",
        "version lacks, the reasons of the skipped tests name; `hf-glu doctor` lists it for yours, with the features",
        "that need it.",
        "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
    ]  # fmt: skip
    lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]
    for name, row in rows.items():
        lines += ["", f"Skipped in {name}:", "", *[f"- {reason}" for reason in row["skips"]]] if row["skips"] else []
    return "\n".join(lines) + "\n"


for _name in (*VERSIONS, *BETWEEN):
    _tags = ["between"] if _name in BETWEEN else ["whole"]
    nox.session(run, name=_name, python=[PYTHON] if PYTHON else None, tags=_tags)


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Print the table and write it into the documentation."""
    names = (*VERSIONS, *BETWEEN)
    found = {name: sorted(RESULTS.glob(f"{name}*.json"), key=lambda path: len(path.stem)) for name in names}
    rows = {path.stem: json.loads(path.read_text()) for paths in found.values() for path in paths}
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table_of(rows))
    print(TABLE.read_text())
