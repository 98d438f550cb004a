"""The first minute with hf_glu: help, completion, missing extras, what is imported, what is printed."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from covering import few
from pico import FAMILIES
from typer.main import get_command

import hf_glu
from hf_glu import cli
from hf_glu.bench.devices import Subject
from hf_glu.bench.options import BenchOptions
from hf_glu.cli.commands import app
from hf_glu.compat.private import Private
from hf_glu.config.extras import EXTRAS, need
from hf_glu.errors import MissingPackageError, UnknownNameError
from hf_glu.plugin import HOOKED, doctor
from hf_glu.plugin.doctor import examine
from hf_glu.publishing.report import write_report
from hf_glu.publishing.report.family_curves import plot_family
from hf_glu.tasks import TASKS
from hf_glu.tasks.loading import load_task
from hf_glu.tasks.own import own_task
from hf_glu.training.comparing.classifiers import compare
from hf_glu.training.filling import read_yaml
from hf_glu.training.job import run_job
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.packaged import FOLDERS, find_config, packaged

ROOT = Path(__file__).parents[2]


def process(code, *arguments, **more):
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, **more
    )


# runs hf-glu with each of the arguments, and prints its exit code, what it says, and what it has imported that is slow
RUN_AND_TELL = """
import contextlib, io, json, sys
from hf_glu.cli import run
def tell(arguments):
    before, streams = set(sys.modules), (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = run(arguments)
    slow = {'torch', 'transformers.activations', 'datasets'} & (set(sys.modules) - before)
    return [code, *(stream.getvalue() for stream in streams), sorted(slow)]
print(json.dumps([tell(arguments) for arguments in json.loads(sys.argv[1])]))
"""
HERE = {"PYTHONPATH": str(ROOT)}


def without(*packages):
    """Return code that runs hf-glu where packages aren't installed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))"
    return f"{block}\nfrom hf_glu.cli import main\nmain(sys.argv[1:])"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]], ids=["nothing", "-h", "--help"])
def test_help_is_help(arguments, capsys):
    assert cli.run(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: hf-glu")
    assert "finetune" in captured.out
    assert captured.err == ""


def test_commands_have_short_help_and_programs_keep_their_own(capfd):
    assert cli.run(["convert", "-h"]) == 0
    assert "--plan" in capfd.readouterr().out
    assert cli.run(["run", sys.executable, "-h"]) == 0
    assert "PYTHON" in capfd.readouterr().out


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hf_glu", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, hf_glu.__version__ + "\n", "")


@pytest.mark.slow
def test_as_a_module_under_accelerate_launch(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "hf_glu"]
    done = subprocess.run([*launch, "finetune"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "hf-glu: give the pretrained checkpoint with --model" in done.stderr


def test_shell_completion():
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # no shell need be among this process's parents
    done = process("from hf_glu.cli import main; main()", "--show-completion", "bash", env=os.environ | named)
    assert done.returncode == 0
    assert "_HF_GLU_COMPLETE" in done.stdout
    words = {"_HF_GLU_COMPLETE": "complete_bash", "COMP_WORDS": "hf-glu fine", "COMP_CWORD": "1"}
    done = process("from hf_glu.cli import main; main()", env=os.environ | words)
    assert done.stdout.split() == ["finetune"]


WRONG = {
    "flag": ["convert", "--nope"],
    "command": ["frobnicate"],
    "no target": ["convert", "SRC", "DST"],
    "no destination": ["convert", "SRC", "--to", "geglu"],
    "stream and width": ["convert", "SRC", "DST", "--to", "geglu", "--stream", "--width", "9"],
    "no model": ["finetune", "--task", "sst2"],
    "an option": ["finetune", "--model", "SRC", "--epochs", "0"],
    "only": ["finetune", "--model", "SRC", "--task", "sst2", "--only", "rte"],
    "seeds": ["compare", "--model", "SRC", "--seeds", "a"],
    "no output": ["compare", "--model", "SRC", "--task", "sst2"],
    "bench": ["bench", "ffm"],
    "config": ["finetune", "--config", "bert-gelu-glue"],
    "formats": ["export", "SRC", "DST", "--onnx", "--program"],
    "nothing to run": ["run"],
    "activation": ["convert", "SRC", "DST", "--to", "gegul"],
    "activation by layer": ["convert", "SRC", "DST", "--to", "0-3=geglu", "--to", "4=gegul"],
    "function of a mix": ["convert", "SRC", "DST", "--to", "moa_swiglu(silu,rel)"],
    "experts": ["convert", "SRC", "DST", "--experts", "gelu*2,gegul*2"],
    "width": ["convert", "SRC", "DST", "--to", "geglu", "--width", "wide"],
    "layers": ["convert", "SRC", "DST", "--to", "geglu", "--layers", "first"],
    "pattern": ["convert", "SRC", "DST", "--to", "geglu", "--exclude", "["],
    "texts": ["convert", "SRC", "DST", "--to", "geglu", "--calibration", "no.txt"],
    "destination": ["convert", "SRC", ".", "--to", "geglu"],
    "source": ["convert", "./nowhere", "DST", "--to", "geglu"],
    "plan": ["convert", "./nowhere", "--to", "geglu", "--plan"],
    "file": ["convert", "nowhere.gguf", "DST", "--to", "geglu"],
    "repository": ["convert", "some/model", "DST", "--to", "geglu"],
    "sites": ["sites", "./nowhere"],
    "verify": ["verify", ".", "./nowhere"],
    "gates": ["gates", "./nowhere", "--text", "a"],
    "export": ["export", "./nowhere", "DST"],
    "report": ["report", "./nowhere"],
    "push": ["push", "./nowhere", "me/model", "--token", "hf_x"],
    "repository's name": ["push", "./nowhere", "me/mo del"],
    "job's activation": ["finetune", "--model", "SRC", "--to", "gegul", "--task", "sst2"],
    "task": ["finetune", "--model", "SRC", "--task", "sst"],
    "suite": ["finetune", "--model", "SRC", "--suite", "glu", "--output", "DST"],
    "task of a suite": ["finetune", "--model", "SRC", "--suite", "glue", "--output", "DST", "--only", "sst"],
    "data": ["finetune", "--model", "SRC", "--dataset", "no.csv"],
    "job's model": ["finetune", "--model", "./nowhere", "--task", "sst2"],
    "variant": ["compare", "--model", "SRC", "--task", "sst2", "--output", "DST", "--variants", "dense,gegul"],
    "variant's width": ["compare", "--model", "SRC", "--task", "sst2", "--output", "DST", "--variants", "geglu:half"],
    "text": ["pretrain", "--model", "SRC", "--data", "no.txt"],
    "no text": ["pretrain", "--model", "SRC"],
    "objective": ["pretrain", "--model", "SRC", "--data", "no.txt", "--objective", "cml"],
    "language model": ["pretrain", "--model", "./nowhere", "--data", "SRC"],
    "language model's activation": ["pretrain", "--model", "SRC", "--data", "SRC", "--to", "gegul"],
    "perplexity of nothing": ["perplexity", "./nowhere", "--data", "no.txt"],
    "forms": ["activations", "--json", "--markdown"],
    "suffix": ["activations", "--plot", "family.txt"],
    "name of a config": ["configs", "bert"],
}


LISTINGS = {"table": ["activations"], "markdown": ["activations", "--markdown"], "json": ["activations", "--json"]}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What hf-glu does with each of the arguments, in one process and one folder."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "SRC").mkdir()
    cases = WRONG | LISTINGS
    done = process(RUN_AND_TELL, json.dumps([*cases.values()]), cwd=folder, env=os.environ | HERE)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["SRC"]
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_do_not_wait_for_torch(case, told):
    code, out, err, slow = told[case]
    assert (code, out, slow) == (2, "", [])
    assert err.startswith("hf-glu: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("case", LISTINGS)
def test_the_listing_does_not_wait_for_torch(case, told):
    code, out, err, slow = told[case]
    assert (code, err, slow) == (0, "", [])
    assert all(name in out for name in ("swiglu_oss", "stateful_N", "https://arxiv.org/abs/2002.05202"))


@pytest.mark.slow
def test_what_is_slow_to_import_is_seen(tmp_path):
    done = process(RUN_AND_TELL, json.dumps([["doctor"]]), cwd=tmp_path, env=os.environ | HERE)
    assert "torch" in json.loads(done.stdout)[0][3]


@pytest.mark.slow
def test_the_listing_is_the_same_after_torch_is_loaded():
    listed = "hf_glu.activations().to_dict()"
    code = f"import hf_glu; before = {listed}; import transformers.activations; print(before == {listed})"
    assert process(code).stdout == "True\n"


MISSING = {
    "finetune": (["finetune", "--model", "SRC", "--task", "sst2"], "datasets", "train"),
    "finetune with LoRA": (["finetune", "--model", "SRC", "--task", "sst2", "--peft", "lora"], "peft", "train"),
    "compare": (["compare", "--model", "SRC", "--task", "sst2", "--output", "OUT"], "scipy", "train"),
    "report": (["report", "SRC"], "matplotlib", "report"),
    "gates": (["gates", "SRC", "--text", "a", "--html", "gates.html"], "matplotlib", "report"),
    "activations": (["activations", "--plot", "a.png"], "matplotlib", "report"),
    "export": (["export", "SRC", "OUT"], "onnxruntime", "export"),
    "bench devices": (["bench", "devices", "--model", "SRC", "--task", "sst2"], "datasets", "train"),
    "GGUF": (["sites", "FILE.gguf"], "gguf", "gguf"),
}


@pytest.mark.parametrize("case", few(MISSING, 4))
def test_a_missing_extra_is_one_line(case, tmp_path):
    arguments, package, extra = MISSING[case]
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(tmp_path / "SRC")
    (tmp_path / "FILE.gguf").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    done = process(without(package), *arguments, cwd=tmp_path, env=os.environ | HERE)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [done.stderr.strip()], done.stderr
    assert package in done.stderr
    assert done.stderr.endswith(f'installed: pip install "hf_glu[{extra}]"\n')
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def job(**more):
    return JobOptions(model="SRC", task="sst2", output="OUT", **more), TrainingOptions()


# what is called -> the package that it needs, its extra, the call
MISSING_IN_PYTHON = {
    "lora_config": ("peft", "train", lambda: hf_glu.lora_config(None)),
    "metrics": ("datasets", "train", lambda: hf_glu.metrics.METRICS),
    "a metric": ("sklearn", "train", lambda: hf_glu.metrics.compute("accuracy", [1], [1])),
    "a task": ("datasets", "train", lambda: load_task(TASKS["sst2"])),
    "data of one's own": ("datasets", "train", lambda: own_task("data.csv")),
    "a job": ("evaluate", "train", lambda: run_job(*job())),
    "a job with LoRA": ("peft", "train", lambda: run_job(*job(peft="lora"))),
    "a comparison": ("scipy", "train", lambda: compare(["dense", "geglu"], [0, 1], *job())),
    "a report": ("matplotlib", "report", lambda: write_report(Path("SRC"))),
    "a report's page": ("jinja2", "report", lambda: write_report(Path("SRC"))),
    "a plot": ("matplotlib", "report", lambda: plot_family(Path("family.png"))),
    "a graph": ("onnxscript", "export", lambda: hf_glu.export("SRC", "OUT")),
    "a GGUF file": ("gguf", "gguf", lambda: hf_glu.convert_checkpoint("FILE.gguf", "OUT", "geglu")),
}


@pytest.mark.parametrize("case", MISSING_IN_PYTHON)
def test_a_missing_extra_is_one_line_in_python(case, tmp_path, monkeypatch):
    package, extra, call = MISSING_IN_PYTHON[case]
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(tmp_path / "SRC")
    (tmp_path / "FILE.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=package) as error:
        call()
    assert str(error.value).endswith(f'installed: pip install "hf_glu[{extra}]"')
    assert "\n" not in str(error.value)
    assert not (tmp_path / "OUT").exists()


def test_ways_to_make_a_model_small_that_need_an_extra_are_left_out_with_a_line(tmp_path, monkeypatch):
    model = FAMILIES["bert"].make("BertForSequenceClassification")
    model.save_pretrained(tmp_path / "SRC")
    for package in ("torchao", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    subject = Subject(BenchOptions(model=str(tmp_path / "SRC")), tmp_path)
    # one package, or several that this environment lacks, too
    with pytest.warns(UserWarning, match=r"(is|are)n't installed: pip install \"hf_glu\[") as warned:
        assert set(subject.made) == {"float32", "bfloat16", "int8, torch"}
    assert any("int8, torchao needs" in str(each.message) and "[quantize]" in str(each.message) for each in warned)


def test_the_doctor_names_the_extra(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {check.name: check.detail for check in examine().checks}
    assert found["scikit-learn"] == 'not installed: pip install "hf_glu[train]"'
    assert found["torchao"] == 'not installed: pip install "hf_glu[quantize]"'
    assert found["accelerate"] == "not installed: pip install accelerate"


def test_the_doctor_says_that_an_optional_package_is_not_there(monkeypatch, capsys):
    row = Private(where="no_such_package.x", name="y", seen="1", need="making tea")
    monkeypatch.setattr(doctor, "rows", lambda: (row,))
    monkeypatch.setitem(HOOKED, "no_such_package.z", "hf_glu.plugin.kernels")
    assert cli.run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "none hook no_such_package.z: not installed: no_such_package" in lines
    (line,) = [line for line in lines if "no_such_package.x.y" in line]
    assert line.startswith("none private no_such_package.x.y: not installed: no_such_package; for making tea")


# what is typed -> what it lacks
LACKING = {
    "push bert-geglu": "push needs REPO (repository on the Hub, such as ada/bert-geglu): hf-glu push DIR REPO",
    "convert": "convert needs SRC (dense checkpoint: local folder, Hub id or FILE.gguf): hf-glu convert SRC",
    "steer x --positive y": "steer needs --negative NEGATIVE (",
}


@pytest.mark.parametrize("typed", LACKING)
def test_a_missing_argument_is_told_with_how_the_command_is_written(typed, capsys):
    assert cli.run(typed.split()) == 2
    told, expected = capsys.readouterr(), LACKING[typed]
    if not get_command(app).commands["push"].params[0].help:  # as of typer 0.20
        expected = re.sub(r" \(\w.*\)", "", expected)
    assert told.err.startswith(f"hf-glu: {expected}")
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_several_missing_packages_are_one_line(monkeypatch):
    need("json", what="nothing")
    for package in ("peft", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError) as error:
        need("peft", "json", "onnx", what="x")
    assert str(error.value) == 'x needs peft and onnx, which aren\'t installed: pip install "hf_glu[train,export]"'


def test_every_extra_is_one_of_the_packages():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) < set(extras)


def test_tasks_and_metrics_are_loaded_when_they_are_used():
    heavy = "{'torch', 'transformers', 'datasets', 'evaluate', 'hf_glu.tasks', 'hf_glu.tasks.metrics'}"
    code = f"""
import sys, hf_glu
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
assert {{'tasks', 'metrics'}} <= set(dir(hf_glu))
assert 'rte' in hf_glu.tasks.TASKS
assert 'datasets' not in sys.modules
assert hf_glu.metrics is sys.modules['hf_glu.tasks.metrics']
"""
    done = process(code)
    assert done.returncode == 0, done.stderr


def test_the_yaml_files_are_listed_and_found(capsys, tmp_path):
    assert cli.run(["configs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["configs"]
    assert len(rows) == sum(len(packaged(kind)) for kind in FOLDERS) > 18
    assert all(read_yaml(Path(row["file"])) for row in rows)
    assert cli.run(["configs", "fsdp2"]) == 0
    assert Path(capsys.readouterr().out.strip()) == packaged("accelerate")["fsdp2"]
    assert find_config(Path("bert-geglu-glue")) == packaged("configs")["bert-geglu-glue"]
    for given in (tmp_path / "bert-geglu-glue", Path("bert-geglu-glue.yaml")):
        assert find_config(given) == given  # a path, which isn't there
    with pytest.raises(UnknownNameError, match="did you mean"):
        find_config(Path("bert-geglu"))


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bert-geglu-glue").write_text("model: mine")
    assert read_yaml(find_config(Path("bert-geglu-glue"))) == {"model": "mine"}


@pytest.mark.slow
def test_nothing_but_the_answer_is_printed(tmp_path):
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(tmp_path / "dense")
    done = process(
        "from hf_glu.cli import main; main()",
        "convert",
        tmp_path / "dense",
        tmp_path / "gated",
        "--to",
        "geglu",
        "--json",
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["max_abs_difference"] <= 1e-6
    assert done.stderr == ""


def test_our_own_warnings_are_one_line():
    code = """
import sys, warnings
from hf_glu.cli.quiet import be_quiet
be_quiet()
warnings.warn("of a library")
exec(compile("warnings.warn('of ours')", "f.py", "exec"), {"__name__": "hf_glu.training.job", "warnings": warnings})
"""
    assert (
        process(code, env={k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}).stderr == "hf-glu: of ours\n"
    )


@pytest.mark.slow
def test_a_wheel_has_all_that_the_package_reads(tmp_path):
    pytest.importorskip("hatchling")
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = process(build, tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    listed = subprocess.run(["git", "ls-files", "hf_glu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) <= names
