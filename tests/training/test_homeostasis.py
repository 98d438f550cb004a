"""The penalty that keeps gates as open as they were."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same
from pico import FAMILIES, make_native

import hf_glu
from hf_glu.errors import NoSiteError, OptionError, TrainingError
from hf_glu.ffn.sites import find_sites


def trained(weight):
    """Train away from where the gates were; return how far they came, and the loss' parts in the first step."""
    torch.manual_seed(0)
    model = FAMILIES["gpt2"].make(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    hf_glu.convert(model, "stateful_geglu_new", check=False)
    ids = torch.randint(5, 60, (8, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    with hf_glu.homeostasis(model.train(), weight) as penalty:
        for _ in range(15):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not model._forward_hooks or penalty.add not in model._forward_hooks.values()
    last = {}
    handles = [
        site.act.register_forward_pre_hook(lambda act, args, n=site.name: last.update({n: args[0].chunk(2, -1)[0]}))
        for site in find_sites(model)
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    moved = [
        (last[n].sigmoid().flatten(0, -2).mean(0) - target).square().mean() for n, target in penalty.targets.items()
    ]
    return float(torch.stack(moved).mean().detach())


def test_gates_stay_nearer_to_where_they_were():
    assert trained(1e4) < 0.3 * trained(0.0)


def test_the_loss_is_the_models_own_at_first_and_with_the_penalty_later():
    model = make_native("llama")
    ids = torch.randint(5, 60, (2, 8))
    plain = model.train()(input_ids=ids, labels=ids).loss.detach()
    with hf_glu.homeostasis(model, 2.0) as penalty:
        assert_same(model(input_ids=ids, labels=ids).loss.detach(), plain, "bitwise")
        for target in penalty.targets.values():
            target += 0.1
        assert_same(model(input_ids=ids, labels=ids).loss.detach(), plain + 2.0 * 0.01, "exact up to rounding")
        model.eval()
        assert_same(model(input_ids=ids, labels=ids).loss.detach(), plain, "bitwise")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's compiler, which looks at all tensors
def test_a_model_that_was_compiled_before_is_held_as_it_is_without():
    def losses(compiled):
        torch.manual_seed(0)
        model = FAMILIES["gpt2"].make(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        hf_glu.convert(model, "geglu_new", check=False)
        ids, found = torch.randint(5, 60, (2, 6)), []
        torch.compiler.reset()
        run = torch.compile(model.train(), backend="eager") if compiled else model.train()
        run(input_ids=ids, labels=ids)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with hf_glu.homeostasis(model, 1000.0):
            for _ in range(3):
                loss = run(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.detach())
        return torch.stack(found)

    torch.testing.assert_close(losses(True), losses(False))
    torch.compiler.reset()


def test_bad_input():
    with pytest.raises(NoSiteError, match="swiglu"), hf_glu.homeostasis(FAMILIES["bert"].make(), 1.0):
        pass
    with pytest.raises(OptionError, match="-1"), hf_glu.homeostasis(make_native("llama"), -1.0):
        pass
    model = make_native("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.randint(5, 60, (2, 8))
    with hf_glu.homeostasis(model, 1.0), pytest.raises(TrainingError, match="reentry"):
        model(input_ids=ids, labels=ids)


IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_has_no_part_in_a_gates_openness(side):
    model = make_native("llama").train()
    mask = MASK if side == "right" else MASK.flip(1)
    found = []
    sites = find_sites(model)
    handles = [site.act.register_forward_pre_hook(lambda act, args: found.append(args[0])) for site in sites]
    with hf_glu.homeostasis(model, 1.0) as penalty:
        model(input_ids=IDS, attention_mask=mask, labels=IDS)
    for handle in handles:
        handle.remove()
    for site, gate in zip(sites, found, strict=True):
        assert_same(penalty.targets[site.name], gate[mask.bool()].sigmoid().mean(0).detach(), "exact")


def test_a_batch_of_padding_has_no_penalty():
    model = make_native("llama").train()
    with hf_glu.homeostasis(model, 1.0) as penalty:
        model(input_ids=IDS, labels=IDS)
        loss = model(input_ids=IDS, attention_mask=torch.zeros_like(IDS), labels=IDS).loss
        assert not penalty._found
    assert loss.isfinite()


def gradients(checkpointing):
    """Return the gradients of three steps, the last two with a penalty that isn't 0."""
    torch.manual_seed(0)
    model = FAMILIES["gpt2"].make(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0).train()
    hf_glu.convert(model, "geglu_new", check=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = {}
    with hf_glu.homeostasis(model, 10.0) as penalty:
        for step in range(3):
            model.zero_grad()
            # two passes before the first one's layers are computed again
            parts = [(IDS, MASK), (IDS.flip(0), MASK.flip(1))]
            losses = [
                model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss for ids, mask in parts
            ]
            sum(losses).backward()
            found |= {f"{step} {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            for target in penalty.targets.values():
                target += 0.1
    return found


def test_gradients_are_the_same_with_layers_that_are_computed_again():
    assert_same(gradients(checkpointing=True), gradients(checkpointing=False), "exact up to rounding")
