"""Registering, unregistering, import order, the self-check."""

import os

import pytest
import torch
import transformers
from comparing import assert_same, fresh_process, outputs
from pico import FAMILIES
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

import hf_glu
from hf_glu.errors import IncompatibleTransformersError
from hf_glu.plugin.patching import Patches, require

HOOKED = ("__init__", "post_init", "_initialize_weights", "_finalize_model_loading")


def _state():
    table = (type(ACT2FN), tuple(ACT2FN))
    model = tuple(vars(PreTrainedModel)[name] for name in HOOKED)
    config = tuple(vars(PreTrainedConfig).get(name) for name in ("__post_init__", "from_dict", "hf_glu"))
    return table, model, config, vars(transformers.T5Config)["__setattr__"]


def test_unregister_gives_everything_back_and_register_is_idempotent():
    active = _state()
    hf_glu.register()
    assert _state() == active
    hf_glu.unregister()
    stock = _state()
    assert "swiglu" not in ACT2FN
    assert not hf_glu.is_registered()
    assert all(getattr(method, "__module__", "").startswith("transformers") for method in stock[1][:3])
    with pytest.raises(KeyError, match="swiglu"):
        FAMILIES["bert"].make(hidden_act="swiglu")
    hf_glu.register()
    hf_glu.unregister()
    assert _state() == stock


def test_scoped_restores_after_an_exception():
    hf_glu.unregister()
    stock = _state()
    with pytest.raises(ZeroDivisionError), hf_glu.scoped():
        assert "swiglu" in ACT2FN
        FAMILIES["t5"].make(feed_forward_proj="reglu")
        raise ZeroDivisionError
    assert _state() == stock
    hf_glu.register()
    active = _state()
    with hf_glu.scoped():
        pass
    assert hf_glu.is_registered()
    assert _state()[0] == active[0]


def test_models_go_on_working_after_unregister():
    model = FAMILIES["bert"].make(hidden_act="swiglu")
    before = outputs(model)
    hf_glu.unregister()
    assert_same(outputs(model), before, "bitwise")
    dense = FAMILIES["gpt2"].make()
    report = hf_glu.convert(dense, "geglu_new")  # converting needs no plugin
    assert report.max_abs_difference <= 1e-6


def test_stock_models_are_untouched():
    for family in FAMILIES.values():
        active = family.make()
        hf_glu.unregister()
        stock = family.make()
        hf_glu.register()
        assert_same(dict(active.state_dict()), dict(stock.state_dict()), "bitwise")
        assert active.config.to_dict() == stock.config.to_dict()


def test_a_hook_that_someone_wrapped_stays_and_is_passed_through():
    class Owner:
        def method(self):
            return "plain"

    patches, plain = Patches(), Owner.method
    patches.set(Owner, "method", lambda self: "ours")
    ours = Owner.method
    Owner.method = lambda self: "theirs over " + ours(self)
    patches.undo()
    assert Owner().method() == "theirs over ours"
    Owner.method = plain
    patches.set(Owner, "added", 1)
    patches.undo()
    assert not hasattr(Owner, "added")


def test_self_check_says_what_is_missing():
    with pytest.raises(IncompatibleTransformersError, match=r"PreTrainedModel\.no_such_hook"):
        require(PreTrainedModel, "no_such_hook")
    with pytest.raises(IncompatibleTransformersError, match="without no_such_parameter"):
        require(PreTrainedModel, "__init__", "config", "no_such_parameter")


IMPORTS = {
    "neither torch nor transformers is imported": """
import sys, hf_glu
assert not {"torch", "transformers", "peft", "datasets", "evaluate", "accelerate"} & set(sys.modules)
""",
    "transformers afterwards": """
import hf_glu
from transformers import BertConfig, BertModel
assert "swiglu" in __import__("transformers").activations.ACT2FN
""",
    "transformers before": """
from transformers import PreTrainedModel, T5Config
config = T5Config()
import hf_glu, sys
config.feed_forward_proj = "reglu"
from transformers.activations import ACT2FN
assert "swiglu" in ACT2FN
assert not {"peft", "datasets", "evaluate"} & set(sys.modules)
small = T5Config(d_model=8, d_ff=12, num_layers=1, num_heads=1, d_kv=8, vocab_size=9)
small.feed_forward_proj = "reglu"
assert small.dense_act_fn == "reglu"
""",
    "ours first of all": """
import hf_glu.activation
from transformers.activations import ACT2FN
assert "swiglu" in ACT2FN
""",
    "convert first of all": """
import hf_glu
hf_glu.convert
from transformers.activations import ACT2FN
assert "swiglu" in ACT2FN
""",
    "unregistered before transformers": """
import hf_glu
hf_glu.unregister()
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
assert "swiglu" not in ACT2FN
hf_glu.register()
assert "swiglu" in ACT2FN
assert PreTrainedModel.post_init.__wrapped__
""",
    "after a hook that Transformers no longer has": """
import transformers.modeling_utils as m
del m.PreTrainedModel._finalize_model_loading
try:
    import hf_glu
except ImportError as error:
    assert "_finalize_model_loading" in str(error) and "\\n" not in str(error), error
    from transformers.activations import ACT2FN
else:
    raise SystemExit("not refused")
""",
}


FORKS = """
import os, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor, huggingface_hub, safetensors, tokenizers  # heavy, not hooked
for number, code in enumerate(sys.argv[1:]):
    if not os.fork():
        try:
            exec(compile(code, f"<case {number}>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def forked(*codes):
    """Run each code in a process where neither hf_glu nor Transformers is imported; return how each ended."""
    done = fresh_process(FORKS, *codes)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()], done.stderr


def test_nothing_is_imported_that_isnt_needed():
    done = fresh_process(IMPORTS["neither torch nor transformers is imported"])
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_order_of_imports_works():
    orders = [name for name in IMPORTS if not name.startswith("neither")]
    ends, errors = forked(*(IMPORTS[name] for name in orders), "raise SystemExit(3)")
    assert dict(zip(orders, ends, strict=False)) == dict.fromkeys(orders, 0), errors[-3000:]
    assert ends[-1] == 1, "a failure isn't seen"


def test_doctor():
    from hf_glu.plugin.doctor import examine

    found = examine()
    assert found.healthy, found.to_dict()
    names = [check.name for check in found.checks]
    assert "hook transformers.modeling_utils" in names
    hf_glu.unregister()
    assert not examine().healthy


def test_initialisation_draws_the_same_numbers_for_the_same_seed():
    first, second = (FAMILIES["gpt2"].make(activation_function="swiglu") for _ in range(2))
    assert_same(dict(first.state_dict()), dict(second.state_dict()), "bitwise")
    assert torch.isfinite(first.transformer.h[0].mlp.c_fc.weight).all()


@pytest.mark.parametrize("act", ["stateful_geglu", "learnable_geglu", "canon_modulated_geglu"])
def test_weights_without_values_are_initialised_as_stock_ones_are(act):
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64, activation_function=act
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.apply(model._init_weights)
    assert [name for name, parameter in model.named_parameters() if (parameter == 7).all()] == []
