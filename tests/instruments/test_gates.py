"""Training the gates only: masks that copies keep, groups without decay, native families."""

import copy
import pickle

import pytest
import torch
from comparing import assert_same
from covering import covering
from pico import FAMILIES, make_native
from short_training import MODELS, changed, converted, snapshot, train

import hf_glu
from hf_glu.activation.learnable import mixes
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.ffn.linear import weight_rows
from hf_glu.instruments.probe import probe_inputs
from hf_glu.training.parameters.gates import count_parameters, keep_half, mask_gradients, train_all, train_only_gates
from hf_glu.training.parameters.parts import frozen_activations, head_names, is_norm


def halves(model, state):
    """Yield the gate and up halves of each in-projection's weight and bias in a state."""
    for site in hf_glu.find_sites(model):
        rows = state[f"{site.name}.{site.row.in_proj}.weight"]
        yield (rows if weight_rows(site.in_proj) is site.in_proj.weight else rows.T).chunk(2)
        yield state[f"{site.name}.{site.row.in_proj}.bias"].chunk(2)


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "twice": lambda model: [train_only_gates(model, ("gate",)), train_only_gates(model), model][2],
}


@pytest.mark.parametrize(("family", "made"), covering(MODELS, COPIES))
def test_only_gates_are_trained(family, made):
    model = converted(family)
    inputs = probe_inputs(model)
    counts = train_only_gates(model)
    model = COPIES[made](model)
    before = snapshot(model)
    train(model, inputs)
    for (gate, up), (old_gate, old_up) in zip(halves(model, snapshot(model)), halves(model, before), strict=True):
        assert_same(gate, old_gate, "bitwise")
        assert (up != old_up).float().mean() > 0.9
    sites = hf_glu.find_sites(model)
    projections = {f"{site.name}.{site.row.in_proj}.{kind}" for site in sites for kind in ("weight", "bias")}
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    expected = [
        name for name in before if name.rpartition(".")[0] in norms or name.startswith(tuple(head_names(model)))
    ]
    trained = changed(model, before)
    assert trained <= projections | set(expected)
    assert trained >= projections | {name for name in expected if before[name].ndim == 2}
    assert norms & {name.rpartition(".")[0] for name in trained}
    up = sum(site.in_proj.weight.numel() + site.in_proj.bias.numel() for site in sites) // 2
    assert counts == {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": up + sum(before[name].numel() for name in expected),
    }


def test_without_its_group_decay_moves_the_frozen_rows():
    model = converted("bert")
    train_only_gates(model)
    before = snapshot(model)
    train(model, probe_inputs(model), groups=[{"params": list(model.parameters()), "weight_decay": 0.1}])
    gate, old = (next(halves(model, state))[0] for state in (snapshot(model), before))
    assert not torch.equal(gate, old)


def test_options_of_the_gates():
    model = converted("gpt2", "learnable_geglu_new")
    inputs = probe_inputs(model)
    up = train_only_gates(model, norms=False, head=False)["trainable"]
    assert frozen_activations(model) == []
    both = train_only_gates(model, ("gate", "up"), norms=False, head=False)["trainable"]
    mix = sum(mix.mix.numel() for mix in mixes(model))
    assert both - mix == 2 * (up - mix)
    train_only_gates(model, "gate", norms=False, head=False)
    before = snapshot(model)
    train(model, inputs)
    assert not any(is_norm(model.get_submodule(name.rpartition(".")[0])) for name in changed(model, before))
    for (gate, up), (old_gate, old_up) in zip(halves(model, snapshot(model)), halves(model, before), strict=True):
        assert_same(up, old_up, "bitwise")
        assert not torch.equal(gate, old_gate)
    hooks = [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    assert [len(each) for each in hooks] == [1] * 4, "one for each parameter, however often the model is run"
    train_all(model)
    before = snapshot(model)
    train(model, inputs)
    assert count_parameters(model)["trainable"] == count_parameters(model)["total"]
    assert not any(mask_gradients in module._forward_pre_hooks.values() for module in model.modules())
    for new, old in zip(halves(model, snapshot(model)), halves(model, before), strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(new, old, strict=True))


def test_gates_of_native_families_are_trained_by_projections_or_rows():
    for name, trained in (("llama", "up_proj"), ("t5_v1_1", "wi_1"), ("phi3", "gate_up_proj"), ("modernbert", "Wi")):
        model = make_native(name)
        train_only_gates(model, norms=False, head=False)
        before = snapshot(model)
        train(model, probe_inputs(model))
        moved = changed(model, before)
        assert moved == {key for key in before if key.split(".")[-2] == trained}
        if len(sites := [site for site in hf_glu.find_sites(model) if site.kind == "packed"]):
            old, new = (state[f"{sites[0].name}.{trained}.weight"].chunk(2) for state in (before, snapshot(model)))
            assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [True, False]


def test_what_has_no_gates_to_train():
    with pytest.raises(NoSiteError, match="convert it first"):
        train_only_gates(FAMILIES["bert"].make())
    with pytest.raises(ConversionError, match="expert banks"):
        train_only_gates(make_native("mixtral"))
    for wrong in ((), ("down",)):
        with pytest.raises(OptionError, match="gate"):
            train_only_gates(converted("bert"), wrong)


def test_the_masked_half_is_zero_even_where_it_is_nan():
    gradient = torch.full((4, 6), float("nan"))
    gradient[:, 3:] = 2
    assert_same(keep_half(gradient, half=1, dim=1), torch.tensor([0.0] * 3 + [2.0] * 3).expand(4, 6), "bitwise")
    assert keep_half(gradient, half=0, dim=0)[2:].eq(0).all()
