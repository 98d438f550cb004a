"""The code of the README and of docs/: Python runs, and the commands and flags of shell lines exist.

A block of Python that begins with an import stands by itself; another one goes on from the block before. What a block
needs and no reader has to see, such as a small model in the place of his own, is a comment before it, ``<!-- python``.
The Python of notebooks runs in `test_notebooks`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import building
import pytest
from command_reference import commands, flags

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SKILL.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
PARTS = re.compile(r"^<!-- python\n(.*?)^-->$|" + FENCED.pattern, flags=FENCED.flags)
INLINE = re.compile(r"`(hf-glu [^`]+)`")
CALL = re.compile(r"(?:^|\s)(?:hf-glu|(?:python|accelerate launch .*?) ?-m hf_glu)\s+(.*)")
ANY = {"run"}  # what follows is another program's
PLACEHOLDERS = {"NAME", "COMMAND"}


def scripts(text: str) -> list[str]:
    """Return the Python of a document as the scripts that its blocks, and the comments before them, make."""
    found: list[str] = []
    hidden = False  # whether the block before is a comment
    for comment, language, code in PARTS.findall(text):
        if not comment and language != "python":
            continue
        alone = (comment or code).startswith(("import ", "from ")) and not hidden
        if alone or not found:
            found.append("")
        found[-1] += comment or code
        hidden = bool(comment)
    return found


def all_scripts() -> dict[str, Path]:
    """Return every script, each once, with a document that has it."""
    return {script: path for path in DOCUMENTS for script in scripts(path.read_text(encoding="utf-8"))}


def lines(text: str) -> list[str]:
    """Return the command lines of a shell block, continued ones in one."""
    return [line for line in text.replace("\\\n", " ").split("\n") if line.strip()]


def called(line: str) -> list[str] | None:
    """Return the words after ``hf-glu`` in a line without its comment; None: it calls something else."""
    found = CALL.search(re.sub(r"\$\([^)]*\)", "PATH", line))
    return shlex.split(found[1], comments=True) if found else None


def wrong(words: list[str]) -> list[str]:
    """Return the commands and flags among the words that ``hf-glu`` doesn't have."""
    name, *rest = words
    if name.startswith("-"):
        return [] if name in {"--help", "-h", "--version", "--install-completion", "--show-completion"} else [name]
    if name not in (known := commands()):
        return [] if name in PLACEHOLDERS else [name]
    given = [] if name in ANY else [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    return [flag for flag in given if flag not in flags(known[name])]


def shell_lines() -> list[tuple[str, str]]:
    """Return every call of ``hf-glu`` in shell blocks, in outputs, and between backticks, with its document."""
    found = []
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    for path, text in (texts | {path: building.as_page(path) for path in building.notebooks().values()}).items():
        candidates = [line for language, code in FENCED.findall(text) if language != "python" for line in lines(code)]
        candidates += INLINE.findall(FENCED.sub("", text).replace("\n", " "))
        found += [(path.name, line) for line in candidates]
    return found


def test_python_runs(tmp_path, monkeypatch):
    found = all_scripts()
    assert len({*found.values()}) >= 8
    monkeypatch.chdir(tmp_path)
    for code, path in found.items():
        exec(compile(code, path.name, "exec"), {})


def test_blocks_make_scripts():
    first, second, more, shell = "import a\n", "from b import c\n", "c()\n", "hf-glu\n"
    fenced = "```python\n{}```\n".format
    assert scripts(fenced(first) + "words\n" + fenced(second) + f"```bash\n{shell}```\n" + fenced(more)) == [
        first,
        second + more,
    ]
    assert scripts(fenced(first) + f"<!-- python\nimport d\n-->\n\n{fenced(second)}") == [first, "import d\n" + second]
    assert not scripts(f"```bash\n{shell}```\n<!-- words -->\n")


def test_commands_and_flags_exist():
    calls = [(name, line, words) for name, line in shell_lines() if (words := called(line))]
    assert len(calls) > 60
    assert not [(name, line, bad) for name, line, words in calls if (bad := wrong(words))]


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("hf-glu convert A B --to geglu  # --nothing", []),
        ("hf-glu convert A --too geglu", ["--too"]),
        ("hf-glu konvert A", ["konvert"]),
        ("hf-glu finetune --data-set=x --task rte", ["--data-set"]),
        ("hf-glu run -- lm_eval --model hf", []),
        ("accelerate launch --multi_gpu -m hf_glu finetune --tsk rte", ["--tsk"]),
        ("python -m hf_glu doctor --jsn", ["--jsn"]),
        ('hf-glu compare --model $(path --to x) --seeds "0,1"', []),
        ("hf-glu convert ... --native", []),
    ],
)
def test_the_check_of_flags_can_fail(line, bad):
    assert wrong(called(line)) == bad


def test_other_programs_are_not_looked_at():
    assert called("make demo") is None
    assert called("pip install hf_glu --nothing") is None
