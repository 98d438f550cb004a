"""Muon on [gate | up]: two matrices in one parameter, stepped as Muon steps two parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from pico import FAMILIES, VOCAB
from torch import nn

import hf_glu
from hf_glu.errors import OptionError

muon_class = getattr(torch.optim, "Muon", None)
pytestmark = pytest.mark.skipif(muon_class is None, reason="torch has no Muon before 2.9")
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
IN_PROJ = {"bert": "intermediate.dense.weight", "gpt2": "mlp.c_fc.weight"}


def gated(family: str) -> nn.Module:
    model = FAMILIES[family].make()
    hf_glu.convert(model, "geglu", check=False)
    return model


def rows(weight: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """Return both halves as ``[out, in]``."""
    return [half.T if dim else half for half in weight.detach().chunk(2, dim)]


def backward(model: nn.Module) -> None:
    model(input_ids=IDS).logits.square().mean().backward()


@pytest.mark.parametrize("family", IN_PROJ)
def test_each_half_is_stepped_as_a_parameter_of_its_own(family):
    model, dim = gated(family), 1 if family == "gpt2" else 0
    names = [name for name, _ in model.named_parameters() if name.endswith(IN_PROJ[family])]
    assert len(names) == 2
    wholes = {name: copy.deepcopy(model.get_parameter(name)) for name in names}
    halves = {name: [nn.Parameter(h.clone()) for h in rows(whole, dim)] for name, whole in wholes.items()}
    ours, options = hf_glu.muon(model, lr=0.02), {"lr": 0.02, "weight_decay": 0.1}
    theirs = muon_class([h for pair in halves.values() for h in pair], **options)
    one = muon_class(wholes.values(), **options)
    for _ in range(3):
        ours.zero_grad()
        backward(model)
        for name in names:
            grad = model.get_parameter(name).grad
            wholes[name].grad = grad.clone()
            for half, own in zip(halves[name], rows(grad, dim), strict=True):
                half.grad = own.clone()
        for optimizer in (ours, theirs, one):
            optimizer.step()
    for name in names:
        expected = torch.cat([half.detach() for half in halves[name]])
        expected = expected.T if dim else expected
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)
        assert (wholes[name] - expected).abs().max() > 1e-4  # as one matrix it would be another step


def test_a_state_is_saved_by_parameter_and_goes_on():
    model = gated("gpt2")
    ours = hf_glu.muon(model, lr=0.02)
    backward(model)
    ours.step()
    twin = copy.deepcopy(model)
    again = hf_glu.muon(twin, lr=0.02)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for one, optimizer in ((model, ours), (twin, again)):
        optimizer.zero_grad()
        backward(one)
        optimizer.step()
    for (name, left), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", IN_PROJ)
def test_two_optimizers_have_every_parameter_once(family):
    model = gated(family)
    optimizer = hf_glu.muon(model)
    rest = [p for group in hf_glu.parameter_groups(model, 1e-3, 0.01, without=optimizer) for p in group["params"]]
    matrices = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, [*rest, *matrices])) == sorted(id(p) for p in model.parameters())
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    assert embeddings <= set(map(id, rest))
    assert id(model.get_output_embeddings().weight) in set(map(id, rest))


def test_half_trained_projections_go_to_the_other_optimizer():
    model = gated("bert")
    hf_glu.train_only_gates(model)
    with pytest.raises(OptionError, match="no matrix"):
        hf_glu.muon(model)


def test_a_native_packed_projection_is_two_matrices():
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=VOCAB, pad_token_id=0))
    packed = model.model.layers[0].mlp.gate_up_proj.weight
    (group,) = [group for group in hf_glu.muon(model).param_groups if "halves" in group]
    assert group["halves"] == 0
    assert len(group["params"]) == 1
    assert group["params"][0] is packed


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copy_steps_as_the_original(twice):
    model = gated("gpt2")
    pairs = [(model, hf_glu.muon(model, lr=0.02))]
    pairs.append(twice(pairs[0]))
    for one, optimizer in pairs:
        backward(one)
        optimizer.step()
    for (name, left), right in zip(model.named_parameters(), pairs[1][0].parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=name)


def test_a_single_row_is_no_matrix():
    model = FAMILIES["bert"].make()
    layer = model.base_model.encoder.layer[0]
    layer.gate = nn.Linear(16, 1)
    found = [p for group in hf_glu.muon(model).param_groups for p in group["params"]]
    assert not any(p is layer.gate.weight for p in found)
