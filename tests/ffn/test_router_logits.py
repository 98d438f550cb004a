"""Router logits that are asked for, and losses that a trainer makes of what else a model returns."""

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from fused import FusedTrainer
from pico import make_native
from routed import ROWS, gradients, made
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from versions import needs_trainers_parts

import hf_glu
from hf_glu.activation.context.passes import asking
from hf_glu.config.experts import ExpertOptions
from hf_glu.config.router_fields import router_fields
from hf_glu.conversion.forms import ConfigEntry
from hf_glu.errors import OptionError, TrainingError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.asked import RouterLogits, balance_loss
from hf_glu.ffn.experts.losses import watch
from hf_glu.ffn.experts.router import Router

MASK = (torch.arange(8) < torch.tensor([8, 8, 5, 8, 6, 8, 3, 8]).unsqueeze(1)).long()
LABELS = ROWS.masked_fill(MASK == 0, -100)


def exact(family="llama", balance=0.5, z=0.1):
    return made(family, balance=balance, z=z).double()


def routed(model, call):
    """Return what ``call`` returns, and the routers' logits, of the model as no loss is injected: in evaluation."""
    found = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda m, a, out: found.append(out.logits)) for router in routers]
    result = call(model.eval())
    for hook in hooks:
        hook.remove()
    return result, found


def z_loss(logits, z, mask):
    squares = logits.logsumexp(-1).square()
    return z * (squares * mask.flatten()).sum() / mask.sum()


def own_balance(logits, mask):
    scores, count = logits.softmax(-1), logits.shape[-1]
    used = functional.one_hot(scores.topk(2).indices, count).sum(1).double() * mask.reshape(-1, 1)
    return count * (used.sum(0) / mask.sum() * (scores * mask.reshape(-1, 1)).sum(0) / mask.sum()).sum()


def explicit(model, *, asked, coefficient, z=0.1, parts=1):
    """Return the gradients of one step, of losses that are all written out, in micro-batches of equally many rows."""
    model.zero_grad()
    count = (LABELS[:, 1:] != -100).sum()
    for rows, mask, labels in zip(ROWS.chunk(parts), MASK.chunk(parts), LABELS.chunk(parts), strict=True):
        call = lambda m, rows=rows, mask=mask: m(input_ids=rows, attention_mask=mask, output_router_logits=False).logits  # noqa: E731
        logits, routers = routed(model, call)
        share = (labels[:, 1:] != -100).sum() / count
        main = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        extra = sum(z_loss(each, z, mask) for each in routers) * share
        if asked:
            extra = extra + coefficient * load_balancing_loss_func(tuple(routers), 4, 2, mask) / parts
        else:
            extra = extra + coefficient * sum(own_balance(each, mask) for each in routers) * share
        (main * share + extra).backward()
    return gradients(model)


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


class Note(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        self.found = gradients(model)


def trained(model, kind, parts, tmp_path, **more):
    needs_trainers_parts()
    note = Note()
    rows = [{"input_ids": r, "attention_mask": m, "labels": y} for r, m, y in zip(ROWS, MASK, LABELS, strict=True)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, max_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0, learning_rate=0,
        train_sampling_strategy="sequential", **more,
    )  # fmt: skip
    trainer = kind(model, arguments, train_dataset=rows, callbacks=[note])
    trainer.train()
    return note.found


class Silent(FusedTrainer):
    asks = False


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", [FusedTrainer, Silent])
def test_a_trainer_of_log_probabilities_trains_every_loss_once(kind, parts, tmp_path):
    model = exact()
    expected = explicit(copy.deepcopy(model), asked=kind.asks, coefficient=0.5, parts=parts)
    assert_near(trained(model, kind, parts, tmp_path), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_coefficient_no_balance_loss(checkpointing, tmp_path):
    model = exact()
    model.config.router_aux_loss_coef = 0
    expected = explicit(copy.deepcopy(model), asked=False, coefficient=0)
    more = {"gradient_checkpointing": True} if checkpointing else {}
    assert_near(trained(model, FusedTrainer, 1, tmp_path, **more), expected)


def test_checkpointing_computes_the_same_losses_again(tmp_path):
    model = exact()
    expected = explicit(copy.deepcopy(model), asked=True, coefficient=0.5)
    assert_near(trained(model, FusedTrainer, 1, tmp_path, gradient_checkpointing=True), expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant"):
        model.train()(input_ids=ROWS, output_router_logits=True)


def own_loss(model):
    output = model(input_ids=ROWS, attention_mask=MASK, labels=LABELS)
    loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    aux = getattr(output, "aux_loss", None)
    return output.loss, loss if aux is None else loss + 0.5 * aux


@pytest.mark.parametrize("asked", [False, True])
def test_a_loss_of_ones_own_beside_one_that_is_ignored(asked):
    model = exact()
    model.config.output_router_logits = asked
    expected = explicit(copy.deepcopy(model), asked=asked, coefficient=0.5)
    model.train()
    for change in (lambda ignored, own: own, lambda ignored, own: 3 * own, lambda ignored, own: (ignored + own) / 2):
        model.zero_grad()
        ignored, own = own_loss(model)
        both = hf_glu.with_router_losses(own, model)
        torch.testing.assert_close(both, ignored, check_dtype=False)  # in value, too
        assert hf_glu.with_router_losses(both, model) is both
        change(ignored, both).backward()
        factor = 3 if change(1.0, 1.0) == 3 else 1
        assert_near({name: gradient / factor for name, gradient in gradients(model).items()}, expected)


def test_what_an_ignored_loss_leaves_is_read_off_the_logits():
    model = exact()
    expected = explicit(copy.deepcopy(model), asked=False, coefficient=0.5, parts=4)
    model.train().zero_grad()
    count = (LABELS[:, 1:] != -100).sum()
    for rows, mask, labels in zip(ROWS.chunk(4), MASK.chunk(4), LABELS.chunk(4), strict=True):
        logits = model(input_ids=rows, attention_mask=mask, labels=labels).logits[:, :-1]
        (functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count).backward()
    assert_near(gradients(model), expected)


class Around(nn.Module):
    """Wraps a model, and takes its loss or makes its own."""

    def __init__(self, inner, own):
        super().__init__()
        self.inner, self.own = inner, own

    def forward(self, **inputs):
        output = self.inner(**inputs)
        if self.own:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
        return output


@pytest.mark.parametrize("own", [False, True])
def test_a_model_around_one_adds_nothing_twice(own):
    model = exact()
    expected = explicit(copy.deepcopy(model), asked=False, coefficient=0.5)
    around = Around(model, own).train()
    watch(around)
    around.zero_grad()
    around(input_ids=ROWS, attention_mask=MASK, labels=LABELS).loss.backward()
    assert_near(gradients(model), expected)


def test_adapters_around_a_model_hand_the_question_on():
    peft = pytest.importorskip("peft")
    model = exact()
    expected = explicit(copy.deepcopy(model), asked=True, coefficient=0.5)
    wrapped = peft.get_peft_model(model.train(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.requires_grad_(True).zero_grad()
    output = wrapped(input_ids=ROWS, attention_mask=MASK, labels=LABELS, output_router_logits=True)
    assert hf_glu.with_router_losses(output.loss, wrapped) is output.loss
    output.loss.backward()
    found = {name.replace("base_layer.", ""): value for name, value in gradients(model).items() if "lora" not in name}
    assert_near(found, expected)


def test_autocast_rounds_no_balance_loss():
    with torch.autocast("cpu", torch.bfloat16):
        output = made("llama")(input_ids=ROWS, output_router_logits=True)
    expected = load_balancing_loss_func(output.router_logits, 4, 2)
    torch.testing.assert_close(output.aux_loss, expected)


@pytest.mark.parametrize("where", ["call", "config"])
@pytest.mark.parametrize("training", [False, True])
def test_a_plain_call_adds_the_balance_loss_as_stock_heads_do(where, training):
    model = exact()
    expected = explicit(copy.deepcopy(model), asked=True, coefficient=0.5)
    model.train(training)
    more = {"output_router_logits": True} if where == "call" else {}
    model.config.output_router_logits = where == "config"
    model.zero_grad()
    output = model(input_ids=ROWS, attention_mask=MASK, labels=LABELS, **more)
    assert [list(each.shape) for each in output.router_logits] == [[64, 4]] * 2
    aux = load_balancing_loss_func(output.router_logits, 4, 2, MASK)
    torch.testing.assert_close(output.aux_loss, aux, check_dtype=False)
    torch.testing.assert_close(output["aux_loss"], output.aux_loss)
    logits = output.logits[:, :-1].flatten(0, 1)
    main = functional.cross_entropy(logits, LABELS[:, 1:].flatten()) + 0.5 * output.aux_loss
    extra = sum(z_loss(each, 0.1, MASK) for each in output.router_logits) if training else 0
    torch.testing.assert_close(output.loss, main + extra, check_dtype=False)
    if training:
        output.loss.backward()
        assert_near(gradients(model), expected)
    off = model(input_ids=ROWS, attention_mask=MASK, output_router_logits=False)
    assert not hasattr(off, "router_logits")


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_base_models_and_heads_of_any_family_return_them(family):
    model = made(family)
    both = {"decoder_input_ids": ROWS[:, :5]} if family == "t5" else {}
    output = model(input_ids=ROWS, output_router_logits=True, **both)
    layers = len(find_experts(model))
    sizes = [[64, 4]] * layers if family != "t5" else [[64, 4]] * (layers // 2) + [[40, 4]] * (layers // 2)
    assert [list(each.shape) for each in output.router_logits] == sizes
    assert all(each.requires_grad for each in (*output.router_logits, output.aux_loss))
    base = model.encoder if family == "t5" else model.base_model
    output = base(input_ids=ROWS, output_router_logits=True)
    assert len(output.router_logits) == (layers // 2 if family == "t5" else layers)
    assert not hasattr(output, "aux_loss")
    assert output.last_hidden_state.shape == (8, 8, model.config.hidden_size)


def test_a_tuple_is_refused():
    model = made("llama")
    with pytest.raises(OptionError, match="return_dict=True"):
        model(input_ids=ROWS, output_router_logits=True, return_dict=False)
    assert asking() is None
    assert len(model(input_ids=ROWS, return_dict=False)[0]) == 8


def test_the_balance_loss_is_that_of_transformers():
    logits = [torch.randn(64, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for mask in (None, MASK):
        counts = None if mask is None else mask.flatten().float()
        found = balance_loss([RouterLogits(each, counts, 3, 0.0) for each in logits])
        torch.testing.assert_close(found, load_balancing_loss_func(tuple(logits), 6, 3, mask))
    with pytest.raises(OptionError, match="2 of 4, 2 of 6"):
        balance_loss([RouterLogits(torch.randn(3, count), None, 2, 0.0) for count in (4, 6)])


def test_nothing_is_kept_after_a_pass():
    model = made("llama")
    output = model(input_ids=ROWS, labels=ROWS, output_router_logits=True)
    kept = weakref.ref(output.router_logits[0])
    copy.deepcopy(model)
    del output
    gc.collect()
    assert kept() is None
    assert asking() is None
    with pytest.raises(IndexError):
        model(input_ids=ROWS + 1000, output_router_logits=True)
    assert asking() is None
    model.eval()
    model(input_ids=ROWS, labels=ROWS).loss.backward()  # what a pass in evaluation gives has no routers' losses
    assert hf_glu.with_router_losses(kept_loss := model.lm_head.weight.sum(), model) is kept_loss


def test_the_config_says_what_the_experts_are(tmp_path):
    model = made("llama")
    hf_glu.convert(plain := type(model)(type(model.config)(**SMALL)), "swiglu", experts="swiglu*4", check=False)
    options, config = ExpertOptions.from_dict(plain.config.hf_glu["experts"]), plain.config
    said = config.router_aux_loss_coef, config.num_experts, config.num_experts_per_tok, config.output_router_logits
    assert said == (options.balance, options.count, options.top_k, False)
    config.router_aux_loss_coef = 0.25
    plain.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.router_aux_loss_coef == 0.25 == loaded.config.hf_glu["experts"]["balance"]
    old = type(config)(**SMALL, hidden_act="swiglu", hf_glu={"experts": {"groups": "swiglu*4", "balance": 0.125}})
    built = type(model)(old)
    assert (built.config.router_aux_loss_coef, built.config.num_experts) == (0.125, 4)
    built.config.router_aux_loss_coef = "much"
    with pytest.raises(OptionError, match="router_aux_loss_coef"):
        built(input_ids=ROWS)


def test_no_native_config_is_changed_and_what_takes_experts_away_takes_the_fields():
    native = make_native("mixtral").config
    assert router_fields(native, ExpertOptions(groups="swiglu*4")) == {}
    config = made("llama").config
    fields = router_fields(config, ExpertOptions(groups="swiglu*4")).keys()
    assert len(fields) == 4
    assert fields <= vars(config).keys()
    ConfigEntry(config=config, activations={None: "silu"}, options=None).write()
    assert fields.isdisjoint(vars(config))


SMALL = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


TWO = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fused import FusedTrainer
from routed import ROWS, gradients, made
from transformers import TrainerCallback, TrainingArguments

class Note(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        self.found = gradients(getattr(model, "module", model))

class Kind(FusedTrainer):
    asks = sys.argv[4] == "asks"

arguments = TrainingArguments(
    sys.argv[1], per_device_train_batch_size=int(sys.argv[3]), gradient_accumulation_steps=2, max_steps=1, use_cpu=True,
    report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0, learning_rate=0,
)
rows = [{"input_ids": row, "labels": row} for row in ROWS[:1].expand(8, -1)]
trainer = Kind(made("llama", balance=0.5), arguments, train_dataset=rows, callbacks=[note := Note()])
trainer.train()
if trainer.is_world_process_zero():
    torch.save(note.found, Path(sys.argv[1]) / f"gradients{trainer.accelerator.num_processes}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("asks", ["asks", "silent"])
def test_two_processes_train_every_loss_once(asks, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    tests = str(Path(__file__).parents[1] / "helpers")
    for count in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        told = [str(tmp_path / "two.py"), str(tmp_path), tests, str(4 // count), asks]
        subprocess.run([*launch, *told], check=True, timeout=300)
    one, two = (torch.load(tmp_path / f"gradients{count}") for count in (1, 2))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
