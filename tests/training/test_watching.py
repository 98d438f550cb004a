"""Watching a training: in our loop and under Trainer, the record, trackers, events, which are told once, resumes."""

from __future__ import annotations

import enum
import json
import sys
import warnings
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import accelerate.tracking
import pytest
import torch
from comparing import assert_same
from pico import FAMILIES, make_native
from short_training import interrupt_at
from taskdata import save_base, write_dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from typed import untyped

import hf_glu
from hf_glu import cli
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.experts import find_experts
from hf_glu.publishing.report.watched import events, figures
from hf_glu.training import job as job_module
from hf_glu.training.job import Job, run_job
from hf_glu.training.loop import loop as loop_module
from hf_glu.training.loop.alerts import Alerts
from hf_glu.training.loop.interrupt import Interrupted
from hf_glu.training.loop.watching import metrics
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.results import StepLine

OPTIONS = TrainingOptions(
    max_steps=4, batch_size=4, lr=1e-3, max_length=32, precision="no", evaluate_every=0, eval_batch_size=8, log_every=2
)
NAMES = ("load_entropy", "router_entropy", "load_least", "load_most", "dead")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_dataset(folder / "data", "rte")
    return {"data": str(folder / "data"), **{name: save_base(folder / name, name) for name in ("bert", "t5")}}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(job_module, "reloads_equal", lambda *_: True)


def job_of(bases: dict[str, str], family: str = "bert", **more: Any) -> JobOptions:
    return JobOptions(model=bases[family], task="rte", dataset=bases["data"], **more)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def lines_of(folder: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_with_experts_is_watched_and_trains_the_same(bases, tmp_path, quick):
    job = job_of(bases, to="geglu", experts="gelu*2,geglu*2")
    options = replace(OPTIONS, accumulate=3, evaluate_every=3)
    for name, watch in (("on", None), ("off", False)):
        run_job(replace(job, output=str(tmp_path / name)), replace(options, watch=watch))
    assert_same(*(dict(load_model(tmp_path / name).state_dict()) for name in ("on", "off")), "bitwise")
    on, off = lines_of(tmp_path / "on"), lines_of(tmp_path / "off")
    assert [line["step"] for line in on] == [line["step"] for line in off] == [2, 3, 4]
    before = 0
    for line, other in zip(on, off, strict=True):
        assert not untyped(line, StepLine)
        assert (line["loss"], "watched" in other) == (other["loss"], False)
        assert [row["tokens"] for row in line["watched"]["experts"]] == [line["tokens"] - before] * 2
        before = line["tokens"]
    drawn = figures("watched", on)
    assert [drawing is not None for drawing in drawn] == [True, True, True, False]
    assert drawn[0].alt.startswith("Lines: entropy of the load")
    assert not any(figures("watched", off))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_dense_models_are_watched_where_that_is_asked_for(family, bases, tmp_path, quick):
    for watch in (None, True):
        run_job(job_of(bases, family, output=str(tmp_path / str(watch))), replace(OPTIONS, watch=watch))
    assert not any("watched" in line for line in lines_of(tmp_path / "None"))
    (_, line) = lines_of(tmp_path / "True")
    assert not untyped(line, StepLine)
    assert line["watched"]["experts"] == []
    assert len(line["watched"]["gates"]) == {"bert": 2, "t5": 4}[family]


def told(records: Any) -> list[str]:
    return [str(each.message) for each in records]


@pytest.mark.slow
def test_a_resumed_run_watches_and_tells_as_the_uninterrupted_one(bases, tmp_path, monkeypatch, quick):
    job = job_of(bases, to="geglu", experts="gelu*2,geglu*2")
    options = replace(OPTIONS, max_steps=6, log_every=1, batch_size=16)

    def one_expert(self, *args):  # the others die
        weight = next(iter(find_experts(self.plain).values())).router
        weight.weight.data.zero_()  # equal scores go in the experts' order: only the first two are used

    plain = loop_module.TrainingLoop._step
    monkeypatch.setattr(loop_module.TrainingLoop, "_step", lambda self: (one_expert(self), plain(self))[1])
    with pytest.warns(UserWarning, match="experts") as whole:
        run_job(replace(job, output=str(tmp_path / "whole")), options)
    assert [text.partition(":")[0] for text in told(whole)] == ["Dead experts", "Uneven experts"]
    assert "experts 2, 3 of bert.encoder.layer.0" in told(whole)[0]
    parts = replace(job, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.warns(UserWarning, match="experts"), pytest.raises(Interrupted):
            run_job(parts, options)
    run_job(parts, options, resume=True)  # what has been told isn't told again: warnings are errors here
    assert [(line["watched"], line.get("alerts")) for line in lines_of(tmp_path / "parts")] == [
        (line["watched"], line.get("alerts")) for line in lines_of(tmp_path / "whole")
    ]
    assert_same(*(dict(load_model(tmp_path / name).state_dict()) for name in ("parts", "whole")), "bitwise")
    assert events(lines_of(tmp_path / "whole")).rows == [["1", text] for text in told(whole)]
    off = replace(options, watch=False)
    assert run_job(parts, off, resume=True)["training"]["steps"] == 6, "it is no other run"


def test_an_interrupted_run_leaves_no_hook(bases, monkeypatch):
    made = Job(job_of(bases, to="geglu", experts="2"), OPTIONS)
    before = hooks(made.model)
    monkeypatch.setattr(loop_module.TrainingLoop, "_flush", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.fit()
    assert hooks(made.model) == before


def test_an_example_of_another_process_is_not_counted_twice(bases, tmp_path, monkeypatch, quick):
    # one process of two that share batches of 1: in each, one has nothing of its own
    monkeypatch.setattr(loop_module, "share", lambda batch, process, processes, accumulate: [[]])
    run_job(job_of(bases, to="geglu", experts="2", output=str(tmp_path / "run")), replace(OPTIONS, batch_size=1))
    assert all(line["watched"] == {"experts": [], "gates": []} for line in lines_of(tmp_path / "run"))


def test_watching_a_compiled_training_is_one_line(tmp_path, capsys):
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        cli.main(["finetune", "--model", "m", "--watch", "--compile", "--task", "rte", "--output", str(output)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "leave one of them out" in said
    assert not output.exists()


# events


def experts_row(load: list[float], balance: float, tokens: int = 1000, **more: Any) -> dict[str, Any]:
    dead = [n for n, share in enumerate(load) if not share]
    return {"site": "h.0.mlp", "layer": 0, "stack": None, "tokens": tokens, "top_k": 2, "load": load,
            "load_entropy": balance, "router_entropy": 1.0, "dead": dead, **more}  # fmt: skip


def gates_row(dead: float, tokens: int = 1000) -> dict[str, Any]:
    return {"site": "h.0.mlp", "layer": 0, "stack": None, "tokens": tokens, "units": 40, "dead": dead}


def titles(alerts: Alerts, *, experts: Any = (), gates: Any = ()) -> list[str]:
    return [alert.title for alert in alerts.find({"experts": list(experts), "gates": list(gates)})]


def test_events_are_told_once_until_they_are_over():
    alerts = Alerts()
    alive, dead, rare = [0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.49, 0.49, 0.01, 0.01]
    said = [titles(alerts, experts=[experts_row(load, 0.9)]) for load in (alive, dead, dead, rare, dead, alive, dead)]
    assert said == [[], ["Dead experts"], [], [], [], [], ["Dead experts"]]
    (one,) = alerts.find({"experts": [experts_row([0.4, 0.0, 0.0, 0.6], 0.9)], "gates": []})
    assert one.text == "expert 1 of h.0.mlp: none of the last 1,000 tokens"
    alerts = Alerts()
    said = [titles(alerts, experts=[experts_row(alive, even)]) for even in (0.8, 0.69, 0.5, 0.72, 0.69, 0.76, 0.6)]
    assert said == [[], ["Uneven experts"], [], [], [], [], ["Uneven experts"]]
    alerts = Alerts()
    said = [titles(alerts, gates=[gates_row(dead)]) for dead in (0.2, 0.3, 0.9, 0.22, 0.3, 0.1, 0.3)]
    assert said == [[], ["Dead gates"], [], [], [], [], ["Dead gates"]]
    again = Alerts(active=alerts.active)
    assert titles(again, gates=[gates_row(0.3)]) == []


def test_too_few_tokens_tell_nothing():
    few = experts_row([1.0, 0.0, 0.0, 0.0], 0.0, tokens=19)
    assert titles(Alerts(), experts=[few], gates=[gates_row(1.0, tokens=255)]) == []
    assert titles(Alerts(), experts=[{**few, "tokens": 20}]) == ["Dead experts", "Uneven experts"]
    for wrong in ({"balance": 1.5}, {"dead_gates": -0.1}):
        with pytest.raises(OptionError, match="between 0 and 1"):
            Alerts(**wrong)


def test_names_in_trackers():
    row, more = experts_row([0.75, 0.25], 0.8), {"site": "encoder.block.3.layer.1", "layer": 3, "stack": "encoder"}
    found = metrics({"experts": [row, {**row, **more}], "gates": [gates_row(0.1), {**gates_row(0.3), **more}]})
    assert {name for name in found if "layer" in name} == {
        *(f"experts/{place}/{name}" for place in ("layer_0", "encoder/layer_3") for name in NAMES),
        "gates/layer_0/dead",
        "gates/encoder/layer_3/dead",
    }
    assert found["experts/layer_0/load_most"] == 0.75
    assert found["gates/dead"] == pytest.approx(0.2)
    assert found["experts/load_entropy"] == pytest.approx(0.8)
    twice = metrics({"experts": [], "gates": [gates_row(0.1), {**gates_row(0.3), "site": "h.0.other"}]})
    assert set(twice) == {"gates/h.0.mlp/dead", "gates/h.0.other/dead", "gates/dead"}


class AlertLevel(str, enum.Enum):  # noqa: UP042  as trackio has it
    INFO, WARN, ERROR = "info", "warn", "error"


@pytest.fixture
def trackio(monkeypatch):
    """Put a module in the place of trackio that has the signatures of its documentation, and keeps what it is told."""
    fake: Any = ModuleType("trackio")
    fake.__spec__, fake.__version__ = ModuleSpec("trackio", None), "0.25.0"
    fake.AlertLevel, fake.config, fake.told, fake.logged = AlertLevel, {}, [], []
    fake.context_vars = type("Vars", (), {"current_space_id": type("Var", (), {"get": staticmethod(lambda: None)})})

    class Run:
        def log(self, metrics, step=None):
            fake.logged.append((step, metrics))

        def finish(self):
            pass

    def alert(title, text=None, level=AlertLevel.WARN, webhook_url=None):
        fake.told.append((len(fake.logged), title, text, level))

    fake.init = lambda project, name=None, **more: Run()
    fake.log = lambda metrics, step=None: fake.logged.append((step, metrics))
    fake.finish, fake.alert = lambda: None, alert
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tracker = accelerate.tracking.LoggerType.TRACKIO
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [tracker])
    return fake


def test_trackio_is_told_by_its_alerts(bases, monkeypatch, trackio):
    plain = loop_module.TrainingLoop._step

    def stepping(self):
        next(iter(find_experts(self.plain).values())).router.weight.data.zero_()
        return plain(self)

    monkeypatch.setattr(loop_module.TrainingLoop, "_step", stepping)
    options = replace(OPTIONS, tracker="trackio", batch_size=16)
    run_job(job_of(bases, to="geglu", experts="gelu*2,geglu*2"), options)  # no warning, which would be an error
    assert [(title, level) for _, title, _, level in trackio.told] == [
        ("Dead experts", AlertLevel.WARN),
        ("Uneven experts", AlertLevel.WARN),
    ]
    assert trackio.told[0][0] == 1, "after the line that it is about"
    step, logged = trackio.logged[0]
    assert step == 2
    assert {f"experts/layer_1/{name}" for name in NAMES} <= set(logged)
    assert logged["experts/dead"] >= 2
    assert not {"watched", "alerts"} & set(logged)


# Trainer


class Ids(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(5, 60, (24, 12), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": self.ids[number], "labels": self.ids[number]}


def trainer_of(model: Any, folder: Any, *callbacks: TrainerCallback, **more: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**settings, **more})
    return Trainer(model, arguments, train_dataset=Ids(), eval_dataset=Ids(), callbacks=list(callbacks))


def experts() -> Any:
    model = FAMILIES["gpt2"].make("GPT2LMHeadModel")
    hf_glu.convert(model, "geglu_new", experts="gelu_new*2,geglu_new*2", check=False)
    for ffn in find_experts(model).values():
        nn.init.normal_(ffn.router.weight)
    return model


MADE = {
    "ours": experts,
    "mixtral": lambda: make_native("mixtral", num_local_experts=4),
    "dense": lambda: make_native("llama"),
}


MORE = {"gradient_checkpointing": True, "bf16": True, "eval_strategy": "steps"}
OTHERS = (("ours", {}), ("mixtral", MORE), ("dense", {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [("ours", MORE), *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_the_trainer_is_watched_and_trains_the_same(name, more, tmp_path):
    trained, names, left = [], [], []
    for callbacks in ([hf_glu.WatchCallback(balance=0.0, dead_gates=1.0)], []):
        model = MADE[name]()
        before = hooks(model)
        trainer = trainer_of(model, tmp_path, *callbacks, **more)
        trainer.train()
        left.append(hooks(model) - before)  # the trainer's own, for gradient checkpointing
        trained.append(dict(model.state_dict()))
        names.append([set(line) for line in trainer.state.log_history])
    assert_same(*trained, "bitwise")
    assert left[0] == left[1]
    with_watch, plain = names
    added = [one - other for one, other in zip(with_watch, plain, strict=True)]
    told = [line for line, known in zip(added, plain, strict=True) if "loss" in known]
    assert len(told) == 2
    assert all(any(name.startswith(("experts/layer_1/", "gates/layer_1/")) for name in line) for line in told)
    assert not any(line for line, known in zip(added, plain, strict=True) if "loss" not in known)


def test_the_trainers_logs_are_the_counts_of_all_its_micro_batches(tmp_path):
    model, seen = make_native("mixtral", num_local_experts=4), []
    gate = model.model.layers[0].mlp
    gate.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
    trainer = trainer_of(model, tmp_path, hf_glu.WatchCallback(balance=0.0), max_steps=2)
    trainer.train()
    count = torch.bincount(torch.cat(seen).flatten(), minlength=4) / (2 * 2 * 2 * 12 * 2)
    logged = next(line for line in trainer.state.log_history if "loss" in line)
    assert logged["experts/layer_0/load_most"] == pytest.approx(float(count.max()))
    assert logged["experts/layer_0/load_least"] == pytest.approx(float(count.min()))


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise ZeroDivisionError


def test_hooks_are_gone_after_an_exception_in_the_trainer(tmp_path):
    model = experts()
    before, watch = hooks(model), hf_glu.WatchCallback()
    with pytest.raises(ZeroDivisionError):
        trainer_of(model, tmp_path, watch, Failing()).train()
    assert hooks(model) == before
    trainer_of(model, tmp_path, watch).train()
    assert hooks(model) == before


@pytest.mark.slow
def test_trackio_is_told_by_the_trainer(tmp_path, trackio):
    model = experts()
    for ffn in find_experts(model).values():
        ffn.router.weight.requires_grad_(False).zero_()
    trainer_of(model, tmp_path, hf_glu.WatchCallback(), report_to=["trackio"], max_steps=6).train()
    assert [title for _, title, _, _ in trackio.told] == ["Dead experts", "Uneven experts"] * 2
    assert {at for at, *_ in trackio.told} == {1}
    assert "train/experts/layer_1/load_entropy" in trackio.logged[0][1]
    del trackio.alert  # an older version
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer_of(model, tmp_path, hf_glu.WatchCallback(), report_to=["trackio"], max_steps=2).train()
    assert sum("experts" in text for text in told(found)) == 4


def test_what_the_callback_refuses(tmp_path):
    with pytest.raises(OptionError, match="dead_gates must be between 0 and 1"):
        hf_glu.WatchCallback(dead_gates=2)
    with pytest.raises(OptionError, match=r"torch\.compile"):
        trainer_of(experts(), tmp_path, hf_glu.WatchCallback(), torch_compile=True).train()
    with pytest.raises(NoSiteError, match="neither experts nor FFNs"):
        model = FAMILIES["gpt2"].make("GPT2LMHeadModel")
        del model.transformer.h[:]
        trainer_of(model, tmp_path, hf_glu.WatchCallback()).train()
