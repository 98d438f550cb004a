"""Files and folders are there whole or not at all: full disks, kills, signals, damaged runs, odd destinations."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from comparing import assert_same
from datasets import Dataset
from pico import FAMILIES
from taskdata import make_rows, save_base

import hf_glu
from hf_glu import cli
from hf_glu.checkpoint.folders import check_destination, staged_folder
from hf_glu.checkpoint.jsonio import read_lines, read_object, write_json
from hf_glu.checkpoint.loading import load_model
from hf_glu.checkpoint.writing import PARTIAL, whole_file, write_text
from hf_glu.errors import CheckpointError, DataError, HfGluError
from hf_glu.publishing.card.card import write_card
from hf_glu.training import job as job_module
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.job import run_job
from hf_glu.training.loop import loop as loop_module
from hf_glu.training.loop.checkpoints import find_checkpoint, is_whole
from hf_glu.training.options import JobOptions, TrainingOptions

OPTIONS = TrainingOptions(
    max_steps=7,
    batch_size=4,
    lr=1e-3,
    max_length=32,
    precision="no",
    evaluate_every=2,
    patience=9,
    log_every=1,
    checkpoint_every=2,
)


@contextmanager
def small_disk(size: int):
    """Let no file grow beyond ``size`` bytes: a write fails as on a full disk, in every library and language."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def dense(tmp_path):
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out the reload in a fresh process, which other tests start."""
    monkeypatch.setattr(job_module, "reloads_equal", lambda *_: True)


def write_data(folder, rows=40, seed=0):
    Dataset.from_list(make_rows("movie_reviews", rows, seed=seed)).to_json(folder / "data.jsonl")
    return str(folder / "data.jsonl")


@pytest.fixture
def job(tmp_path):
    base = save_base(tmp_path / "base", "bert", hidden_dropout_prob=0.2)
    return JobOptions(model=base, dataset=write_data(tmp_path), to="geglu", output=str(tmp_path / "run"))


@pytest.fixture
def stopped(job, monkeypatch):
    """A run that Ctrl-C has ended after step 5: the checkpoint is of that step."""
    stop_at(monkeypatch, job, 4)
    return Path(str(job.output))


def stop_at(monkeypatch, job, step, **more):
    plain = loop_module.TrainingLoop._step

    def stepping(self):
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module.TrainingLoop, "_step", stepping)
        with pytest.raises(HfGluError, match="interrupted"):
            run_job(job, OPTIONS, **more)


def assert_the_same_run(job, resumed):
    """Compare a resumed run with one that nothing has happened to."""
    whole = replace(job, output=str(Path(str(job.output)).with_name("whole")))
    expected = run_job(whole, OPTIONS)
    assert resumed["metrics"] == expected["metrics"]
    states = [dict(load_model(each.folder).state_dict()) for each in (job, whole)]
    assert_same(states[0], states[1], "bitwise")

    def curve(each):
        lines = [json.loads(line) for line in (each.folder / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]

    assert curve(job) == curve(whole)
    assert not list(job.folder.glob("checkpoint-*"))
    assert not list(job.folder.glob(f"{PARTIAL}*"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"old": 1})
    with small_disk(2**16), pytest.raises(CheckpointError, match=r"run\.json can't be written: File too large"):
        write_json(path, {"new": "x" * 2**17})
    assert read_object(path) == {"old": 1}
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert read_object(path) == {"old": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(CheckpointError, match="Is a directory"):
        write_text(tmp_path, "text")


def test_links_and_devices_are_written_to_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    write_text(Path(os.devnull), "text")
    assert Path(os.devnull).is_char_device()


def test_names_that_are_no_utf8_are_written_and_read(tmp_path):
    name = os.fsdecode(b"run-\xff")
    write_json(tmp_path / "run.json", {name: name, "\u00e9": 1})
    assert read_object(tmp_path / "run.json") == {name: name, "\u00e9": 1}
    (tmp_path / "run.json").read_bytes().decode("utf-8")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "nul", "[" * 100_000, "1" * 5000, '{"a": 1}\n{'])
def test_broken_json_is_one_line(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(DataError, match=r"file\.json, line [12]"):
        read_object(tmp_path / "file.json")
    (tmp_path / "file.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match="UTF-8"):
        read_object(tmp_path / "file.json")


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_lines(path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [100, 3000, 30_000])
def test_a_full_disk_leaves_no_destination(size, stream, dense, tmp_path, capsys):
    transformers.utils.logging.disable_progress_bar()
    before = sorted(path.name for path in tmp_path.iterdir())
    with small_disk(size):
        code = cli.run(["convert", str(dense), str(tmp_path / "out"), "--to", "geglu", *["--stream"] * stream])
    said = capsys.readouterr().err
    assert code == 2
    assert "File too large" in said
    assert f"{tmp_path / 'out'} can't be written" in said or f"{tmp_path / 'out'}/" in said
    assert PARTIAL not in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_stops_a_training_that_goes_on_later(job, monkeypatch):
    plain = loop_module.TrainingLoop._step

    def stepping(self):
        if self.progress.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return plain(self)

    with monkeypatch.context() as patched, small_disk(resource.RLIM_INFINITY):
        patched.setattr(loop_module.TrainingLoop, "_step", stepping)
        with pytest.raises(CheckpointError, match="can't be written"):
            run_job(job, OPTIONS)
    assert [path.name for path in job.folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert_the_same_run(job, run_job(job, OPTIONS, resume=True))


def test_what_a_kill_leaves_is_in_nobodys_way(job, stopped):
    (stopped / f"{PARTIAL}1-1").write_text('{"half')
    (stopped / f"{PARTIAL}checkpoint").mkdir()
    with (stopped / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    half = stopped / "checkpoint-6"
    shutil.copytree(stopped / "checkpoint-5", half)
    os.truncate(half / "model.safetensors", 1000)
    (stopped / "checkpoint-best").mkdir()
    assert not is_whole(half)
    with pytest.warns(UserWarning, match=r"checkpoint-6 isn't whole"):
        resumed = run_job(job, OPTIONS, resume=True)
    shutil.rmtree(stopped / "checkpoint-best", ignore_errors=True)
    assert_the_same_run(job, resumed)


def test_a_run_killed_after_its_results_loses_its_checkpoints_when_it_is_resumed(job, stopped):
    left = job.folder.parent / "left"
    shutil.copytree(stopped / "checkpoint-5", left)
    finished = run_job(job, OPTIONS, resume=True)
    shutil.copytree(left, stopped / "checkpoint-5")
    assert run_job(job, OPTIONS, resume=True) == finished
    assert not list(stopped.glob("checkpoint-*"))
    (stopped / "results.json").write_text(json.dumps({**finished, "reloaded_equal": False}))
    with pytest.raises(CheckpointError, match="isn't the one that was evaluated"):
        run_job(job, OPTIONS, resume=True)


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "gone"])
def test_half_checkpoints_are_skipped(damage, stopped):
    place = stopped / "checkpoint-5"
    if damage == "missing":
        (place / "optimizer.bin").unlink()
    elif damage == "gone":
        (place / "progress.json").unlink()
    else:
        (place / "progress.json").write_text("" if damage == "empty" else '{"step": 5, "sec')
    with pytest.warns(UserWarning, match="isn't whole"):
        assert find_checkpoint(stopped) is None


def test_a_run_without_a_whole_checkpoint_begins_again(job, stopped):
    shutil.rmtree(stopped / "checkpoint-5")
    assert_the_same_run(job, run_job(job, OPTIONS, resume=True))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 3}'])
def test_a_broken_run_file_is_one_line(text, job, stopped):
    (stopped / "run.json").write_text(text)
    with pytest.raises(HfGluError, match=r"run\.json"):
        run_job(job, OPTIONS, resume=True)


def test_changed_data_are_refused(job, stopped, tmp_path):
    write_data(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="has changed"):
        run_job(job, OPTIONS, resume=True)
    write_data(tmp_path)
    assert_the_same_run(job, run_job(job, OPTIONS, resume=True))


def test_home_and_a_run_that_was_killed_before_its_card(job, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mine = replace(job, output="~/run", dataset=job.dataset)
    first = finetune_and_report(mine, OPTIONS, finish=write_card)
    place = tmp_path / "home" / "run"
    written = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert {"results.json", "hf_glu_report.json", "README.md"} <= set(written)
    (place / "README.md").unlink()
    (place / "hf_glu_report.json").unlink()
    with pytest.raises(CheckpointError, match="finished run"):
        finetune_and_report(mine, OPTIONS, finish=write_card)
    again = finetune_and_report(mine, OPTIONS, resume=True, finish=write_card)
    assert json.loads(json.dumps(again["outcome"])) == json.loads(json.dumps(first["outcome"]))
    assert (place / "README.md").read_bytes() == written["README.md"]
    assert (place / "model.safetensors").read_bytes() == written["model.safetensors"]


def test_destinations(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for given, final in (("~/out", "out"), (tmp_path / "link", "real"), (tmp_path / "dangling", "later")):
        hf_glu.convert_checkpoint(dense, given, "geglu")
        assert (tmp_path / final / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()
    strange = tmp_path / os.fsdecode(b"out-\xff")
    assert cli.run(["convert", str(dense), str(strange), "--to", "geglu"]) == 0
    assert (strange / "README.md").is_file()
    long = tmp_path / ("x" * 250)  # as long as a name may be, so that nothing can be added to it
    hf_glu.convert_checkpoint(dense, long, "geglu")
    assert (long / "config.json").is_file()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-here/out", "file/out", "loop"])
def test_destinations_that_cannot_be_are_refused_at_once(name, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError):
        check_destination(name)
    monkeypatch.setattr(job_module, "load_for_task", None)  # nothing has been loaded by then
    with pytest.raises(CheckpointError):
        run_job(replace(job, output=name), OPTIONS)


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="mount point"):
        check_destination(tmp_path / "out")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("swallowed", [None, "it goes on", "an error of its own"])
def test_signals_clean_up(number, error, swallowed, tmp_path):
    # a shell's background jobs ignore Ctrl-C
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)
    with pytest.raises(error), staged_folder(tmp_path / "out") as stage:
        (stage / "config.json").write_text("{}")
        try:
            os.kill(os.getpid(), number)
        except BaseException as stop:
            if swallowed is None:
                raise
            if swallowed == "an error of its own":  # a library's C or Rust, which a signal comes into
                raise ValueError("the function of the callback failed") from stop
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before
    with staged_folder(tmp_path / "out") as stage:  # the signal is forgotten
        (stage / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SWALLOWS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from hf_glu.cli import running as cli

def start_up(arguments):
    for number in (signal.SIGINT, signal.SIGTERM)[int(sys.argv[1]):]:
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            pass
    print("it went on")
    return 0

cli.run = start_up
cli.main([])
"""


@pytest.mark.parametrize(("which", "code"), [("0", 130), ("1", 143)])
def test_a_signal_at_start_up_is_not_swallowed(which, code):
    done = subprocess.run([sys.executable, "-c", SWALLOWS, which], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "hf-glu: interrupted\n")


def test_an_error_of_the_disk_anywhere_is_one_line(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, os.strerror(28), "somewhere")

    monkeypatch.setattr(hf_glu, "activations", full)
    assert cli.run(["activations"]) == 2
    assert capsys.readouterr().err == "hf-glu: somewhere: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from hf_glu.cli import main; main(['--version'])"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "hf-glu: No space left on device\n")


@pytest.mark.slow
def test_kills_leave_nothing_half_written():
    script = Path(__file__).parents[2] / "recipes" / "fuzz" / "kills.py"
    done = subprocess.run([sys.executable, script, "--count", "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 0 bad" in done.stdout
