"""The command line as a stranger meets it: real processes for the ways out, the same process for the rest."""

import json
import os
import subprocess
import sys
import time

import pytest
from pico import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_glu
from hf_glu import cli


@pytest.fixture
def dense(tmp_path):
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def tokenized(dense):
    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 5, "the": 6, "film": 7}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(dense)
    return dense


@pytest.fixture
def run(capsys):
    """Run hf-glu in this process; return (exit code, standard output, standard error)."""

    def run_cli(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_cli


def json_of(result):
    code, out, _ = result
    assert code == 0
    return json.loads(out)


def test_activations(run):
    assert json_of(run("activations", "--json")) == hf_glu.activations().to_dict()
    code, out, _ = run("activations")
    assert code == 0
    assert "silu(g) * u" in out
    assert "[g | u]" in out
    code, out, _ = run("activations", "--markdown")
    assert out.startswith("| name | value | source |")


def test_sites(run, dense):
    data = json_of(run("sites", dense, "--json"))
    assert [site["name"] for site in data["sites"]] == [f"bert.encoder.layer.{i}" for i in range(2)]
    assert data["sites"][0]["activation"] == "gelu"
    code, out, _ = run("sites", dense)
    assert code == 0
    assert "bert.encoder.layer.1" in out


def test_convert_and_verify(run, dense, tmp_path):
    plan = json_of(run("convert", dense, "--to", "geglu", "--plan", "--json"))
    report = json_of(run("convert", dense, tmp_path / "gated", "--to", "geglu", "--json"))
    assert report["parameters_after"] == plan["parameters_after"] > plan["parameters_before"]
    assert report["max_abs_difference"] <= 1e-6
    result = json_of(run("verify", dense, tmp_path / "gated", "--json"))
    assert result["same"]
    assert result["max_abs_difference"] <= 1e-6
    code, out, _ = run("convert", dense, tmp_path / "swiglu", "--to", "swiglu", "--layers", "1")
    assert code == 0
    assert "approximate" in out
    code, out, _ = run("verify", dense, tmp_path / "swiglu", "--tolerance", "1e-9")
    assert code == 1
    assert "different" in out


def test_equal_parameters(run, tokenized, tmp_path):
    (tmp_path / "texts.txt").write_text("a film\n\nthe film a\n" * 40)
    options = ["--to", "geglu", "--width", "iso", "--calibration", tmp_path / "texts.txt"]
    report = json_of(run("convert", tokenized, tmp_path / "iso", *options, "--json"))
    assert report["sites"][0]["width_after"] == 27
    assert report["sites"][0]["fit"]["after"] <= report["sites"][0]["fit"]["before"]
    assert json.loads((tmp_path / "iso" / "config.json").read_text())["hf_glu"]["width"] == 27


def test_ffns_are_split_among_experts(run, tokenized, tmp_path):
    (tmp_path / "texts.txt").write_text("a film\n\nthe film a\n" * 40)
    options = ["--split", "1+7", "--top-k", "3"]
    plan = json_of(run("convert", tokenized, "--plan", *options, "--json"))
    assert plan["target"] == "1+7 experts, top 3"
    options += ["--calibration", tmp_path / "texts.txt"]
    report = json_of(run("convert", tokenized, tmp_path / "split", *options, "--json"))
    assert report["parameters_after"] == plan["parameters_after"]
    assert [len(curve) for curve in report["curves"].values()] == [7, 7]
    entry = json.loads((tmp_path / "split" / "config.json").read_text())["hf_glu"]["experts"]
    assert (entry["groups"], entry["shared"], entry["top_k"]) == ("gelu:5*7", "gelu:5*1", 3)
    assert "1+7" in (tmp_path / "split" / "README.md").read_text()
    code, out, _ = run("convert", tokenized, tmp_path / "again", *options)
    assert code == 0
    assert "error by experts" in out


def test_plan_as_a_table_says_what_it_costs(run, dense):
    code, out, _ = run("convert", dense, "--to", "geglu", "--plan")
    assert code == 0
    for words in ("up = 1", "exact", "parameters", "FLOPs", "bytes", "(+50"):
        assert words in out


BAD = {
    "no command": (["frobnicate"], "frobnicate"),
    "no such option": (["activations", "--frob"], "--frob"),
    "missing source": (["convert", "--to", "geglu"], "SRC"),
    "missing target": (["convert", "DENSE", "OUT"], "--to"),
    "missing destination": (["convert", "DENSE", "--to", "geglu"], "DST"),
    "unknown target": (["convert", "DENSE", "OUT", "--to", "gegul"], "did you mean 'geglu'"),
    "no route": (["convert", "DENSE", "OUT", "--to", "reglu"], "exact from gelu: geglu"),
    "no folder": (["convert", "./nowhere", "OUT", "--to", "geglu"], "no folder ./nowhere"),
    "no network": (["sites", "some/model"], "HF_HUB_OFFLINE"),
    "layers": (["convert", "DENSE", "OUT", "--to", "geglu", "--layers", "9"], "0 to 1"),
    "layers unreadable": (["convert", "DENSE", "OUT", "--to", "geglu", "--layers", "x"], "'every 2'"),
    "destination": (["convert", "DENSE", "DENSE", "--to", "geglu"], "exists already"),
    "width": (["convert", "DENSE", "OUT", "--to", "geglu", "--width", "small"], "'iso'"),
    "width alone": (["convert", "DENSE", "OUT", "--to", "geglu", "--width", "iso"], "calibration"),
    "no texts": (["convert", "DENSE", "OUT", "--to", "geglu", "--calibration", "no.txt"], "no.txt"),
    "fit and stream": (["convert", "DENSE", "OUT", "--to", "geglu", "--width", "9", "--stream"], "--stream"),
    "tolerance": (["verify", "DENSE", "DENSE", "--tolerance", "abc"], "--tolerance"),
    "no tokenizer": (["verify", "DENSE", "DENSE", "--text", "hello"], "tokenizer"),
    "no data": (["finetune", "--model", "DENSE"], "dataset"),
    "no model": (["finetune", "--task", "sst2"], "--model"),
    "no such data": (["finetune", "--model", "DENSE", "--dataset", "nowhere.csv"], "no file nowhere.csv"),
    "no such suite": (["finetune", "--model", "DENSE", "--suite", "glu", "--output", "OUT"], "glue"),
    "suite without output": (["finetune", "--model", "DENSE", "--suite", "glue"], "output"),
    "no such yaml": (["finetune", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "seeds": (["compare", "--model", "DENSE", "--task", "sst2", "--seeds", "a"], "0,1,2"),
    "variant": (["compare", "--model", "DENSE", "--task", "sst2", "--variants", "gegl", "--output", "OUT"], "geglu"),
    "variants say it": (
        ["compare", "--model", "DENSE", "--task", "sst2", "--to", "geglu", "--output", "OUT"],
        "to does",
    ),
    "seeds say it": (["compare", "--model", "DENSE", "--task", "sst2", "--seed", "0", "--output", "OUT"], "seed does"),
    "equal seeds": (
        ["compare", "--model", "DENSE", "--task", "sst2", "--seeds", "1,01", "--output", "OUT"],
        "1 is given",
    ),
    "equal variants": (
        ["compare", "--model", "DENSE", "--task", "sst2", "--variants", "geglu,geglu", "--output", "OUT"],
        "geglu and geglu are the same",
    ),
    "compare without output": (["compare", "--model", "DENSE", "--task", "sst2"], "--output"),
    "width without target": (["finetune", "--model", "DENSE", "--task", "sst2", "--width", "iso"], "without to"),
    "only without suite": (["finetune", "--model", "DENSE", "--task", "sst2", "--only", "rte"], "--suite"),
    "suite and baseline": (["finetune", "--model", "DENSE", "--suite", "glue", "--baseline"], "baseline"),
    "resume without output": (["finetune", "--model", "DENSE", "--task", "sst2", "--resume"], "--output"),
    "nothing to report": (["report", "nowhere"], "nowhere"),
    "split misspelt": (["convert", "DENSE", "OUT", "--split", "2+"], "write 2+14"),
    "split without top k": (["convert", "DENSE", "OUT", "--split", "2+6"], "--top-k, 1 to 6"),
    "split, top k": (["convert", "DENSE", "OUT", "--split", "2+6", "--top-k", "7"], "--top-k, 1 to 6"),
    "split, no texts": (["convert", "DENSE", "OUT", "--split", "2+6", "--top-k", "2"], "--calibration"),
    "split and to": (["convert", "DENSE", "OUT", "--split", "2+6", "--to", "geglu"], "leave --to out"),
    "split, width": (["convert", "DENSE", "--plan", "--split", "2+7", "--top-k", "2"], "don't divide the 40 units"),
    "layers to": (["convert", "DENSE", "OUT", "--to", "0=geglu", "--to", "swiglu"], "LAYERS=NAME"),
    "native": (["convert", "DENSE", "OUT", "--to", "geglu", "--native"], "T5"),
    "no such task": (["finetune", "--model", "DENSE", "--task", "sst22"], "sst2"),
    "epochs": (["finetune", "--model", "DENSE", "--task", "sst2", "--epochs", "0"], "epochs"),
    "nothing to run": (["run"], "needs a command"),
    "no such program": (["run", "--", "no-such-program"], "no-such-program"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, run, dense, tmp_path):
    arguments, words = BAD[case]
    paths = {"DENSE": dense, "OUT": tmp_path / "out"}
    code, out, err = run(*[paths.get(argument, argument) for argument in arguments])
    assert code == 2
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert err.startswith("hf-glu: ")
    assert not (tmp_path / "out").exists()


def _process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", "from hf_glu.cli import main; main()", *map(str, arguments)], **options, check=False
    )


def test_as_a_process(dense, tmp_path):
    done = _process("convert", dense, tmp_path / "out", "--to", "gegul", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("hf-glu: unknown gated activation 'gegul'")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_run_loads_the_plugin_into_other_programs():
    probe = "from transformers.activations import ACT2FN; import sys; from hf_glu.cli import run; "
    probe += "code = run(['activations', '--json']); sys.exit(7 if code == 0 and 'geglu' in ACT2FN else 1)"
    done = _process("run", "--", sys.executable, "-c", probe, capture_output=True, text=True)
    assert done.returncode == 7
    assert json.loads(done.stdout)["activations"]


def test_doctor(run):
    data = json_of(run("doctor", "--json"))
    assert data["healthy"]
    code, out, _ = run("doctor")
    assert code == 0
    assert "hook transformers.modeling_utils" in out


def test_version_and_help(run):
    assert run("--version")[:2] == (0, hf_glu.__version__ + "\n")
    code, out, _ = run("convert", "--help")
    assert code == 0
    assert "--plan" in out


@pytest.mark.slow
def test_a_program_that_is_run_ends_with_us(tmp_path):
    ready = tmp_path / "ready"
    child = f"import os, pathlib, time; pathlib.Path({str(ready)!r}).write_text(str(os.getpid())); time.sleep(300)"
    start = "import sys; from hf_glu.cli import main; main(sys.argv[1:])"
    ours = subprocess.Popen([sys.executable, "-c", start, "run", "--", sys.executable, "-c", child])
    deadline = time.monotonic() + 120
    while not (ready.is_file() and ready.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    ours.terminate()
    assert ours.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)


def test_help_imports_neither_torch_nor_transformers():
    found = "assert not {'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys; from hf_glu.cli import run; run(['--help']); {found}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bench" in done.stdout
