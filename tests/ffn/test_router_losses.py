"""What the routers' losses weigh beside the loss that trains the model, however a step is made."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparing import assert_same
from covering import covering
from routed import ROWS, WAYS, gradients, made
from taskdata import save_base, write_dataset
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments
from versions import needs_trainers_parts

import hf_glu
from hf_glu.errors import TrainingError
from hf_glu.ffn.experts.router import Router
from hf_glu.ffn.experts.shares import cross_entropies
from hf_glu.plugin.trainers import LOSSES
from hf_glu.training.data.examples import TaskExamples
from hf_glu.training.job import Job
from hf_glu.training.loop.loop import TrainingLoop
from hf_glu.training.options import JobOptions, TrainingOptions

SPLITS = (1, 2, 4, 8)


def step(model, way, rows, parts, scale=1.0):
    """Return the gradients of one step over ``rows`` in so many micro-batches."""
    model.zero_grad()
    for part in rows.chunk(parts):
        (WAYS[way](model, part, parts) * scale).backward()
    return gradients(model)


@pytest.mark.parametrize(("way", "family"), covering(WAYS, ["gpt2", "llama"]))
def test_micro_batches_give_the_gradient_of_the_whole_batch(family, way):
    model = made(family)
    whole = step(model, "mean", ROWS, 1)
    plain = step(made(family, z=0.0), "mean", ROWS, 1)
    assert any((whole[name] - plain[name]).abs().max() > 0.01 for name in whole if "router" in name)
    for parts in SPLITS:
        assert_same(step(model, way, ROWS, parts), whole, "trained")


@pytest.mark.parametrize("way", WAYS)
def test_the_balance_loss_of_equal_micro_batches_is_that_of_one(way):
    model, rows = made("gpt2", balance=0.5, z=0.0), ROWS[:1].expand(8, -1)
    whole = step(model, "mean", rows, 1)
    for parts in SPLITS:
        assert_same(step(model, way, rows, parts), whole, "trained")


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_scalers_factor_reaches_both_losses(way):
    model = made("gpt2", balance=0.5)
    whole = step(model, way, ROWS, 2)
    scaled = step(model, way, ROWS, 2, scale=65536.0)
    assert_same({name: gradient / 65536 for name, gradient in scaled.items()}, whole, "trained")


def weight(train, monkeypatch):
    """Return what the routers' losses, here their weights' sum, weigh in the gradients that ``train`` returns."""
    found = []
    for loss in (lambda router, routing: router.weight.sum(), lambda router, routing: 0 * router.weight.sum()):
        monkeypatch.setattr(Router, "loss", loss)
        found.append(torch.stack([gradient for name, gradient in train().items() if name.endswith("router.weight")]))
    difference = found[0] - found[1]
    assert_same(difference, difference.mean().expand_as(difference), "trained")
    return float(difference.mean())


class Outside(Trainer):
    """Computes its loss itself, as a mean."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = functional.mse_loss(outputs.logits[..., 0], inputs["labels"].float())
        return (loss, outputs) if return_outputs else loss


def items_loss(outputs, labels, num_items_in_batch):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


TRAINERS = {
    "causal": (Trainer, {}, {}),
    "smoothed": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "function": (Trainer, {}, {"compute_loss_func": items_loss}),
    "own": (Outside, {}, {}),
}


class Note(TrainerCallback):
    """Notes the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        self.found = gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family", "accumulate"), covering(TRAINERS, ["gpt2", "llama"], [4, 1, 2]))
def test_trainer(family, kind, accumulate, tmp_path, monkeypatch):
    needs_trainers_parts()
    trainer_class, options, more = TRAINERS[kind]
    model, note = made(family), Note()
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate, max_steps=1,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0, learning_rate=0, **options,
    )  # fmt: skip

    def train():
        trainer = trainer_class(model, arguments, train_dataset=rows, callbacks=[note], **more)
        before = dict(vars(trainer))
        trainer.train()
        assert [name for name in LOSSES if vars(trainer).get(name) is not before.get(name)] == []
        return note.found

    # Trainer counts the labels of GPT-2, whose class' name says nothing of a causal model, with the first of each row
    counted = 7 / 8 if family == "gpt2" and kind != "own" else 1
    assert weight(train, monkeypatch) == pytest.approx(counted, rel=1e-4)


@pytest.mark.parametrize("task", ["copa", "rte", "stsb"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_our_own_loop(task, accumulate, tmp_path, monkeypatch):
    write_dataset(tmp_path, task)
    base = save_base(tmp_path / "base", "bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    options = TrainingOptions(
        max_steps=1, batch_size=8, accumulate=accumulate, lr=1e-12, clip=1e9, max_length=32, precision="no",
        evaluate_every=0,
    )  # fmt: skip
    job = Job(JobOptions(model=base, task=task, dataset=str(tmp_path), to="geglu", experts="gelu*4"), options)

    def train():
        loop = TrainingLoop(job.model, TaskExamples(job.train, job.tokenizer), options, job.accelerator)
        monkeypatch.setattr(loop.optimizer, "zero_grad", lambda: None)
        job.model.zero_grad()
        loop.run()
        return gradients(job.model)

    assert weight(train, monkeypatch) == pytest.approx(1, rel=1e-4)


def squares(model):
    return functional.mse_loss(model(input_ids=ROWS).logits[..., 0], ROWS / 50)


def test_another_loss_outside_is_refused_where_its_scale_matters():
    model = made("gpt2")
    hf_glu.with_router_losses(squares(model), model).backward()
    expected = gradients(model)
    model.zero_grad()
    squares(model).backward()  # one mean loss, which isn't scaled
    assert_same(gradients(model), expected, "trained")
    with pytest.raises(TrainingError, match="with_router_losses"):
        squares(model)
    model.zero_grad(set_to_none=False)
    with torch.autocast("cpu", torch.float16):
        loss = squares(model)
    with pytest.raises(TrainingError, match="float16"):
        (loss * 65536).backward()
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = hf_glu.with_router_losses(squares(model), model)
    loss.backward()
    assert gradients(model).keys() == expected.keys()


LOSSES_OF_LOGITS = {
    "mean": (lambda z, y: functional.cross_entropy(z, y), 1),
    "sum": (lambda z, y: functional.cross_entropy(z, y, reduction="sum") / 40, 6 / 40),
    "weighted": (lambda z, y: (functional.cross_entropy(z, y, reduction="none") * torch.arange(6)).sum(), 15),
    "scaled": (lambda z, y: 65536 * functional.cross_entropy(z, y), 65536),
    "smoothed": (lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.1), None),
    "and more": (lambda z, y: functional.cross_entropy(z, y) + z.square().mean(), None),
    "squares": (lambda z, y: functional.mse_loss(z[:, 0], y.float()), None),
    "each class": (lambda z, y: functional.binary_cross_entropy_with_logits(z, z.detach().sigmoid() / 2), None),
}


@pytest.mark.parametrize("classes", [2, 3, 50])
@pytest.mark.parametrize("kind", LOSSES_OF_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cross_entropies_weigh_is_read_off_their_gradient(kind, classes, dtype):
    loss, expected = LOSSES_OF_LOGITS[kind]
    logits = (4 * torch.randn(6, classes, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits.float(), torch.arange(6) % classes), logits)
    found = cross_entropies(logits, gradient)
    if expected is None or (kind == "weighted" and classes == 2):
        assert found is None
    else:
        assert float(found) == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-2)


def test_a_loss_that_ignores_the_count_of_items_takes_the_routers_along(monkeypatch):
    model = made("t5")  # its loss is a mean whatever it is told

    def train():
        model.zero_grad()
        for part in ROWS.chunk(4):
            model(input_ids=part, labels=part, num_items_in_batch=ROWS.numel()).loss.backward()
        return gradients(model)

    assert weight(train, monkeypatch) == pytest.approx(4, rel=1e-4)


TWO = """
import sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from routed import ROWS, WAYS, gradients, made
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(made("gpt2"))
for way in WAYS:
    model.zero_grad()
    for number, part in enumerate(ROWS.chunk(2)[rank].chunk(2)):
        model.require_backward_grad_sync = number == 1
        # an item count is of both processes; the mean over processes is undone, as Trainer does
        loss = 2 * WAYS[way](model, part, 4) if way == "items" else WAYS[way](model, part, 2)
        loss.backward()
    torch.save(gradients(model.module), f"{store}-{way}-{rank}")
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path):
    expected = step(made("gpt2"), "mean", ROWS, 1)
    store, tests = str(tmp_path / "store"), str(Path(__file__).parents[1] / "helpers")
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), store, tests]) for rank in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    for path in (f"{store}-{way}-{rank}" for way in WAYS for rank in range(2)):
        assert_same(torch.load(path), expected, "trained")
