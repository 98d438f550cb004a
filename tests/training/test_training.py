"""Parameter groups, the order of batches, learning rates, and the stock Trainer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from comparing import assert_same, outputs
from huggingface_hub.errors import StrictDataclassError
from pico import FAMILIES
from taskdata import make_rows, save_base
from transformers import Trainer, TrainingArguments

import hf_glu
from hf_glu.bench.coverage.tiny import model_types, tiny_model
from hf_glu.tasks import TASKS
from hf_glu.training.data.features import make_features
from hf_glu.training.data.models import load_for_task
from hf_glu.training.loop.accelerating import make_optimizer
from hf_glu.training.loop.batches import BatchPlan, share
from hf_glu.training.loop.schedules import make_schedule
from hf_glu.training.options import TrainingOptions
from hf_glu.training.parameters.gates import train_only_gates


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_groups(family):
    model = FAMILIES[family].make()
    hf_glu.convert(model, FAMILIES[family].exact)
    groups = hf_glu.parameter_groups(model, 1e-3, 0.1)
    by_decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})
    for site in hf_glu.find_sites(model):
        assert id(site.in_proj.bias) in by_decay[0.0]
        assert id(site.in_proj.weight) in by_decay[0.1]
    assert all(id(p) in by_decay[0.0] for p in model.parameters() if p.ndim == 1)
    assert all(group["lr"] == 1e-3 for group in groups)


@pytest.mark.parametrize(
    "kind",
    [
        each if each in ("gpt_oss", "jamba", "bert") else pytest.param(each, marks=pytest.mark.slow)
        for each in model_types()
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_bias_and_no_rate_decays_in_any_family(kind):
    try:
        model = tiny_model(kind)
    except (ImportError, StrictDataclassError) as error:  # not here, or not so small
        pytest.skip(str(error))
    if kind == "bert":
        hf_glu.convert(model, "geglu", experts="gelu*2,geglu*2")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (decaying,) = [g["params"] for g in hf_glu.parameter_groups(model, 1e-3, 0.1) if g["name"] == "decay"]
    found = [names[id(p)] for p in decaying]
    assert not [name for name in found if "bias" in name or name.endswith(("A_log", ".D"))]


def test_parameter_groups_spare_scalars_of_activations_and_frozen_parameters():
    model = FAMILIES["gpt2"].make(activation_function="prelu_glu")
    model.transformer.wte.weight.requires_grad_(False)
    groups = {group["name"]: {id(p) for p in group["params"]} for group in hf_glu.parameter_groups(model, 1.0, 0.1)}
    for site in hf_glu.find_sites(model):
        assert id(site.act.phi.weight) in groups["no_decay"]
    assert id(model.transformer.wte.weight) not in groups["decay"] | groups["no_decay"]


def test_activations_may_have_a_learning_rate_of_their_own():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "modulated_stateful_moa_geglu_new", check=False, mix={"rank": 2})
    groups = {group["name"]: group for group in hf_glu.parameter_groups(model, 1e-3, 0.1, activation_lr=1e-2)}
    own = {id(p) for n, p in model.named_parameters() if ".shift." in n or ".mix" in n or "context_source" in n}
    wide = {id(p) for n, p in model.named_parameters() if n.endswith((".choice", ".features", "source.weight"))}
    own -= wide
    assert wide <= {id(p) for p in groups["no_decay"]["params"]}
    assert {id(p) for p in groups["activation"]["params"]} == own
    assert groups["activation"]["lr"] == 1e-2
    assert groups["activation"]["weight_decay"] == 0
    assert groups["decay"]["lr"] == 1e-3
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_parameter_groups_do_not_decay_projections_of_which_a_half_is_trained(family):
    model = FAMILIES[family].make()
    hf_glu.convert(model, FAMILIES[family].exact)
    train_only_gates(model)
    groups = {group["name"]: group for group in hf_glu.parameter_groups(model, 1e-3, 0.1)}
    masked = {id(p) for site in hf_glu.find_sites(model) for p in site.in_proj.parameters()}
    assert {id(p) for p in groups["masked"]["params"]} == masked
    assert groups["masked"]["weight_decay"] == 0
    assert not masked & {id(p) for name in groups if name != "masked" for p in groups[name]["params"]}
    train_only_gates(model, ("gate", "up"))
    groups = {group["name"]: group for group in hf_glu.parameter_groups(model, 1e-3, 0.1)}
    assert "masked" not in groups
    assert masked <= {id(p) for group in groups.values() for p in group["params"]}


def test_decay_leaves_the_up_bias_alone():
    model = FAMILIES["t5"].make()
    hf_glu.convert(model, "reglu")
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, 0.1, 0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for site in hf_glu.find_sites(model):
        assert_same(site.in_proj.bias[site.width :].detach(), torch.ones(site.width), "bitwise")
        assert site.in_proj.weight.abs().sum() > 0


@pytest.mark.parametrize("scaled", [False, True])
def test_the_loop_s_optimizer_is_adamw_in_one_kernel(scaled):
    model = FAMILIES["gpt2"].make().double()
    plain = copy.deepcopy(model)
    accelerator = SimpleNamespace(scaler=object() if scaled else None)
    mine = make_optimizer(hf_glu.parameter_groups(model, 1e-2, 0.1), accelerator)
    theirs = torch.optim.AdamW(hf_glu.parameter_groups(plain, 1e-2, 0.1), foreach=False, fused=False)
    assert bool(mine.param_groups[0]["fused"]) is not scaled  # a loss scale has to hear of steps left out
    for _ in range(3):
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        theirs.step()
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()), "formula")


def test_the_stock_trainer_trains_a_converted_model(tmp_path):
    base = save_base(tmp_path / "base")
    task = TASKS["movie_reviews"]
    model, tokenizer, _ = load_for_task(base, task)
    hf_glu.convert(model, "geglu")
    data = make_features(task, make_rows("movie_reviews", 32), tokenizer, max_length=16, text=False).data
    optimizer = torch.optim.AdamW(hf_glu.parameter_groups(model, 5e-3, 0.1))
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), max_steps=20, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        disable_tqdm=True, learning_rate=5e-3,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert len(optimizer.param_groups) == 2
    trainer.save_model(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert_same(again.state_dict(), model.state_dict(), "bitwise")
    assert_same(outputs(again.eval()), outputs(model.eval()), "exact")  # the base was loaded where the file lay


def test_every_example_once_an_epoch_whatever_the_processes():
    lengths = [1 + number % 7 for number in range(53)]
    plan, again = BatchPlan(lengths, 8, seed=3), BatchPlan(lengths, 8, seed=3)
    assert plan.steps_per_epoch == 7
    epochs = [[plan[epoch * 7 + step] for step in range(7)] for epoch in range(2)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch) == list(range(53))
    assert epochs[0] != epochs[1]
    assert again[11] == epochs[1][4]  # a resumed run asks for a step in the middle first
    assert BatchPlan(lengths, 8, seed=4)[0] != plan[0]
    for batch in epochs[0]:
        parts = [part for process in range(3) for part in share(batch, process, 3, 2)]
        assert sorted(index for part in parts for index in part) == sorted(batch)
    # all have as many passes, where weights are sharded; none more than it takes
    assert [share(list(range(5)), process, 2, 3) for process in (0, 1)] == [[[0], [2], [4]], [[1], [3], []]]
    assert [share([7], process, 2, 3) for process in (0, 1)] == [[[7]], [[]]]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epochs[0]]
    assert sum(spread) / len(spread) < 3


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1, 1)]
)
def test_learning_rates(schedule, middle, end):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make_schedule(optimizer, TrainingOptions(warmup=0.2, schedule=schedule), 100)
    rates = []
    for _ in range(101):
        rates.append(scheduler.get_last_lr()[0] / 2)
        optimizer.step()
        scheduler.step()
    assert (rates[0], rates[10], rates[20]) == (0, 0.5, 1)
    assert rates[60] == pytest.approx(middle)
    assert rates[100] == pytest.approx(end)
